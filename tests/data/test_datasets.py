import io
import os
import pickle
import time
import warnings

import numpy as np
import pytest
import torchvision
from PIL import Image

from harmonize.data import cache as cache_module
from harmonize.data.cache import DecodedCache
from harmonize.data.datasets import (
    CIFAR10,
    CIFAR100,
    STL10,
    ArraySplit,
    Dataset,
    Folder,
    ImageNet,
    ImageNet100,
    OpenClipart,
    Split,
)
from harmonize.data.images import UnreadableImage, read_image, walk_images
from harmonize.data.splits import stratified_order
from harmonize.types import ConfigError


def save(path, size=(8, 6), colour=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def classes(tmp_path):
    """Three classes of 20, 10 and 2 images."""
    root = tmp_path / "images"
    for name, num in {"ant": 20, "bee": 10, "cat": 2}.items():
        for i in range(num):
            save(root / name / f"{i:02d}.png", colour=(i, 0, 0))
    return root


# Reading files


def test_transparent_images_are_put_on_white(tmp_path):
    half = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 128))
    half.save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert np.abs(pixels[0, 1].astype(int) - 127).max() <= 1  # 128/255 black on white


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb_of_the_same_grey(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 255 * 257, np.uint16))
    else:
        image = Image.new("L", (4, 4), 255).convert(mode)
    image.save(tmp_path / "a.tiff")
    assert np.asarray(read_image(tmp_path / "a.tiff")).tolist() == np.full((4, 4, 3), 255).tolist()


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((2, 2), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, 0].tolist() == [100, 100, 100]


def test_palette_with_transparency_is_put_on_white(tmp_path):
    image = Image.new("P", (2, 2), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "a.png"))[:, :, 0].tolist() == [[255, 255], [255, 9]]


def test_reduced_reading_keeps_the_aspect_ratio_and_never_enlarges(tmp_path):
    wide = save(tmp_path / "wide.png", size=(100, 50))
    strip = save(tmp_path / "strip.png", size=(1000, 10))
    tiny = save(tmp_path / "tiny.png", size=(3, 5))
    assert read_image(wide, shorter_side=20).size == (40, 20)
    assert read_image(strip, shorter_side=20).size == (60, 1)
    assert read_image(tiny, shorter_side=20).size == (3, 5)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_damaged_files_are_unreadable(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "a.png")


def test_truncated_and_missing_files_are_unreadable(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue()[:-900])
    for name in ("a.jpg", "missing.jpg"):
        with pytest.raises(UnreadableImage):
            read_image(tmp_path / name)


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    Image.new("1", (20_000, 12_000)).save(tmp_path / "bomb.png")  # more than PIL's own limit as well
    limit, begin = Image.MAX_IMAGE_PIXELS, time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImage, match=r"20000 x 12000 px are more than data.max_pixels=100000000"):
            read_image(tmp_path / "bomb.png")
    assert time.perf_counter() - begin < 1
    assert limit == Image.MAX_IMAGE_PIXELS


def test_walk_ignores_hidden_and_other_files_and_survives_link_loops(tmp_path):
    save(tmp_path / "a" / "1.PNG")
    save(tmp_path / ".hidden" / "2.png")
    save(tmp_path / "a" / ".3.png")
    (tmp_path / "a" / "notes.txt").write_text("x")
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.symlink(tmp_path / "a" / "1.PNG", tmp_path / "a" / "link.png")
    assert sorted(walk_images(tmp_path)) == ["a/1.PNG", "a/link.png"]
    assert sorted(walk_images(tmp_path, skip_links=True)) == ["a/1.PNG"]
    save(tmp_path / "b" / "c" / "4.png")
    os.symlink(tmp_path / "b" / "c", tmp_path / "b" / "c" / "again")
    assert len(list(walk_images(tmp_path))) == 4  # a/1, a/link, b/c/4 and once more through the link


# Splitting


def test_stratified_order_holds_classes_in_proportion():
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels, np.random.default_rng(0).permutation(100))
    assert sorted(order) == list(range(100))
    assert set(labels[order[:3]]) == {0, 1, 2}
    for num in (20, 50, 90):
        count = np.bincount(labels[order[:num]])
        assert np.abs(count - np.array([0.6, 0.3, 0.1]) * num).max() <= 1.5


def test_hold_out_is_disjoint_complete_and_the_same_each_time(classes):
    splits = [Folder(str(classes)).split for _ in range(2)]
    train, val = splits[0]("train"), splits[0]("val")
    names = [{split.name(i) for i in range(len(split))} for split in (train, val)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 32
    assert len(val) == 3
    assert set(val.labels) == {0, 1, 2} == set(train.labels)
    assert names[1] == {splits[1]("val").name(i) for i in range(3)}


def test_hold_out_does_not_depend_on_where_the_folder_is(classes, tmp_path):
    before = [os.path.relpath(Folder(str(classes)).split("val").name(i), classes) for i in range(3)]
    moved = classes.rename(tmp_path / "moved")
    assert [os.path.relpath(Folder(str(moved)).split("val").name(i), moved) for i in range(3)] == before


def test_a_class_of_one_image_stays_in_training(tmp_path):
    for name in ("a/1", "a/2", "a/3", "b/1"):
        save(tmp_path / f"{name}.png")
    data = Folder(str(tmp_path), val_fraction=0.9)
    assert data.split("train").labels.tolist() == [1]
    assert data.split("val").labels.tolist() == [0, 0, 0]


def test_num_train_takes_nested_subsets_with_every_class(classes):
    names = []
    for num in (4, 9):
        split = Folder(str(classes), num_train=num, num_val=2).split("train")
        assert len(split) == num
        assert set(split.labels) == {0, 1, 2}
        names.append({split.name(i) for i in range(num)})
    assert names[0] < names[1]


@pytest.mark.parametrize("num", [0, -1, 30])
def test_impossible_subsets_are_refused(classes, num):
    with pytest.raises(ConfigError, match=f"data.num_train={num} .* 29 images"):
        Folder(str(classes), num_train=num).split("train")


# Folder


def test_folder_of_classes(classes):
    save(classes / ".cache" / "x.png")
    data = Folder(str(classes))
    assert isinstance(data, Dataset)
    assert data.classes == ["ant", "bee", "cat"]
    split = data.split("train")
    assert isinstance(split, Split)
    assert not isinstance(split, ArraySplit)
    for i in range(len(split)):
        image, label = split.load(i)
        folder, file = split.name(i).split(os.sep)[-2:]
        assert data.classes[label] == folder
        assert image.getpixel((0, 0)) == (int(file[:2]), 0, 0)
    again = pickle.loads(pickle.dumps(split))
    assert [again.name(i) for i in range(len(again))] == [split.name(i) for i in range(len(split))]


@pytest.mark.parametrize("val", ["val", "test"])
def test_folder_with_train_and_val(tmp_path, val):
    for name in ("train/a/1", "train/b/1", f"{val}/b/2"):
        save(tmp_path / f"{name}.png")
    data = Folder(str(tmp_path))
    assert data.classes == ["a", "b"]
    assert len(data.split("train")) == 2
    assert data.split("val").labels.tolist() == [1]


def test_val_must_have_the_classes_of_train(tmp_path):
    for name in ("train/a/1", "train/b/1", "val/c/2"):
        save(tmp_path / f"{name}.png")
    with pytest.raises(ConfigError, match=r"data.root=.*val has the class folder c"):
        Folder(str(tmp_path))
    (tmp_path / "val" / "c" / "2.png").rename(tmp_path / "val" / "2.png")
    with pytest.raises(ConfigError, match=r"data.root=.*val has no class folders"):
        Folder(str(tmp_path))


@pytest.mark.parametrize("layout", ["{}", "only/{}", "train/{}", "only/deep/{}"])
def test_flat_folders_and_single_classes_have_no_labels(tmp_path, layout):
    for i in range(10):
        save(tmp_path / f"{layout.format(i)}.png")
    data = Folder(str(tmp_path))
    assert data.classes is None
    assert len(data.split("train")) == 9
    assert data.split("val").load(0)[1] == -1


def test_loose_images_beside_classes_are_mentioned(classes):
    save(classes / "loose.png")
    data = Folder(str(classes))
    with pytest.warns(UserWarning, match="1 images in .* beside the class folders"):
        assert len(data.split("train")) == 29


def test_missing_and_empty_folders_are_named_at_once(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match=r"data.root=null"):
        Folder(None)
    with pytest.raises(ConfigError, match=r"data.root=.*nowhere does not exist"):
        Folder(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"data.root=.*notes.txt is not a folder"):
        Folder(str(tmp_path / "notes.txt"))
    with pytest.raises(ConfigError, match=r"data.root=.* holds no image .*\.png"):
        Folder(str(tmp_path))
    with pytest.raises(ConfigError, match="apt install openclipart-png"):
        OpenClipart(str(tmp_path / "nowhere"))
    assert time.perf_counter() - begin < 1


def test_openclipart_leaves_out_second_names(classes):
    os.symlink(classes / "ant" / "00.png", classes / "bee" / "ant.png")
    assert sum(len(OpenClipart(str(classes)).split(name)) for name in ("train", "val")) == 32
    assert sum(len(Folder(str(classes)).split(name)) for name in ("train", "val")) == 33


# Cache


def test_cache_gives_the_reduced_images_and_remembers_the_unreadable(classes, tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))
    save(classes / "ant" / "00.png", size=(60, 40), colour=(1, 2, 3))
    (classes / "bee" / "03.png").write_bytes(b"damaged")
    data = Folder(str(classes), cache=True, image_size=10)
    seen = {}
    for split in (data.split("train"), data.split("val")):
        split.prepare()
        for i in range(len(split)):
            try:
                seen["/".join(split.name(i).split(os.sep)[-2:])] = split.load(i)[0]
            except UnreadableImage as error:
                seen["/".join(split.name(i).split(os.sep)[-2:])] = str(error)
    assert seen["ant/00.png"].size == (30, 20)  # twice image_size
    assert seen["ant/00.png"].getpixel((5, 5)) == (1, 2, 3)
    assert seen["ant/07.png"].size == (8, 6)
    assert seen["ant/07.png"].getpixel((0, 0)) == (7, 0, 0)
    assert "cannot identify" in seen["bee/03.png"]
    assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".lock", ".npz", ".pixels"]


def test_cache_is_built_once_per_listing_and_parameters(classes, tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))
    built = []
    build = DecodedCache._build
    monkeypatch.setattr(DecodedCache, "_build", lambda self, path: (built.append(path), build(self, path)))
    for size, expected in ((10, 1), (10, 1), (20, 2)):
        Folder(str(classes), cache=True, cache_size=size).split("val").load(0)
        assert len(set(built)) == len(built) == expected
    os.utime(classes / "ant" / "00.png", (1, 1))
    Folder(str(classes), cache=True, cache_size=20).split("val").load(0)
    assert len(set(built)) == 3


def test_cache_built_by_several_processes_is_the_same(tmp_path, monkeypatch):
    for i in range(70):
        save(tmp_path / "images" / f"{i:02d}.png", size=(5 + i, 9), colour=(i, i, i))
    contents = []
    for processes in (1, 2):
        monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / f"cache{processes}"))
        monkeypatch.setattr(cache_module.os, "cpu_count", lambda processes=processes: processes)
        Folder(str(tmp_path / "images"), cache=True, cache_size=8).split("train").prepare()
        contents.append([file.read_bytes() for file in sorted((tmp_path / f"cache{processes}").glob("*.pixels"))])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 1


def test_an_interrupted_build_leaves_nothing_behind(classes, tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    split = Folder(str(classes), cache=True, cache_size=8).split("train")
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_decode", stop)
        with pytest.raises(KeyboardInterrupt):
            split.prepare()
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    split.prepare()
    assert split.load(0)[0].size == (8, 6)


def test_without_a_writable_cache_the_pixels_are_the_same(classes, tmp_path, monkeypatch):
    save(classes / "ant" / "00.png", size=(60, 40), colour=(1, 2, 3))
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))
    cached = Folder(str(classes), cache=True, cache_size=10).split("train")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "file" / "cache"))
    direct = Folder(str(classes), cache=True, cache_size=10).split("train")
    with pytest.warns(UserWarning, match="no cache of decoded images in .*HARMONIZE_CACHE"):
        direct.prepare()
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))
    for i in range(len(cached)):
        assert cached.load(i)[0].tobytes() == direct.load(i)[0].tobytes()


def test_a_cached_split_pickles_as_a_path(classes, tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))
    split = Folder(str(classes), cache=True, cache_size=8).split("train")
    expected = split.load(3)[0].tobytes()
    again = pickle.dumps(split)
    assert len(again) < 5000
    assert pickle.loads(again).load(3)[0].tobytes() == expected


def test_a_cache_is_for_those_who_ask(classes):
    for cache, expected in ((False, None), ("auto", None), (True, 20)):
        assert Folder(str(classes), cache=cache, image_size=10).cache_side == expected
    with pytest.raises(ConfigError, match=r"data.cache=2 is not known: auto, true or false"):
        Folder(str(classes), cache=2)


# Sets in the formats of their authors


def assert_pixels_are_those_of_load(split):
    assert isinstance(split, ArraySplit)
    chosen = np.array([3, 0, len(split) - 1, 3])
    pixels = split.pixels(chosen)
    assert pixels.dtype == np.uint8
    for image, label, index in zip(pixels, split.labels[chosen], chosen, strict=True):
        expected, expected_label = split.load(int(index))
        assert np.array_equal(image, np.asarray(expected))
        assert label == expected_label


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Write CIFAR-10 and CIFAR-100 with a few images; torchvision's list of MD5 sums is replaced."""
    rng = np.random.default_rng(0)
    arrays = {}

    def batch(folder, file, num, key):
        pixels = rng.integers(0, 256, (num, 3072), dtype=np.uint8)
        labels = [i % 10 for i in range(num)]
        arrays[file] = pixels
        with open(folder / file, "wb") as out:
            pickle.dump({"data": pixels, key: labels}, out)

    for source, key in ((torchvision.datasets.CIFAR10, "labels"), (torchvision.datasets.CIFAR100, "fine_labels")):
        folder = tmp_path / source.base_folder
        folder.mkdir()
        for file, _ in source.train_list:
            batch(folder, file, 12, key)
        for file, _ in source.test_list:
            batch(folder, file, 10, key)
        with open(folder / source.meta["filename"], "wb") as out:
            pickle.dump({source.meta["key"]: [f"class{i}" for i in range(10)]}, out)
        monkeypatch.setattr(source, "train_list", [[file, None] for file, _ in source.train_list])
        monkeypatch.setattr(source, "test_list", [[file, None] for file, _ in source.test_list])
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": None})
    return tmp_path, arrays


@pytest.mark.parametrize(("kind", "first", "num"), [(CIFAR10, "data_batch_1", 60), (CIFAR100, "train", 12)])
def test_cifar(cifar, kind, first, num):
    root, arrays = cifar
    data = kind(str(root))
    assert isinstance(data, Dataset)
    assert data.classes == [f"class{i}" for i in range(10)]
    split = data.split("train")
    assert (len(split), len(data.split("val"))) == (num, 10)
    image, label = split.load(3)
    assert label == 3
    assert np.array_equal(np.asarray(image), arrays[first][3].reshape(3, 32, 32).transpose(1, 2, 0))
    assert_pixels_are_those_of_load(split)
    small = kind(str(root), num_train=10).split("train")
    assert_pixels_are_those_of_load(small)
    assert sorted(small.labels) == list(range(10))


def test_damaged_cifar_is_named(cifar):
    root, _ = cifar
    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"data.root=.*damaged files of CIFAR-10"):
        CIFAR10(str(root)).split("train")


@pytest.mark.parametrize(
    ("kind", "archive"),
    [(CIFAR10, "cifar-10-python"), (CIFAR100, "cifar-100-python"), (STL10, "stl10_binary")],
)
def test_missing_archives_say_how_to_get_them(tmp_path, kind, archive):
    with pytest.raises(ConfigError, match=rf"data.root=.*unpack {archive}.tar.gz \(http.*data.download=true"):
        kind(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data.root=null .*data.download=true"):
        kind(None)


def test_download_is_left_to_torchvision_and_waits_for_the_first_use(tmp_path, monkeypatch, cifar):
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))
    calls = []

    class Source(torchvision.datasets.CIFAR10):
        def download(self):
            calls.append(self.root)
            os.rename(tmp_path / self.base_folder, os.path.join(self.root, self.base_folder))

    monkeypatch.setattr(CIFAR10, "_source", Source)
    (tmp_path / "new").mkdir()
    data = CIFAR10(str(tmp_path / "new"), download=True)
    assert calls == []
    assert len(data.split("train")) == 60
    assert calls == [str(tmp_path / "new")]
    assert len(CIFAR10(str(tmp_path / "new"), download=True).split("val")) == 10
    assert len(calls) == 1


@pytest.fixture
def stl(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    arrays = {}
    for name, num in {"train": 20, "test": 6, "unlabeled": 7}.items():
        pixels = np.random.default_rng(num).integers(0, 256, (num, 3, 96, 96), dtype=np.uint8)  # channel, column, row
        arrays[name] = pixels
        pixels.tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(num) % 10 + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("".join(f"class{i}\n" for i in range(10)))
    return tmp_path, arrays


def test_stl10_trains_without_labels_and_probes_with_them(stl):
    root, arrays = stl
    data = STL10(str(root))
    assert data.classes == [f"class{i}" for i in range(10)]
    assert [len(data.split("train")), len(data.split("val")), len(data.probe_split("train"))] == [7, 6, 20]
    image, label = data.split("train").load(2)
    assert label == -1
    assert image.getpixel((5, 9)) == tuple(arrays["unlabeled"][2, :, 5, 9])
    assert data.split("val").load(4)[1] == 4
    for split in (data.split("train"), data.split("val"), STL10(str(root), split="train", num_train=10).split("train")):
        assert_pixels_are_those_of_load(split)
    assert data.probe_split("train").load(13)[1] == 3
    assert len(STL10(str(root), split="train", num_train=10).split("train")) == 10
    assert len(pickle.dumps(data.split("train"))) < 5000


def test_stl10_agrees_with_torchvision(stl, monkeypatch):
    root, _ = stl
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    for name in ("train", "unlabeled"):
        ours, theirs = STL10(str(root), split=name).split("train"), torchvision.datasets.STL10(str(root), name)
        for i in range(len(theirs)):
            assert (ours.load(i)[0].tobytes(), ours.load(i)[1]) == (theirs[i][0].tobytes(), theirs[i][1])


def test_stl10_refuses_what_it_does_not_know(stl):
    root, _ = stl
    with pytest.raises(ConfigError, match=r"data.split=all is not known: unlabeled or train"):
        STL10(str(root), split="all")
    with open(root / "stl10_binary" / "test_X.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match=r"data.root=.*damaged .*test_X.bin"):
        STL10(str(root)).split("val")


@pytest.fixture
def imagenet(tmp_path):
    for name in ("n01", "n02", "n03"):
        for i in range(4):
            save(tmp_path / "train" / name / f"{name}_{i}.JPEG")
        save(tmp_path / "val" / name / f"ILSVRC2012_val_{name}.JPEG")
    return tmp_path


def test_imagenet(imagenet):
    data = ImageNet(str(imagenet), num_train=6)
    assert data.classes == ["n01", "n02", "n03"]
    assert np.bincount(data.split("train").labels).tolist() == [2, 2, 2]
    assert data.split("val").labels.tolist() == [0, 1, 2]
    for name in ("train", "nowhere"):
        with pytest.raises(ConfigError, match=r"data.root=.*ILSVRC2012_img_train.tar"):
            ImageNet(str(imagenet / name))


def test_imagenet100_reads_its_class_list(imagenet):
    (imagenet / "list.txt").write_text("# chosen\nn03 a fish\nn01\n\n")
    data = ImageNet100(str(imagenet), str(imagenet / "list.txt"))
    assert data.classes == ["n01", "n03"]
    assert len(data.split("train")) == 8
    assert [data.classes[label] for label in data.split("val").labels] == ["n01", "n03"]
    assert "n03" in data.split("val").name(1)
    assert len(ImageNet100(str(imagenet), str(imagenet / "list.txt"), num_train=2).split("train")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data.class_list=.*list.txt cannot be read"),
        ("", "data.class_list=.*holds 0 names"),
        ("n01\nn01\nn02\n", "data.class_list=.*holds 3 names, 2 of them different"),
        ("n01\nn99\n", "data.class_list=.*1 classes that have no images in .*train: n99"),
    ],
)
def test_bad_class_lists_are_named(imagenet, content, message):
    if content is not None:
        (imagenet / "list.txt").write_text(content)
    with pytest.raises(ConfigError, match=message):
        ImageNet100(str(imagenet), str(imagenet / "list.txt"))


def test_imagenet100_needs_a_class_list(imagenet):
    with pytest.raises(ConfigError, match=r"data.class_list=null"):
        ImageNet100(str(imagenet), None)
