"""The whole of a run: its folder, its resumption after SIGKILL, its processes, its last words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harmonize.cli import main
from harmonize.config import check_config, compose, save_config
from harmonize.files import read_rows
from harmonize.training.callbacks import probe
from harmonize.training.run import find_checkpoint, train
from harmonize.types import ConfigError
from tests.training.test_loggers import finished_records
from tests.training.test_module import assert_bit_equal

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "data.image_size=16",
    "data.patch_size=4",
    "data.batch_size=8",
    "data.num_workers=0",
    "backbone.width=16",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "backbone.drop_path=0.2",
    "loss.contrastive.hidden_dim=16",
    "loss.contrastive.out_dim=8",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "callbacks.probe.k=3",
    "callbacks.gradient_norms.every_n_steps=3",
    "diagnostics=none",
    "logger=csv",
]
SPEED = {
    "train/images_per_second",
    "train/data_wait",
    "train/augmentation",
    "diagnostics/seconds",
    "diagnostics/share_of_epoch",
}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Two classes of 20 noise images, one reddish, one bluish: 4 steps of 8 images per epoch, 4 validation images."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (root / name).mkdir()
        for i in range(20):
            pixels = generator.integers(0, 150, (20, 20, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def overrides(images, tmp_path):
    return [*TINY, "data=folder", f"data.root={images}", f"run.dir={tmp_path / 'run'}"]


@pytest.fixture
def measured(overrides):
    """With diagnostics, but without their figures, which take longest."""
    return [*(o for o in overrides if o != "diagnostics=none"), "diagnostics.figures=false"]


def run(*overrides):
    cfg = compose(overrides)
    check_config(cfg)
    return train(cfg)


def rows(folder):
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in SPEED} for row in read_rows(folder / "metrics.jsonl")]


def diagnostics(folder):
    """The files of the diagnostics by name, without what depends on the clock."""
    paths = sorted((folder / "diagnostics").iterdir())
    return {p.name: {k: v for k, v in json.loads(p.read_text()).items() if k != "seconds"} for p in paths}


def differences(a, b, place=""):
    """Where two plain containers differ: pytest's own comparison of large ones takes minutes."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{place}/{i}")]
    return [] if a == b else [f"{place}: {str(a)[:200]} != {str(b)[:200]}"]


def load(path):
    return torch.load(path, weights_only=True)


def command(*arguments, program=("train.py",)):
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_what_a_run_leaves_behind(measured, tmp_path, capsys):
    metrics = run(*measured)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "command.txt",
        "versions.json",
        "metrics.jsonl",
        "metrics.json",
        "checkpoints",
        "diagnostics",
        "state.json",
    }
    assert list(diagnostics(folder)) == [f"epoch_{epoch:04d}.json" for epoch in range(4)]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert metrics["step"] == metrics["total_steps"] == 12
    assert {"untrained/knn_top1", "untrained/linear_top1", "val/knn_top1", "val/linear_top1"} <= set(metrics)
    assert {"epoch/loss_mim", "epoch/loss_contrastive", "train/grad_norm_mim"} <= set(metrics)
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__.split("+")[0]
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    checkpoint = load(folder / "checkpoints" / "last.ckpt")
    assert checkpoint["config"]["backbone"]["width"] == 16
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"encoder", "objective"}
    shown = capsys.readouterr().out
    for words in ("mim loss", "contrastive loss", "k-NN top-1", "linear probe top-1", "untrained", str(folder)):
        assert words in shown


def test_where_images_are_augmented_changes_no_bit(overrides, tmp_path, capsys):
    short = [*overrides, "trainer.max_epochs=1"]
    run(*short, "data.augment=workers")
    assert "Computing on the CPU" in (shown := capsys.readouterr().out)
    assert "augmenting images in no worker processes" in shown
    run(*short, "data.augment=device", f"run.dir={tmp_path / 'device'}")
    assert "augmenting whole batches there" in capsys.readouterr().out
    assert rows(tmp_path / "run") == rows(tmp_path / "device")
    states = [load(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("run", "device")]
    assert_bit_equal(*states)


def test_less_memory_gives_the_same_network(overrides, tmp_path):
    short = [*overrides, "trainer.max_epochs=1", "backbone.drop_path=0", "loss.share_views=true"]
    run(*short)
    less = ("trainer.images_at_once=3", "trainer.activation_checkpointing=true")
    run(*short, *less, f"run.dir={tmp_path / 'less'}")
    (whole, parts) = (load(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("run", "less"))
    assert not all(torch.equal(parts[key], value) for key, value in whole.items()), "the options were not passed on"
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_a_finished_run_says_so_at_once(overrides, tmp_path, capsys):
    metrics = run(*overrides, "trainer.max_epochs=1")
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    capsys.readouterr()
    assert run(*overrides, "trainer.max_epochs=1", "data.num_workers=1") == metrics  # a key that changes no result
    shown = capsys.readouterr().out
    assert "finished" in shown
    assert "k-NN top-1" in shown
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_two_runs_are_bit_identical(measured, tmp_path):
    run(*measured)
    run(*measured, f"run.dir={tmp_path / 'again'}", "data.num_workers=1")
    states = [load(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("run", "again")]
    assert_bit_equal(*states)
    assert not differences(rows(tmp_path / "run"), rows(tmp_path / "again"))
    assert not differences(diagnostics(tmp_path / "run"), diagnostics(tmp_path / "again"))


def test_an_unreadable_checkpoint_is_replaced_by_the_best(overrides, tmp_path):
    run(*overrides)
    folder = tmp_path / "run"
    last = folder / "checkpoints" / "last.ckpt"
    expected = load(last)["state_dict"]
    last.unlink()  # it may be the same file as best.ckpt
    last.with_name("previous.ckpt").unlink()
    last.write_bytes(b"torn")
    (folder / "metrics.json").unlink()
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged; going on from best\.ckpt"):
        run(*overrides)
    assert find_checkpoint(folder).path == last
    assert_bit_equal(load(last)["state_dict"], expected)


def test_no_readable_checkpoint_is_not_overwritten(overrides, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"run\.dir=.* no readable checkpoint .*run\.fresh=true"):
        run(*overrides)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("backbone.width=32", "encoder.cls_token"),
        ("backbone.num_heads=4", "backbone.num_heads is 2 there and 4 here"),
        ("loss.contrastive.hidden_dim=24", "objective.contrastive.projector"),
    ],
)
def test_a_checkpoint_of_another_architecture(overrides, tmp_path, change, words):
    run(*overrides, "trainer.max_steps=1")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="another architecture") as error:
        run(*overrides, change)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_longer_run_goes_on_and_says_what_changed(overrides, tmp_path, capsys):
    run(*overrides, "trainer.max_steps=6")  # ends in mid-epoch, validated and saved
    assert load(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6
    capsys.readouterr()
    metrics = run(*overrides, "trainer.max_steps=11")
    assert metrics["step"] == 11
    shown = capsys.readouterr().out
    assert "trainer.max_steps: 6 -> 11" in shown
    assert "Resuming at step 6 of 11" in shown
    steps = [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert steps == list(range(1, 12))
    assert [row["step"] for row in rows(tmp_path / "run") if "val/knn_top1" in row][-1] == 11


def test_fresh_moves_the_old_folder_aside(overrides, tmp_path, capsys):
    (tmp_path / "run").mkdir()  # an empty folder may stay
    for _ in range(3):
        run(*overrides, "trainer.max_steps=1", "run.fresh=true")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]
    assert f"The old run folder is now {tmp_path / 'run.old-2'}" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == len(
        read_rows(tmp_path / "run.old-1" / "metrics.jsonl")
    )


@pytest.mark.parametrize("name", ["run", "run/notes.txt"])  # a file, a folder with something else in it
def test_fresh_moves_nothing_but_run_folders(overrides, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"^run\.dir=.* is no run folder.*\.$"):
        run(*overrides, "run.fresh=true")
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_corrupt_images_are_one_sentence_and_leave_nothing(overrides, tmp_path, recwarn):
    root = tmp_path / "images"
    for i in range(40):
        path = root / f"{'ab'[i % 2]}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"corrupt")
    with pytest.raises(ConfigError, match=r"^data\.root holds no usable images: .* in a row cannot be read, from .*$"):
        run(*overrides, f"data.root={root}")
    assert not (tmp_path / "run").exists()
    assert not [w for w in recwarn if "skipped" in str(w.message)]


@pytest.mark.parametrize("text", ["", "seed: [", "seed: 0\n"])
def test_a_torn_configuration_counts_as_absent(overrides, tmp_path, text):
    metrics = run(*overrides, "trainer.max_steps=1")
    stored = tmp_path / "run" / "config.yaml"
    before = stored.read_text()
    stored.write_text(text)
    assert run(*overrides, "trainer.max_steps=1") == metrics
    assert stored.read_text() == before


def test_the_configuration_is_replaced_whole_and_only_when_it_changes(overrides, tmp_path, monkeypatch):
    path, cfg = tmp_path / "config.yaml", compose(overrides)
    save_config(cfg, path)
    before = path.stat()
    save_config(cfg, path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def killed(*_):
        raise KeyboardInterrupt

    content = path.read_bytes()
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_config(compose([*overrides, "seed=1"]), path)
    assert path.read_bytes() == content


def test_changed_options_of_the_optimizer_take_effect(overrides, tmp_path):
    run(*overrides, "trainer.max_steps=1")
    changed = ["optimizer.weight_decay=0.3", "optimizer.betas=[0.8, 0.9]", "optimizer.eps=1e-4"]
    run(*overrides, "trainer.max_steps=2", *changed)
    (state,) = load(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"]
    options = [(group["weight_decay"], tuple(group["betas"]), group["eps"]) for group in state["param_groups"]]
    assert options == [(0.3, (0.8, 0.9), 1e-4), (0.0, (0.8, 0.9), 1e-4)]
    assert {float(moments["step"]) for moments in state["state"].values()} == {2}


@pytest.mark.parametrize("patterns", ["[]", "[1d]", "[1d, cls_token, '*.mask_token']"])
def test_other_groups_of_the_optimizer_are_refused(overrides, tmp_path, patterns):
    run(*overrides, "trainer.max_steps=1")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"^run\.dir=.*optimizer\.no_decay is .* there and .* here.*\.$"):
        run(*overrides, "trainer.max_steps=2", f"optimizer.no_decay={patterns}")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_short_validation_takes_images_of_all_classes(overrides, monkeypatch):
    seen = []
    monkeypatch.setattr(
        probe, "knn_accuracy", lambda train, val, *_: seen.append((train.label.tolist(), val.label.tolist())) or 0.5
    )
    small = ["data.batch_size=2", "data.val_fraction=0.5", "trainer.limit_val_batches=1", "trainer.max_steps=1"]
    run(*overrides, *small)
    assert seen == [([0, 1], [0, 1])] * 2


def test_a_loss_that_is_not_finite_is_one_sentence(overrides, tmp_path, capsys):
    assert main(["train", *overrides, "trainer.max_steps=1"]) == 0
    capsys.readouterr()
    diverging = [*overrides, "optimizer.lr=1e30"]
    assert main(["train", *diverging]) == 1  # the end of an epoch comes first
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("harmonize: error: The network has diverged at optimiser step 4: k-NN needs finite")
    assert main(["train", *diverging, "trainer.max_skipped_steps=2", "run.fresh=true"]) == 1
    line, replay = capsys.readouterr().err.splitlines()[-2:]
    assert line.startswith("harmonize: error: The loss or its gradient is not finite at 2 steps in a row, from step ")
    assert f"harmonize replay {tmp_path / 'run' / 'nonfinite_rank0.pt'} " in replay
    assert not (tmp_path / "run" / "metrics.json").exists()  # not even that of the shorter run


def test_fp16_is_refused_without_a_gpu(overrides, tmp_path):
    with pytest.raises(ConfigError, match=r"^trainer\.precision=fp16 needs a GPU; use bf16, 32 or auto\.$"):
        run(*overrides, "trainer.precision=fp16")
    assert not (tmp_path / "run").exists()


def test_the_last_epoch_is_validated_whatever_the_interval(overrides, tmp_path):
    run(*overrides, "trainer.val_every_n_epochs=2")
    assert [row["step"] for row in rows(tmp_path / "run") if "val/knn_top1" in row] == [8, 12]


def test_images_without_labels(overrides, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(20):
        Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(flat / f"{i}.png")
    metrics = run(*overrides, f"data.root={flat}", "trainer.max_epochs=2")
    assert "epoch/loss" in metrics
    assert not [name for name in metrics if "top1" in name]
    shown = capsys.readouterr().out
    assert "no labels, or one class: k-NN and linear probes are off" in shown
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


def test_smoke_and_wandb(overrides, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    chosen = [o for o in overrides if not o.startswith(("logger", "trainer.max_epochs"))]
    metrics = run(*chosen, "logger=wandb", "trainer=smoke")
    assert metrics["step"] == 10
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if "offline" in line]) == 1
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    names = {
        item.key or "/".join(item.nested_key)
        for record in finished_records(path)
        if record.HasField("history")
        for item in record.history.item
    }
    assert {"train/loss_mim", "train/loss_contrastive", "val/knn_top1", "untrained/linear_top1"} <= names


CONSOLE_SCRIPT = str(Path(sys.executable).with_name("harmonize"))


@pytest.mark.parametrize(
    "program",
    [
        ("-m", "harmonize", "train"),
        pytest.param((CONSOLE_SCRIPT, "train"), marks=pytest.mark.slow),
    ],
    ids=["module", "script"],
)
def test_two_processes_equal_one(measured, tmp_path, program):
    """Gloo on two CPU processes; test_ranks.py has train.py.

    DropPath draws per rank, so it is off. Adam's eps is large, see test_module.py.
    """
    same = [*measured, "backbone.drop_path=0", "optimizer.eps=1e-3", "trainer.max_steps=3"]
    run(*same)
    output = finish(command(*same, f"run.dir={tmp_path / 'two'}", "trainer.devices=2", program=program))
    assert output.count("Run folder") == 1
    assert output.count("% of the epoch") == 1
    assert [*diagnostics(tmp_path / "two")] == ["epoch_0000.json", "epoch_0001.json"]
    one, two = (load(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("run", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    for a, b in zip(rows(tmp_path / "run"), rows(tmp_path / "two"), strict=True):
        for row in (a, b):  # means over ranks of a spread within each rank
            row.pop("train/query_std", None), row.pop("train/key_std", None)
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
