"""harmonize compare: groups, means and spreads from run folders that hold known numbers."""

import csv
import json
import math
import statistics
from dataclasses import replace

import pytest

from harmonize.cli import main
from harmonize.comparison import average, differing, group, labels, read_run
from harmonize.config import compose, save_config
from harmonize.files import write_json
from harmonize.reports.files import to_plain
from harmonize.sweeps import Job, Sweep
from harmonize.types import ConfigError, Curve, Findings, Quantity, Surface

QUANTITY = Quantity("Mutual information", "", "How much attention depends on the query.", "", "Figure 4")
SMALL = ["backbone.width=16", "backbone.depth=2", "backbone.num_heads=2", "data.image_size=16", "data.patch_size=4"]


def findings(shift):
    curve = Curve(QUANTITY, [1, 2], [0.1 + shift, 0.2 + shift], [0.01, 0.01], heads=[[0.1], [0.2]], uniform=[0.0, 0.0])
    surface = Surface(QUANTITY, [1, 2], "frequency", [0.0, 1.0], [[shift, 1.0], [2.0, 3.0]], [[0.1, 0.1], [0.1, 0.1]])
    return Findings(num_images=8, curves={"nmi": curve}, surfaces={"spectrum": surface})


@pytest.fixture
def make(tmp_path):
    return maker(tmp_path)


def maker(root):
    """make(name, accuracy, *overrides) -> a run folder of 40 steps of 32 images at 64 images/s."""

    def run(name, accuracy, *overrides, shift=0.0, total=40):
        folder = root / name
        (folder / "diagnostics").mkdir(parents=True)
        save_config(compose([*SMALL, "data.batch_size=32", *overrides]), folder / "config.yaml")
        rows = [
            {"step": 20, "train/images_per_second": 64.0, "train/lambda": 0.0, "epoch/loss": 3.0},
            {"step": 40, "train/images_per_second": 64.0, "train/lambda": 1.0, "epoch/loss": 1.5},
            {"step": 40, "val/knn_top1": accuracy, "val/linear_top1": accuracy + 0.1, "val/chance_top1": 0.1},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_json(folder / "metrics.json", {"step": 40, "total_steps": total})
        for epoch, found in ((0, findings(0.0)), (2, findings(shift))):
            write_json(folder / "diagnostics" / f"epoch_{epoch:04d}.json", {"epoch": epoch} | to_plain(found))
        return folder

    return run


def test_runs_of_other_seeds_are_one_group(make):
    runs = [
        read_run(make("a", 0.5, "loss.lambda=0.2", "seed=0")),
        read_run(make("b", 0.6, "loss.lambda=0.8", "seed=0")),
        read_run(make("c", 0.7, "loss.lambda=0.2", "seed=1", "data.num_workers=3", "trainer.devices=2")),
    ]
    groups = group(runs)
    assert [[run.folder.name for run in some] for some in groups] == [["a", "c"], ["b"]]
    assert differing([some[0].settings for some in groups]) == {"loss.lambda": [0.2, 0.8]}
    assert labels([some[0] for some in groups]) == ["lambda=0.2", "lambda=0.8"]


def test_names_say_what_differs_and_no_more(make):
    runs = [read_run(make(loss, 0.5, f"loss={loss}")) for loss in ("contrastive", "mim", "hybrid")]
    assert labels(runs) == ["contrastive", "mim", "hybrid"]
    runs = [
        read_run(make(f"{a}{b}", 0.5, f"optimizer.lr={a}", f"schedule.warmup={b}")) for a in (1, 2) for b in (0, 0.5)
    ]
    assert labels(runs) == ["lr=1 warmup=0", "lr=1 warmup=0.5", "lr=2 warmup=0", "lr=2 warmup=0.5"]


def test_the_mean_of_one_run_is_its_own_and_of_several_has_their_spread():
    one, other, far = (findings(shift) for shift in (0.0, 0.2, 0.7))
    assert average([]).curves == {}
    assert average([one]) is one
    mean = average([one, other, far])
    values = [0.1, 0.3, 0.8]
    assert mean.curves["nmi"].value[0] == pytest.approx(statistics.fmean(values))
    assert mean.curves["nmi"].error[0] == pytest.approx(statistics.stdev(values))
    assert mean.curves["nmi"].heads is None
    assert mean.surfaces["spectrum"].value[0] == pytest.approx([0.3, 1.0])
    assert mean.surfaces["spectrum"].error[0][0] == pytest.approx(statistics.stdev([0.0, 0.2, 0.7]))
    deeper = replace(other.curves["nmi"], layer=[1, 3])
    assert "nmi" not in average([one, Findings(num_images=8, curves={"nmi": deeper})]).curves
    gap = replace(other.curves["nmi"], value=[math.nan, 0.4])
    assert average([one, Findings(num_images=8, curves={"nmi": gap})]).curves["nmi"].value == pytest.approx([0.1, 0.3])


def test_a_sweep_becomes_a_page_tables_and_figures(make, tmp_path, capsys):
    jobs = []
    for weight, seed, accuracy in ((0.8, 0, 0.6), (0.2, 0, 0.4), (0.2, 1, 0.5), (1, 0, 0.3)):
        name = f"{weight}-{seed}"
        overrides = [f"loss.lambda={weight}", f"seed={seed}"]
        jobs.append(Job(len(jobs), overrides, make(name, accuracy, *overrides, shift=seed / 10), tmp_path / name))
    jobs.append(Job(9, [], tmp_path / "not begun", tmp_path / "log"))
    Sweep(tmp_path / "sweep", "train", "local", {}, jobs).write()
    results = [
        {"protocol": "fine_tune", "metric": "top1", "series": "", "axis": None, "value": 0.9}
        | {"checkpoint": str(jobs[0].folder / "checkpoints" / "last.ckpt")}
    ]
    (tmp_path / "evaluation").mkdir()
    write_json(tmp_path / "evaluation" / "results.json", results)
    assert main(["compare", str(tmp_path / "sweep"), "--evaluations", str(tmp_path / "evaluation")]) == 0
    shown = capsys.readouterr().out
    assert shown.index("lambda=0.2") < shown.index("lambda=0.8") < shown.index("lambda=1")

    folder = tmp_path / "sweep" / "comparison"
    rows = {(row["group"], row["metric"]): row for row in csv.DictReader((folder / "comparison.csv").open())}
    knn = rows["lambda=0.2", "val/knn_top1"]
    assert float(knn["mean"]) == pytest.approx(0.45)
    assert float(knn["standard_deviation"]) == pytest.approx(statistics.stdev([0.4, 0.5]))
    assert (knn["runs"], knn["num_values"]) == ("2", "2")
    assert float(rows["lambda=1", "hours"]["mean"]) == pytest.approx(40 * 32 / 64 / 3600)
    assert rows["lambda=0.8", "evaluate/fine_tune/top1"]["mean"] == "0.9"
    assert ("lambda=1", "evaluate/fine_tune/top1") not in rows
    assert not any("chance" in metric for _, metric in rows)

    text = (folder / "comparison.md").read_text()
    assert "| val/knn_top1 | 0.450 ± 0.071 | 0.6 | 0.3 |" in text
    assert "| loss.lambda | 0.2 | 0.8 | 1 |" in text
    page = (folder / "report.html").read_text()
    assert "0.450 ± 0.071" in page
    assert "standard deviation over seeds" in page
    for name in ("trade_off", "settings", "lambda", "nmi"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000


def test_runs_that_still_train_take_part(make, tmp_path, capsys):
    make("a", 0.5, total=100)
    assert main(["compare", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    assert "a is at step 40 of 100." in capsys.readouterr().out
    assert not (tmp_path / "out" / "figures" / "settings.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere: no run folder with metrics.jsonl, nor a sweep whose runs have begun."),
        (["a", "b", "--names", "one"], "--names must be 2 names, one for each group of runs, not 1."),
        (["a", "b", "--names", "x", "x"], "--names must differ from each other; x stands there twice."),
        (["a", "--evaluations", "b"], "no results.json there is about a checkpoint of these runs."),
        (["torn"], "torn cannot be read as a run folder"),
        (["empty"], "empty: nothing has been measured yet."),
        ([], "harmonize compare: the following arguments are required: folders"),
    ],
)
def test_mistakes_are_one_sentence(make, tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    make("a", 0.5, "loss.lambda=0")
    make("b", 0.5, "loss.lambda=1")
    (make("torn", 0.5) / "config.yaml").write_text("a: [")
    (make("empty", 0.5) / "metrics.jsonl").write_text("")
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("harmonize: error") == 1
    assert not (tmp_path / "outputs").exists()


def test_a_run_that_cannot_be_read_names_the_folder(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a run folder"):
        read_run(tmp_path)
