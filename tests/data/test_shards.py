import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import tarfile
import threading
import time
import urllib.parse
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harmonize import config, sharding
from harmonize.data import shard_cache, shards
from harmonize.data.datasets import Dataset, Folder, Split
from harmonize.data.images import UnreadableImage, WrongData
from harmonize.data.module import DataModule
from harmonize.data.sampler import EpochBatchSampler, evenly, grouped_order
from harmonize.data.shard_index import INDEX, expand, index_from_bytes, read_member, scan, splits_by_name
from harmonize.data.shards import Shards
from harmonize.data.views import SimMIM
from harmonize.rules import violations
from harmonize.types import ConfigError


def noise(seed, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(pixels[..., :3] if mode == "RGB" else pixels, "RGBA" if mode == "RGBA" else None)
    return image if mode in ("RGB", "RGBA") else Image.fromarray(pixels[..., :3]).convert(mode)


def encoded(seed, kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    noise(seed, mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    """Two classes of 30 and 20 images, of every kind that needs care."""
    root, seed = tmp_path / "images", itertools.count()
    special = [("WEBP", "RGB"), ("JPEG", "CMYK"), ("PNG", "I;16"), ("PNG", "RGBA"), ("TIFF", "L"), ("BMP", "RGB")]
    for name, num in {"ant": 30, "bee": 20}.items():
        (root / name / "deeper").mkdir(parents=True)
        for i in range(num):
            kind, mode = special[i] if i < len(special) else ("PNG", "RGB")
            folder = root / name / "deeper" if i % 5 == 0 else root / name
            (folder / f"a.{i:02d}.{kind}").write_bytes(encoded(next(seed), kind, mode))
    return root


def write(folder, out, *options):
    assert sharding.main([str(folder), str(out), "--size-mb", "0.0103", "--workers", "1", *options]) == 0
    return out


@pytest.fixture
def packed(images, tmp_path):
    """The same, in shards of a few images."""
    return write(images, tmp_path / "shards")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar(path, members, **options):
    """A tar file of (name, content) as another program would write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def foreign(root, num_shards=3, per_shard=4, name="{:04d}.tar", labels=True, start=0):
    """Shards without an index; the label of an image is its number modulo 3."""
    for shard in range(num_shards):
        members = []
        for i in range(per_shard):
            number = start + shard * per_shard + i
            members.append((f"{number:05d}.png", encoded(number)))
            if labels:
                members.append((f"{number:05d}.cls", f"{number % 3}\n".encode()))
        tar(root / name.format(shard), members)
    return root


def contents(split, names=None):
    """Name -> pixels and label of every image."""
    found = {}
    for i in range(len(split)):
        image, label = split.load(i)
        assert image.mode == "RGB"
        found[names[i] if names else split.name(i).partition(": ")[2]] = (image.size, image.tobytes(), label)
    assert len(found) == len(split)
    return found


def files(split, root):
    return [os.path.relpath(split.name(i), root) for i in range(len(split))]


# Writing


def test_shards_hold_what_the_folder_holds(images, packed):
    theirs, ours = Folder(str(images)), Shards(str(packed))
    assert isinstance(ours, Dataset)
    assert ours.classes == theirs.classes == ["ant", "bee"]
    for name, num in {"train": 45, "val": 5}.items():
        split = ours.split(name)
        assert isinstance(split, Split)
        assert len(split.shards) > (3 if name == "train" else 0)
        assert len(split) == num
        expected = contents(theirs.split(name), files(theirs.split(name), images))
        assert contents(split) == expected


def test_a_val_folder_becomes_val(tmp_path):
    for part, name, i in itertools.product(("train", "validation"), ("x", "y"), range(4)):
        (tmp_path / "in" / part / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / part / name / f"{part}{i}.png").write_bytes(encoded(i))
    ours, theirs = Shards(str(write(tmp_path / "in", tmp_path / "out"))), Folder(str(tmp_path / "in"))
    for name, folder in {"train": "train", "val": "validation"}.items():
        assert contents(ours.split(name)) == contents(
            theirs.split(name), files(theirs.split(name), tmp_path / "in" / folder)
        )
    assert len(ours.split("train")) == len(ours.split("val")) == 8
    with pytest.raises(
        ConfigError, match=r"--val-fraction 0.2 is not possible: FOLDER has images for val, .*validation"
    ):
        write(tmp_path / "in", tmp_path / "other", "--val-fraction", "0.2")


def test_images_without_class_folders_have_no_labels(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i}.png").write_bytes(encoded(i))
    data = Shards(str(write(tmp_path / "in", tmp_path / "out", "--val-fraction", "0.25")))
    assert data.classes is None
    assert [len(data.split(name)) for name in ("train", "val")] == [15, 5]
    assert {label for *_, label in contents(data.split("train")).values()} == {-1}
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as file:
        assert {Path(name).suffix for name in file.getnames()} == {".png"}
    (tmp_path / "out" / INDEX).unlink()
    assert Shards(str(tmp_path / "out")).classes is None


def test_subsets_are_those_of_the_folder(images, packed):
    for num in (7, 20):
        theirs = Folder(str(images), num_train=num, num_val=2)
        ours = Shards(str(packed), num_train=num, num_val=2)
        for name in ("train", "val"):
            expected = set(files(theirs.split(name), images))
            assert {ours.split(name).name(i).partition(": ")[2] for i in range(len(expected))} == expected


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_images_make_the_same_bytes(images, packed, tmp_path):
    shutil.copytree(images, tmp_path / "moved" / "elsewhere")
    for path in (tmp_path / "moved" / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
    again = write(tmp_path / "moved" / "elsewhere", tmp_path / "again", "--workers", "3")
    assert everything(again) == everything(packed)
    other = write(images, tmp_path / "other", "--shuffle-seed", "1")
    assert everything(other)["train-000000.tar"] != everything(packed)["train-000000.tar"]
    names = [[Shards(str(out)).split("train").name(i)[-20:] for i in range(45)] for out in (packed, other)]
    assert names[0] != names[1]
    assert names[0] != sorted(names[0])


def test_shards_are_plain_tar_files_of_the_size_asked_for(images, packed):
    index = index_from_bytes((packed / INDEX).read_bytes(), INDEX)
    assert sorted(everything(packed)) == [INDEX, *sorted(shard.name for shard in index.shards)]
    seen = {}
    for shard in index.shards:
        path = packed / shard.name
        assert path.stat().st_size == shard.num_bytes <= 10_300
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
        with tarfile.open(path, "r:") as file:
            members = file.getmembers()
            for image, label, name, expected in zip(
                members[::2], members[1::2], shard.names, shard.labels, strict=True
            ):
                assert (image.mtime, image.uid, image.gid, image.uname, image.mode) == (0, 0, 0, "", 0o644)
                assert Path(image.name).stem == Path(label.name).stem
                assert Path(image.name).suffix == Path(os.fsdecode(name)).suffix.lower()
                assert int(file.extractfile(label).read()) == expected
                seen[os.fsdecode(name)] = file.extractfile(image).read()
    assert max(map(len, index.shards)) > 2
    assert seen == {str(path.relative_to(images)): path.read_bytes() for path in images.rglob("*.*") if path.is_file()}
    listed = subprocess.run(["tar", "-tf", packed / "train-000000.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split()[:2] == ["000000000.png", "000000000.cls"] or listed.stdout.startswith("000000000.")
    assert listed.stderr == ""


def test_unreadable_images_are_left_out_and_named(images, tmp_path, capsys):
    for i in range(7):
        (images / "ant" / f"bad{i}.png").write_bytes(b"damaged")
    os.symlink(tmp_path / "nowhere.png", images / "bee" / "bad7.png")
    out = write(images, tmp_path / "out", "--workers", "2")
    text = capsys.readouterr().out
    assert "left out, because they cannot be read: 8 images" in text
    assert text.count("\n  ") == 6
    assert "and 3 more" in text
    assert "UnidentifiedImageError: cannot identify image file it" in text or "No such file" in text
    assert f"use them with: data=shards data.root={out}" in text
    data = Shards(str(out))
    assert len(data.split("train")) + len(data.split("val")) == 50
    shutil.rmtree(images / "bee")
    for path in images.rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"FOLDER holds no image for train that can be read, from .*ant"):
        write(images, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{images}", "{images}/out"], "OUT .* is not possible: it must not lie in FOLDER"),
        (["{images}", "{images}"], "OUT .* is not possible: it must not lie in FOLDER"),
        (["{images}", "{images}/../full"], "OUT .* is not empty: give a new folder, or delete"),
        (["{images}", "{images}/../full/file"], "OUT .* cannot be written: File exists"),
        (["{images}/nowhere", "{out}"], "^FOLDER .*nowhere does not exist: give the folder with your images"),
        (["{images}/../full", "{out}"], "^FOLDER .* holds no image in .*full: files ending in"),
        (["{images}"], "OUT is missing"),
        (["{images}", "{out}", "--index"], "--index goes without OUT"),
        (["{images}", "{out}", "--size-mb", "0"], "--size-mb 0 is not possible: a number above 0"),
        (
            ["{images}", "{out}", "--size-mb", "much"],
            "--size-mb: invalid float value: 'much'; see harmonize shards --help",
        ),
        (["{images}", "{out}", "--workers", "0"], "--workers 0 is not possible: a number of at least 1"),
        (["{images}", "{out}", "--val-fraction", "1"], r"--val-fraction 1 is not possible: a number in \(0, 1\)"),
        (["{images}", "{out}", "--shuffle-seed", "-1"], "--shuffle-seed -1 is not possible: a number of at least 0"),
        (["{images}", "--index"], r"FOLDER .* holds no shard \(\*.tar, not compressed\)"),
        (["{images}/nowhere", "--index"], "FOLDER .*nowhere is not a folder of shards"),
    ],
)
def test_mistakes_on_the_command_line(images, tmp_path, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(ConfigError, match=message) as caught:
        sharding.main([option.format(images=images, out=tmp_path / "out") for option in options])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(images, tmp_path, monkeypatch, error):
    finish, count = sharding._Writer.finish, itertools.count()

    def stop(self):
        finish(self)
        if next(count) == 3:
            assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == "train-000000.tar"
            raise error

    monkeypatch.setattr(sharding._Writer, "finish", stop)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ConfigError, match=r"No space left|^$"):
        write(images, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        sharding.main(["--help"])
    assert stop.value.code == 0
    assert "--val-fraction" in capsys.readouterr().out


# The order of an epoch


def order(group, at_once, seed=0):
    return grouped_order(torch.tensor(group), at_once, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_groups", "at_once"), [(1, 1), (7, 1), (9, 4), (8, 4), (3, 8), (16, 8)])
def test_an_order_holds_every_image_once_and_few_groups_at_a_time(num_groups, at_once):
    group = torch.arange(num_groups).repeat_interleave(torch.arange(num_groups) % 3 + 5)
    found = order(group.tolist(), at_once)
    assert sorted(found.tolist()) == list(range(len(group)))
    first = {}
    last = {}
    for place, one in enumerate(group[found].tolist()):
        first.setdefault(one, place)
        last[one] = place
    open_at_once = [sum(first[g] <= place <= last[g] for g in range(num_groups)) for place in range(len(group))]
    assert max(open_at_once) <= at_once
    if at_once > 1 and num_groups > 1:  # shared out evenly: no turn is left with one group
        assert len(set(group[found][:5].tolist())) > 1
        assert len(set(group[found][-5:].tolist())) > 1


def test_an_order_is_a_function_of_the_generator_alone():
    group = [i // 5 for i in range(100)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(order(group, 4), order(group, 4))
    assert torch.equal(torch.get_rng_state(), state)
    orders = [order(group, 4, seed) for seed in range(5)]
    assert len({tuple(found.tolist()) for found in orders}) == 5
    assert len({frozenset(torch.tensor(group)[found][:20].tolist()) for found in orders}) > 1  # not only within turns
    assert order([5, 5, 2, 9], 2).shape == (4,)  # numbers without an image do not count
    assert len(order([], 2)) == 0


def test_every_place_in_a_turn_is_as_likely():
    """Two groups at once: which of the four images comes first is as good as drawn with equal chances."""
    first = [int(order([0, 0, 1, 1], 2, seed)[0]) for seed in range(2000)]
    assert np.abs(np.bincount(first, minlength=4) - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@pytest.fixture
def data(tmp_path):
    """120 images in 12 shards, their number as the label."""
    root = tmp_path / "data"
    for shard in range(12):
        members = [
            (f"{i}.{e}", c) for i in range(10) for e, c in (("png", encoded(i)), ("cls", b"%d" % (shard * 10 + i)))
        ]
        tar(root / f"train-{shard:02d}.tar", members)
    tar(root / "val-00.tar", [("0.png", encoded(0)), ("0.cls", b"0")])
    return Shards(str(root), shards_at_once=3)


def module(data, **options):
    settings = {"batch_size": 8, "image_size": 16, "seed": 4} | options
    return DataModule(data, {"simmim": SimMIM(16)}, {"mim": "simmim"}, **settings)


def batches(loader):
    return [[index for _, index in batch] for batch in loader.batch_sampler]


def test_epochs_are_local_whole_and_different(data):
    loader, seen = module(data).train_loader(), []
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        epoch_batches = batches(loader)
        assert len(epoch_batches) == len(loader) == 15
        flat = list(itertools.chain(*epoch_batches))
        assert sorted(flat) == list(range(120))
        assert max(len({index // 10 for index in batch}) for batch in epoch_batches) <= 2 * 3
        assert np.mean([len({index // 10 for index in batch}) for batch in epoch_batches]) > 2
        for turn in range(4):  # three shards of ten images at a time
            assert len({index // 10 for index in flat[turn * 30 : turn * 30 + 30]}) == 3
        seen.append(flat)
    assert len(set(map(tuple, seen))) == 3
    again = module(data).train_loader(epoch=2)
    assert list(itertools.chain(*batches(again))) == seen[2]
    assert list(itertools.chain(*batches(module(data, seed=5).train_loader()))) != seen[0]


def test_other_data_sets_keep_their_order():
    generator = torch.Generator().manual_seed(0)
    expected = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        grouped_order(torch.zeros(20, dtype=torch.int64), 8, generator).sort().values, expected.sort().values
    )
    plain, ordered = (
        EpochBatchSampler(20, 5, 0),
        EpochBatchSampler(20, 5, 0, order=lambda g: torch.randperm(20, generator=g)),
    )
    assert list(plain) == list(ordered)


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_ranks_share_the_same_global_batches(data, world_size, accumulate):
    whole = batches(module(data).train_loader(epoch=1))
    ranks = [
        batches(module(data, world_size=world_size, rank=rank, accumulate=accumulate).train_loader(epoch=1))
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        parts = [rank[step * accumulate : (step + 1) * accumulate] for rank in ranks]
        assert list(itertools.chain(*itertools.chain(*parts))) == expected


def test_resuming_in_mid_epoch_goes_on_where_it_stopped(data):
    whole = list(module(data).train_loader(epoch=1))
    resumed = list(module(data).train_loader(epoch=1, start=6))
    assert len(resumed) == len(whole) - 6 > 0
    for a, b in zip(resumed, whole[6:], strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.views["mim"][0], b.views["mim"][0])


def test_training_on_some_images_stays_local(data):
    chosen = list(range(3, 120, 2))
    loader = module(data, train_indices=chosen, batch_size=5).train_loader()
    found = batches(loader)
    assert len(found) == 11
    flat = list(itertools.chain(*found))
    assert len(set(flat)) == 55
    assert set(flat) < set(chosen)
    assert max(len({index // 10 for index in batch}) for batch in found) <= 6
    everything = list(itertools.chain(*batches(module(data, batch_size=5).train_loader())))
    assert flat == [index for index in everything if index in chosen][:55]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_no_bit(data, num_workers):
    made = []
    for workers in (0, num_workers):
        loader = module(data, num_workers=workers).train_loader()
        made.append([])
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)
            made[-1] += list(loader)
    assert len(made[0]) == 30
    for a, b in zip(*made, strict=True):
        assert torch.equal(a.index, a.label)  # the label of an image is its number
        for x, y in ((a.index, b.index), (a.label, b.label), (a.seed, b.seed)):
            assert torch.equal(x, y)
        assert torch.equal(a.views["mim"][0], b.views["mim"][0])


def test_what_is_measured_comes_from_few_shards(images, tmp_path):
    out = write(images, tmp_path / "out")
    split = Shards(str(out)).split("train")
    assert len(split.shards) > 8
    for num in (1, 3, 10, 20, 45, 99, None):
        found = split.spread(num)
        assert found == split.spread(num)
        assert found == sorted(set(found))
        assert len(found) == min(num or 45, 45)
        touched = {split.name(i).partition(": ")[0] for i in found}
        smallest = min(map(len, split.shards[:-1]))
        assert len(touched) <= min(-(-len(found) // smallest) + 1, len(split.shards))
    assert module(Shards(str(out))).spread("train", 3) == split.spread(3)
    (out / INDEX).unlink()  # now the shards may be in any order
    split = Shards(str(out)).split("train")
    assert split.spread(10) == evenly(45, 10)


# Shards from elsewhere


def test_foreign_shards_are_scanned(tmp_path):
    data = Shards(str(foreign(tmp_path / "in", 3, 10)), val_fraction=0.2)
    assert data.classes == ["0", "1", "2"]
    train, val = data.split("train"), data.split("val")
    assert (len(train), len(val)) == (24, 6)
    found = contents(train) | contents(val)
    assert sorted(found) == [f"{i:05d}.png" for i in range(30)]
    for i in range(30):
        assert found[f"{i:05d}.png"] == ((12, 10), noise(i).tobytes(), i % 3)
    assert np.bincount(val.labels).tolist() == [2, 2, 2]
    again = Shards(str(tmp_path / "in"), val_fraction=0.2)
    assert contents(again.split("val")) == contents(val)


def test_scanning_happens_once(tmp_path, kept, monkeypatch):
    root, scanned = foreign(tmp_path / "in"), []
    monkeypatch.setattr(shards, "scan", lambda path: (scanned.append(path.name), scan(path))[1])
    for _ in range(2):
        assert len(Shards(str(root)).split("train")) == 11
    assert scanned == ["0000.tar", "0001.tar", "0002.tar"]
    foreign(root, 1, 5, "0003.tar", start=20)
    os.utime(root / "0001.tar", (1, 1))
    assert len(Shards(str(root)).split("train")) == 15
    assert scanned[3:] == ["0001.tar", "0003.tar"]
    for path in (kept / "shard_indices").glob("*.json"):
        path.write_text("{}")  # damaged
    assert len(Shards(str(root)).split("train")) == 15
    assert len(scanned) == 9
    assert [path.suffix for path in (kept / "shard_indices").iterdir()].count(".json") == 5
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept in .*HARMONIZE_CACHE"):
        assert len(Shards(str(root)).split("train")) == 15


def test_many_shards_are_scanned_by_processes(tmp_path, kept, monkeypatch):
    root = foreign(tmp_path / "in", 9, 2)
    monkeypatch.setattr(shards.os, "cpu_count", lambda: 2)
    parallel = Shards(str(root)).split("train")
    monkeypatch.setattr(shards.os, "cpu_count", lambda: 1)
    shutil.rmtree(kept)
    assert contents(Shards(str(root)).split("train")) == contents(parallel)


def test_what_makes_a_sample(tmp_path):
    tar(
        tmp_path / "in" / "a.tar",
        [
            ("labels/", b""),
            ("one.cls", b" 1 "),  # the label may come first
            ("one.json", b"{}"),
            ("one.JPG", encoded(1, "JPEG")),
            ("one.png", encoded(9)),  # the first image of a key is taken
            ("deep/er/two.webp", encoded(2, "WEBP")),
            ("deep/two.jpeg", encoded(3, "JPEG")),  # another folder, another key
            ("deep/two.cls", b"0"),
            ("three.seg.png", encoded(4)),  # its ending is .seg.png
            ("four.txt", b"nothing to see"),
            (".hidden.png", encoded(5)),
            ("x" * 150 + ".png", encoded(6)),  # a name that needs further headers
        ],
        format=tarfile.PAX_FORMAT,
    )
    tar(tmp_path / "in" / "b.tar", [("one.png", encoded(7)), ("one.cls", b"-1")], format=tarfile.GNU_FORMAT)
    tar(tmp_path / "in" / "c.tar", [])
    data = Shards(str(tmp_path / "in"), val_fraction=0.01)
    found = [
        (s.name(i)[-40:].rpartition(": ")[2], s.load(i)[1])
        for s in map(data.split, ("train", "val"))
        for i in range(len(s))
    ]
    assert sorted(found) == sorted(
        [("one.JPG", 1), ("deep/er/two.webp", -1), ("deep/two.jpeg", 0), ("x" * 36 + ".png", -1), ("one.png", -1)]
    )
    assert data.classes == ["0", "1"]


def test_one_class_is_no_class(tmp_path):
    tar(tmp_path / "a.tar", [(f"{i}.{e}", c) for i in range(4) for e, c in (("png", encoded(i)), ("cls", b"0"))])
    data = Shards(str(tmp_path))
    assert data.classes is None
    assert data.split("train").labels.tolist() == [-1] * 3


def test_names_and_patterns(tmp_path):
    assert expand("a.tar") == ["a.tar"]
    assert expand("{8..10}-{00..01}.tar") == [f"{i}-0{j}.tar" for i in (8, 9, 10) for j in (0, 1)]
    assert splits_by_name(["x-1.tar", "x-2.tar"]) == {"x-1.tar": "train", "x-2.tar": "train"}
    assert splits_by_name(["set-train-1.tar", "set-val-1.tar"]) == {"set-train-1.tar": "train", "set-val-1.tar": "val"}
    assert splits_by_name(["train1.tar", "test1.tar"]) == {"train1.tar": "train", "test1.tar": "val"}
    for names, message in ((["train-0.tar", "rest.tar"], "unclear, rest.tar"), (["val-0.tar"], "no shard to train on")):
        with pytest.raises(ConfigError, match=message):
            splits_by_name(names)
    root = foreign(tmp_path / "in", 4)
    assert len(Shards(f"{root}/{{0001..0002}}.tar", val_fraction=0.5).split("train")) == 4
    assert len(Shards(f"{root}/0003.tar", val_fraction=0.5).split("val")) == 2
    with pytest.raises(ConfigError, match=r"data.root: .*in does not hold 0004.tar"):
        Shards(f"{root}/{{0001..0005}}.tar")
    with pytest.raises(ConfigError, match="does not hold a shard of that pattern"):
        Shards(f"{root}/{{0003..0001}}.tar")
    foreign(tmp_path / "named", 2, name="train-{}.tar")
    foreign(tmp_path / "named", 1, name="val-{}.tar", start=50)
    foreign(tmp_path / "named", 1, name="test-{}.tar", start=80)
    data = Shards(str(tmp_path / "named"))
    assert (len(data.split("train")), sorted(contents(data.split("val")))) == (8, [f"0005{i}.png" for i in range(4)])


def test_patterns_from_the_working_folder(tmp_path, monkeypatch):
    foreign(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    assert len(Shards("{0000..0001}.tar").split("train")) == 7


def damage(path, kind):
    whole = path.read_bytes()
    with tarfile.open(path) as file:
        third = file.getmembers()[4].offset
    if kind == "cut in an image":
        path.write_bytes(whole[: third + 512 + 40])
    elif kind == "cut in a header":
        path.write_bytes(whole[: third + 100])
    elif kind == "header overwritten":
        path.write_bytes(whole[:third] + b"garbage" + whole[third + 7 :])
    elif kind == "compressed":
        with tarfile.open(path, "w:gz"):
            pass
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"no tar file" * 1000)


KINDS = ["cut in an image", "cut in a header", "header overwritten", "compressed", "empty", "something else"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_shards_are_named(tmp_path, kind):
    root = foreign(tmp_path / "in")
    damage(root / "0001.tar", kind)
    data = Shards(str(root))
    with pytest.raises(
        ConfigError, match=r"data.root holds a shard that cannot be used, .*0001.tar: .*whole, uncompr"
    ) as e:
        data.split("train")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_shards_of_an_index_are_named_at_once(packed, kind):
    damage(packed / "train-000001.tar", kind)
    if kind == "header overwritten":  # same size: found when the image is read
        split = Shards(str(packed)).split("train")
        place = len(split.shards[0]) + 2
        assert split.load(place - 1)
        assert split.load(place)[0].size  # the header's name was overwritten, not its size
        return
    with pytest.raises(
        ConfigError, match=r"data.root: .*train-000001.tar has \d+ bytes, where index.json says \d+ bytes"
    ):
        Shards(str(packed))


def test_an_index_of_other_shards_is_noticed(packed):
    split = Shards(str(packed)).split("train")
    first, second = (packed / f"train-00000{i}.tar" for i in range(2))
    size = first.stat().st_size
    content = second.read_bytes()
    first.write_bytes((bytes(512) + content + bytes(size))[:size])  # all is one block later
    assert Shards(str(packed))
    with pytest.raises(
        WrongData, match=r"data.root: .*train-000000.tar cannot be read: there is no image of \d+ bytes at"
    ):
        split.load(0)
    first.unlink()
    with pytest.raises(WrongData, match=r"train-000000.tar cannot be read: .*No such file"):  # and no image is skipped
        split.load(0)
    with pytest.raises(ConfigError, match=r"train-000000.tar is missing, where index.json says"):
        Shards(str(packed))


def test_a_member_must_have_the_size_that_the_index_says(tmp_path):
    with open(tar(tmp_path / "a.tar", [("0.png", b"12345"), ("1.png", b"123456")]), "rb") as file:
        assert read_member(file, 512, 5) == b"12345"
        assert read_member(file, 512 + 1024, 6) == b"123456"
        for offset, size in ((512, 4), (512, 6), (512 + 1024, 5), (1024, 5), (10**6, 5)):
            with pytest.raises(ValueError, match=f"there is no image of {size} bytes at byte {offset}"):
                read_member(file, offset, size)


def test_links_and_labels_that_are_none_are_named(tmp_path):
    for label in (b"cat", b"", b"1.5", b"-2", b"99999999999"):
        tar(tmp_path / "a.tar", [("0.png", encoded(0)), ("0.cls", label)])
        with pytest.raises(ConfigError, match=r"a.tar: the label 0.cls is '.*', not a whole number from 0"):
            scan(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        info = tarfile.TarInfo("0.png")
        info.type, info.linkname = tarfile.LNKTYPE, "1.png"
        file.addfile(info)
    with pytest.raises(ConfigError, match=r"a.tar: the image 0.png is a link"):
        scan(tmp_path / "a.tar")


def test_shards_without_images_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data.root=.* holds no shard \(\*.tar"):
        Shards(str(tmp_path))
    tar(tmp_path / "a.tar", [("0.txt", b"text"), ("0.cls", b"1")])
    with pytest.raises(ConfigError, match=r"data.root holds 0 images to train on: the members of its shards must be"):
        Shards(str(tmp_path)).split("train")
    tar(tmp_path / "a.tar", [("0.png", encoded(0))])
    with pytest.raises(ConfigError, match=r"holds 1 images to train on"):
        Shards(str(tmp_path)).split("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "data.root=null is not possible: give the folder or the URL"),
        ({"root": "nowhere"}, "data.root=nowhere does not exist: give the folder or the URL"),
        ({"root": "s3://bucket/shards"}, "data.root=s3://bucket/shards is not possible: http, https or a folder"),
        ({"val_fraction": 0}, "data.val_fraction=0 is not possible"),
        ({"shards_at_once": 0}, "data.shards_at_once=0 is not possible"),
        ({"max_pixels": 0}, "data.max_pixels=0 is not possible"),
        ({"shard_cache_gb": 0}, "data.shard_cache_gb=0 is not possible"),
        ({"num_train": 46}, r"data.num_train=46 is not possible: the split holds 45 images"),
    ],
)
def test_impossible_options(packed, options, message):
    with pytest.raises(ConfigError, match=message):
        Shards(**{"root": str(packed)} | options).split("train")


def test_unreadable_images_are_skipped_with_their_name(tmp_path):
    members = [(f"{i}.png", b"damaged" if i == 5 else encoded(i)) for i in range(8)]
    data = Shards(str(tar(tmp_path / "train-0.tar", members).parent), val_fraction=0.2)
    split = data.split("train")
    (place,) = [i for i in range(len(split)) if split.name(i).endswith(": 5.png")]
    with pytest.raises(UnreadableImage, match="cannot identify image file it"):
        split.load(place)
    with pytest.warns(UserWarning, match=r"skipped .*train-0.tar: 5.png, which cannot be read: Unid"):
        (batch,) = module(data, batch_size=len(split)).train_loader()
    assert place not in batch.index.tolist()
    big = Shards(str(tmp_path), max_pixels=100).split("train")
    with pytest.raises(UnreadableImage, match=r"12 x 10 px are more than data.max_pixels=100"):
        big.load(0)


def test_an_index_can_be_made_for_foreign_shards(tmp_path, capsys):
    root = foreign(tmp_path / "in", 3, name="set-train-{}.tar")
    foreign(root, 1, name="set-val-{}.tar", start=12)
    scanned = {name: contents(Shards(str(root)).split(name)) for name in ("train", "val")}
    assert sharding.main([str(root), "--index"]) == 0
    assert "12 images in 3 train shards, 4 images in 1 val shard" in capsys.readouterr().out
    index = index_from_bytes((root / INDEX).read_bytes(), INDEX)
    assert index.classes == ["0", "1", "2"]
    assert not index.shuffled
    for shard in index.shards:
        assert shard.sha256 == hashlib.sha256((root / shard.name).read_bytes()).hexdigest()
    for name in ("train", "val"):
        assert contents(Shards(str(root)).split(name)) == scanned[name]
    with pytest.raises(ConfigError, match=r"has its index.json already"):
        sharding.main([str(root), "--index"])
    (root / INDEX).unlink()
    damage(root / "set-train-1.tar", "cut in an image")
    with pytest.raises(ConfigError, match=r"^FOLDER holds a shard that cannot be used"):
        sharding.main([str(root), "--index"])


def test_shards_beside_the_index_are_noticed(packed):
    foreign(packed, 2, name="new-{}.tar")
    with pytest.warns(UserWarning, match="2 shards in .* are not in its index.json and are left out"):
        assert len(Shards(str(packed)).split("train")) == 45
    with pytest.raises(ConfigError, match=r"index.json does not hold new-0.tar"):
        Shards(f"{packed}/new-{{0..1}}.tar")
    assert len(Shards(f"{packed}/train-{{000000..000001}}.tar").split("train")) < 10


def test_a_split_pickles_small(packed):
    split = Shards(str(packed)).split("train")
    again = pickle.dumps(split)
    assert len(again) < 15_000
    assert contents(pickle.loads(again)) == contents(split)


# index.json from others


def change(packed, **changes):
    plain = json.loads((packed / INDEX).read_text())
    plain["shards"][0] |= {key: value for key, value in changes.items() if key in plain["shards"][0]}
    plain |= {key: value for key, value in changes.items() if key not in plain["shards"][0]}
    (packed / INDEX).write_text(json.dumps(plain))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "harmonize shards 2"},
        {"shards": None},
        {"classes": ["only"]},
        {"name": "../../etc.tar"},
        {"name": "a.txt"},
        {"name": "train-000001.tar"},
        {"samples": 10**12},
        {"samples": -1},
        {"samples": 1},
        {"bytes": 600},
        {"split": "test"},
        {"sha256": "../../../x"},
        {"table": "AAAA"},
        {"table": "eJwDAAAAAAE="},
        {"names": "eJwDAAAAAAE="},
    ],
    ids=str,
)
def test_a_wrong_index_is_named(packed, changes):
    change(packed, **changes)
    with pytest.raises(
        ConfigError, match=r"data.root: .*index.json is not one that `harmonize shards` writes"
    ) as caught:
        Shards(str(packed))
    assert "\n" not in str(caught.value)


def test_a_bomb_is_not_unpacked(packed):
    import base64

    bomb = base64.b64encode(zlib.compress(bytes(200_000_000), 9)).decode()
    for key in ("table", "names"):
        change(packed, **{key: bomb})
        begin = time.process_time()
        with pytest.raises(ConfigError, match="compressed data of a wrong length"):
            Shards(str(packed))
        assert time.process_time() - begin < 0.5


# Behind a URL


class Server:
    """Serves a folder on this machine, badly if asked to.

    Attributes:
        asked: The paths in the order of the requests.
        failures: File name -> what to do instead, once each: a status, ``cut`` or ``hang up``.
        delay: Seconds before each answer.
    """

    def __init__(self, folder):
        self.asked, self.failures, self.delay = [], {}, 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = urllib.parse.urlsplit(self.path).path.lstrip("/")
                outer.asked.append(self.path)
                time.sleep(outer.delay)
                failure = outer.failures[path].pop(0) if outer.failures.get(path) else None
                if failure == "hang up":
                    return
                file = Path(folder) / urllib.parse.unquote(path)
                status = failure if isinstance(failure, int) else 200 if file.is_file() else 404
                content = file.read_bytes() if status == 200 else b"<html>no</html>"
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(content[: len(content) // 2] if failure == "cut" else content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def count(self, ending):
        return sum(path.partition("?")[0].endswith(ending) for path in self.asked)


@pytest.fixture
def server(packed, kept, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(shard_cache, "_PAUSE", 0.01)
    server = Server(packed)
    yield server
    server.server.shutdown()
    server.server.server_close()


def cached(kept):
    return {path.name for path in (kept / "shards").iterdir() if path.suffix not in (".lock",)}


def test_shards_behind_a_url_are_the_same(server, packed, kept):
    for url in (server.url, f"{server.url}/"):
        ours, theirs = Shards(url), Shards(str(packed))
        assert ours.classes == theirs.classes
        assert not (kept / "shards").exists() or url.endswith("/")  # nothing is downloaded before it is needed
        for name in ("train", "val"):
            assert contents(ours.split(name)) == contents(theirs.split(name))
            assert ours.split(name).spread(7) == theirs.split(name).spread(7)
    index = index_from_bytes((packed / INDEX).read_bytes(), INDEX)
    assert cached(kept) == {f"{shard.sha256}.tar" for shard in index.shards}
    assert all(server.count(shard.name) == 1 for shard in index.shards)
    assert server.count(INDEX) == 2
    assert ours.split("train").name(0).startswith(f"{server.url}/train-000000.tar: ")
    assert len(Shards(f"{server.url}/train-{{000000..000001}}.tar").split("train")) < 10


def test_keys_in_a_url_are_used_and_not_shown(server):
    data = Shards(f"{server.url}?key=secret")
    data.split("val").load(0)
    assert server.asked == [f"/{INDEX}?key=secret", "/val-000000.tar?key=secret"]
    assert "secret" not in data.split("val").name(0)
    assert len(Shards(f"{server.url}/train-{{000000..000001}}.tar?key=secret").split("train")) < 10
    with pytest.raises(ConfigError, match=r"has no index.json") as caught:
        Shards(f"{server.url}/elsewhere?key=secret")
    assert "secret" not in str(caught.value)


def limited(server, num, at_once):
    """Shards behind the URL with a cache for the ``num`` largest of them."""
    sizes = sorted((shard.num_bytes for shard in Shards(server.url)._shards.shards), reverse=True)
    limit = sum(sizes[:num])
    return Shards(server.url, shards_at_once=at_once, shard_cache_gb=limit / 1e9), limit


def load_one_of(split, number):
    split.load(sum(len(shard) for shard in split.shards[:number]))


def test_the_cache_is_bounded_and_keeps_what_was_used_last(server, kept):
    data, limit = limited(server, 3, 2)
    split = data.split("train")
    path = {i: kept / "shards" / f"{shard.sha256}.tar" for i, shard in enumerate(split.shards)}
    for number in (0, 1, 2):
        load_one_of(split, number)
        time.sleep(0.02)
    assert all(path[i].exists() for i in (0, 1, 2))
    load_one_of(split, 0)  # used again: now 1 is the oldest
    time.sleep(0.02)
    load_one_of(split, 3)
    assert [i for i in range(4) if path[i].exists()] == [0, 2, 3]
    for number in [*range(len(split.shards)), 0, 5, 3]:
        load_one_of(split, number)
        assert sum(file.stat().st_size for file in (kept / "shards").iterdir()) <= limit
    assert contents(split) == contents(Shards(server.url).split("train"))


def test_a_cache_that_is_too_small_is_refused(server):
    with pytest.raises(
        ConfigError,
        match=r"data.shard_cache_gb=2e-05 is too small: the 8 largest shards take \S+ GB, and data.shards_at_once=8",
    ):
        Shards(server.url, shard_cache_gb=2e-5)
    with pytest.raises(WrongData, match=r"data.shard_cache_gb=1e-06 is too small for http://h/a.tar of 5e-06 GB"):
        shard_cache.ShardCache(1000).open("http://h/a.tar", 5000, "0" * 64)


def read_all(split, queue):
    try:
        queue.put(sorted(contents(split).items()))
    except BaseException as error:
        queue.put(error)
        raise


def test_processes_share_one_download(server):
    server.delay = 0.05
    split, context = Shards(server.url).split("train"), multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_all, args=(split, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1] == results[2] == sorted(contents(split).items())
    assert [server.count(shard.name) for shard in split.shards] == [1] * len(split.shards)


def test_processes_that_do_not_fit_take_turns(server, kept):
    """Room for two shards, four processes that want all of them, each beginning elsewhere."""
    data, limit = limited(server, 2, 2)
    whole, context = contents(Shards(server.url).split("train")), multiprocessing.get_context("fork")
    shutil.rmtree(kept / "shards")
    split, queue, most = data.split("train"), context.Queue(), 0
    positions = [np.roll(np.arange(len(split)), 12 * i) for i in range(4)]
    processes = [context.Process(target=read_all, args=(split.take(p), queue)) for p in positions]
    for process in processes:
        process.start()
    results = []
    while len(results) < 4:
        with contextlib.suppress(Exception):
            results.append(queue.get(timeout=0.01))
        with contextlib.suppress(FileNotFoundError):
            most = max(most, sum(file.stat().st_size for file in (kept / "shards").iterdir()))
    for process in processes:
        process.join()
    assert [dict(result) for result in results] == [whole] * 4
    assert 0 < most <= limit


@pytest.mark.parametrize("failures", [[503, 503], ["cut", "hang up"], [429, "cut", 500]])
def test_a_server_that_fails_for_a_while(server, failures, packed):
    server.failures = {"train-000000.tar": list(failures), INDEX: ["cut", 500]}
    split = Shards(server.url).split("train")
    assert split.load(0)[0].tobytes() == Shards(str(packed)).split("train").load(0)[0].tobytes()
    assert server.count("train-000000.tar") == len(failures) + 1
    assert server.count(INDEX) == 3


def test_a_server_that_always_fails_is_named(server, kept):
    data = Shards(server.url)
    for failure, count, reason in (
        (503, 5, " after 5 attempts: HTTP 503 Service Unavailable"),
        ("cut", 5, r" after 5 attempts: it ended after \d+ of \d+ bytes"),
        (404, 1, ": HTTP 404 Not Found"),
    ):
        server.failures = {"train-000000.tar": [failure] * 9}
        before = server.count("train-000000.tar")
        with pytest.raises(
            WrongData, match=rf"data.root: {server.url}/train-000000.tar cannot be downloaded{reason}"
        ) as e:
            data.split("train").load(0)
        assert "\n" not in str(e.value)
        assert server.count("train-000000.tar") - before == count
    assert cached(kept) == set()  # nothing half done is left
    server.failures = {}
    assert data.split("train").load(0)
    server.failures = {INDEX: [500] * 9}
    with pytest.raises(ConfigError, match=r"index.json cannot be downloaded after 3 attempts: HTTP 500"):
        Shards(server.url)


def test_nobody_answers(kept, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(shard_cache, "_PAUSE", 0.01)
    server = Server("nowhere")
    server.server.server_close()
    with pytest.raises(ConfigError, match=rf"{server.url}/index.json cannot be downloaded after 3 attempts: .*refused"):
        Shards(server.url)
    with pytest.raises(ConfigError, match=r"cannot be downloaded: "):
        Shards("http://a host/shards")


def test_a_url_needs_an_index(server, packed):
    (packed / INDEX).rename(packed / "other")
    with pytest.raises(
        ConfigError,
        match=rf"data.root={server.url} has no index.json \(HTTP 404\), which .*`harmonize shards FOLDER OUT`",
    ):
        Shards(server.url)
    (packed / INDEX).write_text("<html>welcome</html>")
    with pytest.raises(ConfigError, match=rf"{server.url}/index.json is not one that"):
        Shards(server.url)
    (packed / "other").rename(packed / INDEX)
    change(packed, sha256=None)
    assert Shards(str(packed))
    with pytest.raises(ConfigError, match=r"lacks the splits or the SHA-256"):
        Shards(server.url)


def test_another_file_behind_the_url_is_noticed(server, packed, kept):
    split = Shards(server.url).split("train")
    path = packed / "train-000000.tar"
    content = path.read_bytes()
    for other, message in (
        (content[:-1] + b"x", "is not the file that index.json describes"),
        (content + b"x", rf"it is not of {len(content)} bytes, which index.json says"),
        (content[:-1], rf"it is not of {len(content)} bytes"),
    ):
        path.write_bytes(other)
        with pytest.raises(WrongData, match=message):
            split.load(0)
        assert cached(kept) == set()


def test_shards_written_anew_are_downloaded_anew(server, images, packed):
    old = contents(Shards(server.url).split("train"))
    shutil.rmtree(packed)
    write(images, packed, "--shuffle-seed", "3")
    new = Shards(server.url).split("train")
    assert contents(new) == old
    assert contents(new) == contents(Shards(str(packed)).split("train"))


def test_what_a_killed_process_left_is_removed_in_time(server, kept):
    data, limit = limited(server, 2, 2)
    folder = kept / "shards"
    folder.mkdir(parents=True)
    (folder / "x.tar.1.tmp").write_bytes(bytes(limit))
    os.utime(folder / "x.tar.1.tmp", (1, 1))
    load_one_of(data.split("train"), 0)
    assert not (folder / "x.tar.1.tmp").exists()
    (folder / "y.tar.1.tmp").write_bytes(bytes(limit))  # perhaps still at work: it is waited for
    thread = threading.Thread(target=load_one_of, args=(data.split("train"), 1))
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    (folder / "y.tar.1.tmp").unlink()
    thread.join(20)
    assert not thread.is_alive()


def test_a_process_killed_in_a_download_blocks_nobody(server, kept):
    split, context = Shards(server.url).split("train"), multiprocessing.get_context("fork")
    server.delay = 30
    process = context.Process(target=load_one_of, args=(split, 0))
    process.start()
    while server.count("train-000000.tar") == 0:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(cached(kept)) == 1  # its temporary file
    server.delay = 0
    assert split.load(0)
    assert cached(kept) == {f"{split.shards[0].sha256}.tar"}


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "file"))
    with pytest.raises(WrongData, match=r"cannot be kept in .*file.shards: .*HARMONIZE_CACHE"):
        Shards(server.url).split("train").load(0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_behind_a_url(server, packed, num_workers):
    server.failures = {"train-000002.tar": [503]}
    data, _ = limited(server, 3, 2)
    local = module(Shards(str(packed), shards_at_once=2)).train_loader()
    ours = module(data, num_workers=num_workers).train_loader()
    for epoch in range(2):
        for loader in (ours, local):
            loader.batch_sampler.set_epoch(epoch)
        for a, b in zip(ours, local, strict=True):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.label, b.label)
            assert torch.equal(a.views["mim"][0], b.views["mim"][0])
    clean = [
        torch.cat([b.image for b in module(d, num_workers=num_workers).feature_loader("val")])
        for d in (data, Shards(str(packed)))
    ]
    assert torch.equal(*clean)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_sentence_of_a_worker_is_the_sentence(server):
    data = Shards(server.url)
    server.failures = {shard.name: [404] * 9 for shard in data._shards.shards}
    with pytest.raises(WrongData) as caught:
        list(module(data, num_workers=2).train_loader())
    assert str(caught.value).startswith(f"data.root: {server.url}/train-")
    assert "\n" not in str(caught.value)


# Configuration


def test_the_configuration(server, packed):
    with config.composer("train") as conf:

        def mistakes(*overrides):
            cfg = config.finish(conf.load(["data=shards", *overrides]))
            return [*violations(config.to_plain(cfg)), *config._missing_data(cfg)]

        for root in (server.url, packed, f"'{packed}/train-{{000000..000001}}.tar'"):
            assert mistakes(f"data.root={root}") == []
        for overrides, message in (
            ([], "data.root=null is not possible"),
            ([f"data.root={server.url}/elsewhere"], f"data.root={server.url}/elsewhere has no index.json"),
            (["data.shards_at_once=0"], "data.shards_at_once must be a whole number of at least 1, not 0"),
            (["data.shard_cache_gb=0"], "data.shard_cache_gb must be a number above 0, not 0"),
        ):
            assert mistakes(*overrides)[0].startswith(message)
