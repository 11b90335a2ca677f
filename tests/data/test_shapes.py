import multiprocessing
import pickle
import time
from collections import Counter

import numpy as np
import pytest
import torch

from harmonize.data import cache as cache_module
from harmonize.data import shapes as shapes_module
from harmonize.data import silhouettes, textures
from harmonize.data.cache import RenderedCache
from harmonize.data.datasets import ArraySplit
from harmonize.data.shapes import HELD_OUT, NUM_KINDS, SHAPES, TEXTURES, Shapes, draw, render
from harmonize.types import ConfigError


@pytest.fixture(scope="module")
def shapes():
    return Shapes(num_train=600, num_val=240)


def pixels(split, index):
    return np.asarray(split.load(index)[0])


def pairs(split):
    return {split.factors(i) for i in range(len(split))}


def test_at_least_twelve_of_each():
    assert len(SHAPES) == len(TEXTURES) == NUM_KINDS >= 12


def test_an_image_depends_on_seed_split_and_index_alone(shapes):
    train = shapes.split("train")
    backwards = {i: pixels(train, i) for i in reversed(range(20))}
    for index in range(20):
        np.testing.assert_array_equal(pixels(train, index), backwards[index])
    # neither on how many images there are, nor on the label, nor on the process that renders it
    other = pickle.loads(pickle.dumps(Shapes(num_train=50, label="texture").split("train")))
    assert all((pixels(other, i) == backwards[i]).all() for i in range(20))
    assert not (pixels(shapes.split("val"), 0) == backwards[0]).all()
    assert not (pixels(Shapes(seed=1).split("train"), 0) == backwards[0]).all()


def test_worker_processes_render_the_same(shapes):
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.from_numpy(pixels(shapes.split("train"), index).copy())

    loader = torch.utils.data.DataLoader(Images(), batch_size=5, num_workers=2)
    assert all((a == b).all() for a, b in zip(torch.cat(list(loader)), Images(), strict=False))


def test_train_and_val_share_no_image(shapes):
    train = {pixels(shapes.split("train"), i).tobytes() for i in range(600)}
    val = {pixels(shapes.split("val"), i).tobytes() for i in range(240)}
    assert len(train) == 600
    assert len(val) == 240
    assert not train & val


@pytest.mark.parametrize("num", [5, 12, 100, 108, 600])
def test_any_first_images_are_balanced(shapes, num):
    train = shapes.split("train")
    for factor in (0, 1):
        counts = Counter(train.factors(i)[factor] for i in range(num))
        assert max(counts.values()) - min(counts.get(k, 0) for k in range(NUM_KINDS)) <= 1


def test_conflict_pairs_never_occur_in_training(shapes):
    train, val, conflict = (pairs(shapes.split(name)) for name in ("train", "val", "conflict"))
    assert train == val
    assert not train & conflict
    assert len(train | conflict) == NUM_KINDS**2
    assert len(conflict) == NUM_KINDS * len(HELD_OUT)
    for factor in (0, 1):  # every shape and every texture occurs in training, equally often
        assert set(Counter(pair[factor] for pair in train).values()) == {NUM_KINDS - len(HELD_OUT)}


@pytest.mark.parametrize(("label", "factor", "classes"), [("shape", 0, SHAPES), ("texture", 1, TEXTURES)])
def test_the_label_is_the_chosen_factor(label, factor, classes):
    dataset = Shapes(num_train=24, num_val=24, label=label)
    assert dataset.classes == classes
    for name in ("train", "val", "conflict"):
        split = dataset.split(name)
        for index in range(24):
            image, value = split.load(index)
            assert (image.mode, image.size) == ("RGB", (64, 64))
            assert value == split.factors(index)[factor]
            assert classes[value] in split.name(index)


def test_the_mask_is_where_the_texture_changes_the_image():
    """The same scene with another texture differs on the object and nowhere else."""
    for index in range(36):
        scene = draw(0, 0, index)
        image, mask = render(scene, index % NUM_KINDS, 0, 64)
        other, _ = render(scene, index % NUM_KINDS, 3, 64)
        changed = (image != other).any(-1)
        # edges are smooth: they reach a little further than the mask
        near = torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None].float(), 7, 1, 3)[0] > 0
        assert not (changed & ~near.numpy()).any()
        assert changed[mask].mean() > 0.5


def test_mask_values(shapes):
    split = shapes.split("val")
    for index in range(24):
        mask = split.mask(index)
        assert (mask.dtype, tuple(mask.shape)) == (torch.int64, (64, 64))
        assert set(mask.unique().tolist()) == {0, 1 + split.factors(index)[0]}
        assert 0.04 < (mask > 0).float().mean() < 0.7


def test_the_same_scene_at_every_size(shapes):
    large = Shapes(image_size=128).split("train")
    for index in range(12):
        small_image = pixels(shapes.split("train"), index).astype(float)
        large_image = pixels(large, index).astype(float).reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.corrcoef(small_image.ravel(), large_image.ravel())[0, 1] > 0.85
        overlap = (shapes.split("train").mask(index) > 0) == (large.mask(index)[::2, ::2] > 0)
        assert overlap.float().mean() > 0.95


def test_all_textures_have_one_histogram():
    for table in textures.height_tables(256):
        uniform = (np.arange(table.size) + 0.5) / table.size
        assert np.abs(np.sort(table.ravel()) - uniform).max() < 0.05  # Kolmogorov's distance


def test_textures_are_periodic():
    for name, table in zip(TEXTURES, textures.height_tables(256), strict=True):
        for a in (table, table.T):
            inner = np.abs(a[1:] - a[:-1]).mean(1)
            assert np.abs(a[0] - a[-1]).mean() <= 1.01 * inner.max(), name


def test_signed_distances_have_unit_slope_at_the_outline():
    size = 256
    for name, table in zip(SHAPES, silhouettes.distance_tables(size), strict=True):
        slope = np.hypot(*np.gradient(table, 2 * silhouettes.EXTENT / size))
        assert np.median(slope[np.abs(table) < 0.05]) == pytest.approx(1, abs=0.02), name
        assert (table < 0).mean() * (2 * silhouettes.EXTENT) ** 2 == pytest.approx(silhouettes.AREA, rel=0.02), name
        assert (table[[0, -1]] > 0.2).all(), name
        assert (table[:, [0, -1]] > 0.2).all(), name


def test_colour_says_nothing_about_the_labels(shapes):
    """Mean colours of the classes differ by no more than chance allows (one-way analysis of variance)."""
    train = shapes.split("train")
    mean = np.array([pixels(train, i).mean((0, 1)) for i in range(600)])
    for factor in (train.shapes, train.textures):
        means = np.stack([mean[factor == k].mean(0) for k in range(NUM_KINDS)])
        f = 50 * means.var(0, ddof=1) / mean.var(0)
        assert (f < 2.5).all()  # F(11, 588): 2.5 has a probability of 0.4 %


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, "data.num_train=0"),
        ({"num_train": None}, "data.num_train=None"),
        ({"num_val": -1}, "data.num_val=-1"),
        ({"num_val": 2.5}, "data.num_val=2.5"),
        ({"image_size": 8}, "data.image_size=8"),
        ({"image_size": True}, "data.image_size=True"),
        ({"label": "colour"}, "data.label=colour must be shape or texture"),
        ({"seed": -1}, "data.dataset.seed=-1"),
    ],
)
def test_bad_arguments_name_their_key(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Shapes(**arguments)


def test_unknown_split_and_index(shapes):
    with pytest.raises(ValueError, match="train, val, conflict"):
        shapes.split("test")
    for index in (600, -1):
        with pytest.raises(IndexError, match=f"image {index} of"):
            shapes.split("train").load(index)


def test_rendering_is_no_bottleneck(shapes):
    """At least 2,000 images/s on a free core; a quarter of that here, since tests share their cores."""
    split = shapes.split("train")
    rates = []
    for _ in range(5):
        start = time.process_time()
        for index in range(100):
            split.load(index)
        rates.append(100 / (time.process_time() - start))
    assert max(rates) > 500


# ---- the cache ---------------------------------------------------------------------------------------------------


SMALL = {"num_train": 30, "num_val": 20, "image_size": 24, "label": "shape", "clutter": 0.5, "seed": 2}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(cache):
    return sorted(cache.glob("*.pixels"))


@pytest.mark.parametrize("name", ["train", "val", "conflict"])
def test_the_cache_holds_what_would_be_rendered(cache, name):
    cached, rendered = (Shapes(**SMALL, cache=on).split(name) for on in ("auto", False))
    assert isinstance(cached, ArraySplit)
    before = [pixels(cached, index) for index in range(len(cached))]  # nothing is built before prepare
    assert not cache.exists()
    assert not cached.in_memory
    cached.prepare()
    rendered.prepare()
    assert (cached.in_memory, rendered.in_memory, len(files(cache))) == (True, False, 1)
    again = pickle.loads(pickle.dumps(cached))
    every = np.arange(len(cached))[::-1]
    for split in (cached, rendered, again):
        together = split.pixels(every)
        assert (together.dtype, together.shape) == (np.uint8, (len(every), 24, 24, 3))
        for index, image in zip(every.tolist(), together, strict=True):
            np.testing.assert_array_equal(image, before[index])
            np.testing.assert_array_equal(pixels(split, index), before[index])
            assert split.load(index)[1] == split.labels[index]
    assert len(pickle.dumps(cached)) < 10_000


def test_masks_are_rendered_and_belong_to_the_cached_images(cache):
    cached, rendered = (Shapes(**SMALL, cache=on).split("train") for on in (True, False))
    cached.prepare()
    for index in range(12):
        assert torch.equal(cached.mask(index), rendered.mask(index))
        image, mask = cached.load_with_mask(index)
        np.testing.assert_array_equal(np.asarray(image), pixels(cached, index))
        assert torch.equal(mask, rendered.mask(index))


def test_every_argument_makes_a_cache_of_its_own_but_the_label(cache):
    def prepare(name="train", **changes):
        Shapes(**SMALL | changes).split(name).prepare()
        return len(files(cache))

    assert prepare() == prepare() == prepare(label="texture") == prepare(num_val=21) == 1
    assert prepare("val") == 2
    assert prepare("conflict") == 3
    for count, change in enumerate(({"num_train": 31}, {"image_size": 25}, {"clutter": 0.6}, {"seed": 3}), 4):
        assert prepare(**change) == count


def test_another_renderer_makes_another_cache(cache, monkeypatch):
    Shapes(**SMALL).split("train").prepare()
    monkeypatch.setattr(shapes_module, "DARKNESS", 0.3)
    split = Shapes(**SMALL).split("train")
    split.prepare()
    assert len(files(cache)) == 2
    np.testing.assert_array_equal(pixels(split, 17), pixels(Shapes(**SMALL, cache=False).split("train"), 17))


def test_a_cache_is_kept_only_if_it_is_small(cache, monkeypatch):
    assert 20_000 * 3 * 64**2 < shapes_module.LARGEST_CACHE == 2**32
    monkeypatch.setattr(shapes_module, "LARGEST_CACHE", 25 * 3 * 24**2)
    for split, cached in (("train", "auto"), ("val", "auto"), ("train", True), ("val", False)):
        shapes = Shapes(**SMALL, cache=cached).split(split)
        shapes.prepare()
        assert shapes.in_memory == ((split, cached) in (("val", "auto"), ("train", True)))
    with pytest.raises(ConfigError, match=r"data.cache=sometimes must be auto, true or false"):
        Shapes(cache="sometimes")


def prepare_in_a_process(results):
    build = RenderedCache._build
    built = []
    RenderedCache._build = lambda self, path: (built.append(path), time.sleep(0.5), build(self, path))
    split = Shapes(**SMALL).split("train")
    split.prepare()
    results.put((len(built), split.pixels(np.arange(30)).tobytes()))


def test_two_processes_at_once_build_it_once(cache):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=prepare_in_a_process, args=(results,)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert sorted(built for built, _ in found) == [0, 1]
    assert found[0][1] == found[1][1] == Shapes(**SMALL, cache=False).split("train").pixels(np.arange(30)).tobytes()
    assert sorted(file.suffix for file in cache.iterdir()) == [".lock", ".pixels"]


def test_several_processes_build_the_same_cache(cache, monkeypatch):
    expected = Shapes(**SMALL, cache=False).split("train").pixels(np.arange(30))
    monkeypatch.setattr(RenderedCache, "_per_process", 8)
    monkeypatch.setattr(cache_module.os, "cpu_count", lambda: 2)
    split = Shapes(**SMALL).split("train")
    split.prepare()
    np.testing.assert_array_equal(split.pixels(np.arange(30)), expected)


def test_without_a_writable_folder_images_are_rendered(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "file" / "cache"))
    split, rendered = (Shapes(**SMALL, cache=on).split("train") for on in (True, False))
    with pytest.warns(UserWarning, match="no cache of rendered images in .*HARMONIZE_CACHE.*data.cache=false"):
        split.prepare()
    assert not split.in_memory
    np.testing.assert_array_equal(split.pixels(np.arange(30)), rendered.pixels(np.arange(30)))


def test_an_interrupted_rendering_leaves_nothing_behind(cache, monkeypatch):
    def stop(image):
        raise KeyboardInterrupt

    split = Shapes(**SMALL).split("train")
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            split.prepare()
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    split.prepare()
    assert split.in_memory
