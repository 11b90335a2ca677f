import os
import pickle
import warnings
import zlib

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import move_data_to_device
from PIL import Image
from torchvision.transforms.v2 import functional as F

from harmonize.data import batches as batches_module
from harmonize.data.datasets import ArrayImages, Folder, UnreadableImage
from harmonize.data.module import DataModule, RawBatch
from harmonize.data.shapes import Shapes
from harmonize.data.views import MAE, Evaluation, MoCoV3, SimMIM, augment_image, to_tensor
from harmonize.functional.seeding import mix, mix_int
from harmonize.types import IMAGE_STD, Batch, ConfigError

RECIPES = {"moco_v3": MoCoV3(16), "simmim": SimMIM(16)}
BOTH = {"contrastive": "moco_v3", "mim": "simmim"}


class Noise:
    """Images of noise; those in ``bad`` cannot be read."""

    def __init__(self, num=40, bad=()):
        self.num, self.bad, self.classes = num, set(bad), ["even", "odd"]

    def split(self, name):
        return self

    def __len__(self):
        return self.num

    def name(self, index):
        return f"noise{index}"

    def load(self, index):
        if index in self.bad:
            raise UnreadableImage("it is bad")
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 2


def make(dataset=None, views=BOTH, batch_size=8, **options):
    return DataModule(dataset or Noise(), RECIPES, views, image_size=16, batch_size=batch_size, **options)


def epochs(loader, num=2):
    batches = []
    for epoch in range(num):
        loader.batch_sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert type(a) is type(b)
        a, b = (batch.augment() if isinstance(batch, RawBatch) else batch for batch in (a, b))
        assert a.views.keys() == b.views.keys()
        for name in a.views:
            assert all(torch.equal(x, y) for x, y in zip(a.views[name], b.views[name], strict=True))
        for field in ("label", "index", "seed"):
            assert torch.equal(getattr(a, field), getattr(b, field))


def test_a_training_batch():
    data = make(seed=5)
    assert (data.steps_per_epoch, data.classes) == (5, ["even", "odd"])
    batch = next(iter(data.train_loader(epoch=3)))
    assert len(batch) == 8
    assert {name: [v.shape for v in views] for name, views in batch.views.items()} == {
        "contrastive": [(8, 3, 16, 16)] * 2,
        "mim": [(8, 3, 16, 16)],
    }
    assert batch.image is None
    assert torch.equal(batch.label, batch.index % 2)
    assert batch.seed.tolist() == [mix(5, 3, int(index)).item() for index in batch.index]
    assert len(set(batch.seed.tolist())) == 8


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_change_no_bit_over_epochs(num_workers):
    assert_same(epochs(make(num_workers=num_workers).train_loader()), epochs(make().train_loader()))


def test_views_and_images_differ_between_epochs_and_repeat_with_the_seed():
    first, again, other = (epochs(make(seed=seed).train_loader()) for seed in (0, 0, 1))
    assert_same(first, again)
    views = {}
    for batch in first:
        for index, view in zip(batch.index.tolist(), batch.views["contrastive"][0], strict=True):
            views.setdefault(index, []).append(view)
    assert len(views) == 40
    assert not any(torch.equal(*pair) for pair in views.values())
    assert first[0].index.tolist() != other[0].index.tolist()


def test_a_view_does_not_depend_on_the_other_views():
    both = next(iter(make().train_loader()))
    for name, recipe in BOTH.items():
        alone = next(iter(make(views={name: recipe}).train_loader()))
        assert list(alone.views) == [name]
        assert all(torch.equal(x, y) for x, y in zip(alone.views[name], both.views[name], strict=True))
    renamed = next(iter(make(views={"other": "simmim"}).train_loader()))
    assert not torch.equal(renamed.views["other"][0], both.views["mim"][0])


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 4), (2, 2)])
def test_ranks_and_micro_batches_share_the_same_global_batch(world_size, accumulate):
    whole = next(iter(make(seed=2).train_loader()))
    parts = []
    for rank in range(world_size):
        loader = iter(make(seed=2, world_size=world_size, accumulate=accumulate, rank=rank).train_loader())
        parts += [next(loader) for _ in range(accumulate)]
    for name, views in whole.views.items():
        for i, view in enumerate(views):
            assert torch.equal(torch.cat([part.views[name][i] for part in parts]), view)
    assert torch.equal(torch.cat([part.seed for part in parts]), whole.seed)


def test_resuming_in_mid_epoch_continues_with_the_next_batch():
    assert_same(list(make().train_loader(epoch=1, start=2)), list(make().train_loader(epoch=1))[2:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_global_generators_are_left_alone(num_workers):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(torch.get_rng_state())
        if len(states) == 2:
            data = make(num_workers=num_workers)
            list(data.train_loader())
            list(data.feature_loader("val"))
            assert torch.equal(torch.get_rng_state(), states[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_is_clean_complete_and_in_shards(num_workers):
    dataset = Noise(21)
    whole = list(make(dataset, num_workers=num_workers).feature_loader("val"))
    assert torch.cat([batch.index for batch in whole]).tolist() == list(range(21))
    clean = Evaluation(16, 0.875)
    for index, image in enumerate(torch.cat([batch.image for batch in whole])):
        assert torch.equal(image, clean(dataset.load(index)[0]))
    shards = [make(dataset, num_workers=num_workers, world_size=2, rank=r).feature_loader("val") for r in (0, 1)]
    found = sorted(int(index) for shard in shards for batch in shard for index in batch.index)
    assert found == list(range(21))


def test_features_come_from_evenly_spaced_images():
    data = make()
    assert torch.cat([batch.index for batch in data.feature_loader("train", 8)]).tolist() == [
        0,
        5,
        10,
        15,
        20,
        25,
        30,
        35,
    ]
    assert sum(len(batch) for batch in data.feature_loader("val", 1000)) == 40
    assert sum(len(batch) for batch in data.feature_loader("val")) == 40


def test_features_come_from_the_probe_split_where_there_is_one():
    class Partly(Noise):
        def probe_split(self, name):
            return Noise(5)

    assert sum(len(batch) for batch in make(Partly()).feature_loader("train")) == 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_readable_image_stands_in(num_workers):
    bad = {3, 4, 39}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = epochs(make(Noise(bad=bad), num_workers=num_workers).train_loader(), 1)
    good = epochs(make().train_loader(), 1)
    for ours, theirs in zip(batches, good, strict=True):
        expected = [{3: 5, 4: 5, 39: 0}.get(index, index) for index in theirs.index.tolist()]
        assert ours.index.tolist() == expected
        assert torch.equal(ours.label, ours.index % 2)
        assert torch.equal(ours.seed, theirs.seed)  # the stand-ins are augmented and masked each in their own way
        for i, index in enumerate(theirs.index.tolist()):
            assert torch.equal(ours.views["mim"][0][i], theirs.views["mim"][0][i]) == (index not in bad)


def test_unreadable_images_are_named_once():
    loader = make(Noise(bad={3, 4})).train_loader()
    with pytest.warns(UserWarning, match="skipped") as caught:
        epochs(loader, 2)
    messages = sorted(str(warning.message) for warning in caught)
    assert messages == [f"skipped noise{i}, which cannot be read: it is bad" for i in (3, 4)]


def test_unreadable_images_are_named_once_by_all_workers_of_all_epochs(capfd):
    data = make(Noise(bad={3, 4}), num_workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: os.write(2, f"{message}\n".encode())
        for _ in range(2):
            list(data.feature_loader("val"))
    assert sorted(capfd.readouterr().err.split("\n")) == [
        "",
        *(f"skipped noise{i}, which cannot be read: it is bad" for i in (3, 4)),
    ]


def test_readable_images_are_looked_for_in_silence():
    class Halves(Noise):
        def split(self, name):
            return Noise(bad=range(39) if name == "train" else range(40))

    data = make(Halves())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.check_readable(probes=False)
        with pytest.raises(ConfigError, match=r"40 in a row cannot be read, from noise0: it is bad$"):
            data.check_readable(probes=True)
    with pytest.warns(UserWarning, match="skipped"):  # named when training meets them
        next(iter(data.train_loader()))


@pytest.mark.filterwarnings("ignore:skipped")
def test_evaluation_leaves_unreadable_images_out():
    batches = list(make(Noise(21, bad={0, 9, *range(16, 21)})).feature_loader("val"))
    assert [len(batch) for batch in batches] == [7, 7, 0]
    assert batches[2].image.shape == (0, 3, 16, 16)
    assert batches[2].seed.dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("loader", ["train", "val"])
@pytest.mark.filterwarnings("ignore:skipped")
def test_no_readable_image_is_one_legible_error(num_workers, loader):
    data = make(Noise(bad=range(40)), num_workers=num_workers)
    batches = iter(data.train_loader() if loader == "train" else data.feature_loader("val"))
    with pytest.raises(ConfigError) as error:
        list(batches)
    if num_workers:  # the exception refers to the iterator in a cycle, and workers found by the collector hang for 5 s
        batches._shutdown_workers()
    assert str(error.value).startswith("data.root holds no usable images: 40 in a row cannot be read, from noise")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_thousand_unreadable_images_in_a_row_are_enough():
    with pytest.raises(ConfigError, match="1000 in a row"):
        list(make(Noise(3000, bad=range(2999))).train_loader())


def test_other_errors_are_not_swallowed():
    class Broken(Noise):
        def load(self, index):
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        list(make(Broken()).train_loader())


def test_a_real_folder_with_a_damaged_file(tmp_path):
    for i in range(20):
        Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "05.png").write_bytes(b"damaged")
    data = make(Folder(str(tmp_path)), batch_size=4, num_workers=1)
    assert data.classes is None
    assert all(batch.label.tolist() == [-1] * 4 for batch in data.train_loader())


def test_datasets_of_the_loaders_pickle():
    data = make()
    for loader in (data.train_loader(), data.feature_loader("val")):
        again = pickle.loads(pickle.dumps((loader.dataset, loader.batch_sampler, loader.collate_fn)))
        assert len(again[2](again[0].__getitems__(next(iter(again[1]))))) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8, "world_size": 3}, r"data.batch_size=8 .* multiple of 3 .*3 devices x trainer.accumulate=1"),
        ({"batch_size": 8, "accumulate": 16}, r"data.batch_size=8 .* multiple of 16"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"batch_size": 64}, "data.batch_size=64 .* 40 images"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"eval_crop": 1.5}, "data.eval_crop=1.5"),
        ({"views": {"mim": "none"}}, "views.none .*moco_v3, simmim"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


# ---- fixed lists of images -------------------------------------------------------------------------------------------


class Halves(Noise):
    """Ten training images and a validation split of ``num``; ``labels`` of the latter by position."""

    def __init__(self, num=40, bad=(), labels=None):
        super().__init__(num, bad)
        self.labels = labels

    def split(self, name):
        return Noise(10) if name == "train" else self

    def load(self, index):
        image, label = super().load(index)
        return image, label if self.labels is None else self.labels[index]


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        (1, [0]),
        (3, [0, 7, 14]),
        (5, [0, 4, 8, 13, 17]),
        (22, list(range(22))),
        (30, list(range(22))),
        (None, list(range(22))),
    ],
)
def test_spread_is_even_and_always_the_same(num_images, expected):
    for options in ({}, {"seed": 3}, {"world_size": 2, "rank": 1}):
        data = make(Halves(22), **options)
        assert data.spread("val", num_images) == expected
        assert data.spread("val", num_images) == expected
    assert make(Halves(22)).spread("train", 5) == [0, 2, 4, 6, 8]


def test_spread_takes_from_every_part_of_a_list_that_is_sorted_by_class():
    labels = sorted(range(40), key=lambda i: i % 4)  # ten of each class, one class after the other
    data = make(Halves(labels=[label % 4 for label in labels]))
    (batch,) = data.feature_loader("val", 8)
    assert batch.label.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_positions_and_numbers_name_the_same_images():
    data = make(Halves(21), batch_size=2)
    chosen = data.spread("val", 7)
    by_number, by_position = (list(data.feature_loader("val", images, 3)) for images in (7, chosen))
    assert [batch.index.tolist() for batch in by_position] == [[0, 3, 6], [9, 12, 15], [18]]
    assert_same(by_number, by_position)
    for a, b in zip(by_number, by_position, strict=True):
        assert torch.equal(a.image, b.image)
    (backwards,) = data.feature_loader("val", [20, 4], 3)
    assert sorted(backwards.index.tolist()) == [4, 20]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_ranks_share_a_list_whatever_the_batch(batch_size):
    shares = []
    for rank in (0, 1):
        loader = make(Halves(21), world_size=2, rank=rank).feature_loader("val", [1, 4, 5, 9, 20], batch_size)
        batches = list(loader)
        assert all(len(batch) <= batch_size for batch in batches)
        shares += [i for batch in batches for i in batch.index.tolist()]
    assert sorted(shares) == [1, 4, 5, 9, 20]


def test_by_class_takes_the_first_images_of_the_first_classes():
    data = make(Halves(12, labels=[2, 0, 1, 1, -1, 0, 1, 2, 0, 2, 3, 0]))
    assert data.by_class("val", 2, 2) == [1, 2, 3, 5]
    assert data.by_class("val", 3, 3) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert data.by_class("val", 4, 3) == data.by_class("val", 3, 3)  # class 3 has one image, and is left out
    assert data.by_class("val", 1, 4) == [1, 5, 8, 11]
    assert data.by_class("val", 1, 5) == []


@pytest.mark.filterwarnings("ignore:skipped")
def test_by_class_goes_round_what_cannot_be_read():
    data = make(Halves(8, bad={0, 1}, labels=[0, 1, 0, 1, 0, 1, 0, 1]))
    assert data.by_class("val", 2, 2) == [2, 3, 4, 5]


def test_by_class_reads_no_more_than_it_is_allowed_to():
    read = []

    class Counted(Halves):
        def load(self, index):
            read.append(index)
            return super().load(index)

    data = make(Counted(40))
    assert data.by_class("val", 2, 1, num_read=4) == [0]  # evenly spaced, all of one class
    assert read == [0, 10, 20, 30]


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (20, 12)])
def test_the_clean_view_of_an_encoder_that_is_not_square(size):
    data = DataModule(Halves(5), {}, {}, image_size=size, batch_size=1, eval_crop=1.0)
    (batch,) = data.feature_loader("val", None, 8)
    assert batch.image.shape == (5, 3, *size)
    clean = Evaluation(size, 1.0)
    for index, image in enumerate(batch.image):
        assert torch.equal(image, clean(Halves(5).load(index)[0]))


@pytest.mark.filterwarnings("ignore:skipped")
def test_an_empty_batch_has_the_shape_of_the_others():
    data = DataModule(Halves(4, bad={2, 3}), {}, {}, image_size=(12, 20), batch_size=1)
    full, empty = data.feature_loader("val", None, 2)
    assert full.image.shape == (2, 3, 12, 20)
    assert empty.image.shape == (0, 3, 12, 20)


def test_the_clean_view_keeps_proportions():
    """A white disc on black ground stays round, whatever the sides of the picture and of the view."""
    y, x = np.mgrid[:60, :80]
    disc = np.where((y - 30) ** 2 + (x - 40) ** 2 < 15**2, 255, 0).astype(np.uint8)
    image = Image.fromarray(np.stack([disc] * 3, axis=-1))
    for size in ((32, 32), (32, 48), (48, 32)):
        view = Evaluation(size, 1.0)(image)[0]
        white = view > view.mean()
        height, width = white.any(1).sum().item(), white.any(0).sum().item()
        assert abs(height - width) <= 1
        assert height > 10


# ---- labelled training -----------------------------------------------------------------------------------------------


class Partly(Noise):
    """40 images without labels, and 20 others with labels."""

    def probe_split(self, name):
        return Noise(20)

    def load(self, index):
        return super().load(index)[0], -1


def test_labelled_training_is_about_the_labelled_images():
    data = make(Partly(), labelled=True)
    assert (data.num_train, data.steps_per_epoch) == (20, 2)
    batches = list(data.train_loader())
    assert len(batches) == 2
    for batch in batches:
        assert torch.equal(batch.label, batch.index % 2)
        assert batch.index.max() < 20
    assert make(Partly()).num_train == 40
    assert_same(list(make(Noise(20), labelled=True).train_loader()), batches)


def test_labelled_training_needs_labels():
    dataset = Noise()
    dataset.classes = None
    assert make(dataset).num_train == 40
    with pytest.raises(ConfigError, match="data has no labels, or one class"):
        make(dataset, labelled=True)


def test_training_on_some_images():
    chosen = [30, 2, 3, 5, 7, 8, 11, 13, 39]
    data = make(train_indices=chosen, batch_size=4, seed=3)
    assert (data.num_train, data.steps_per_epoch) == (9, 2)
    batches = epochs(data.train_loader(), 6)
    seen = [batch.index.tolist() for batch in batches]
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert len(set(first + second)) == 8
    assert {index for batch in seen for index in batch} == set(chosen)
    assert all(torch.equal(batch.label, batch.index % 2) for batch in batches)
    # an image is augmented by its position in the split, whatever else is trained on
    everything = {}
    for batch in make(seed=3).train_loader():
        everything |= dict(zip(batch.index.tolist(), batch.views["mim"][0], strict=True))
    for batch in batches[:2]:
        for index, view in zip(batch.index.tolist(), batch.views["mim"][0], strict=True):
            assert torch.equal(view, everything[index])
    assert_same(list(make(train_indices=range(40)).train_loader()), list(make().train_loader()))
    assert sum(len(batch) for batch in data.feature_loader("train")) == 40


def test_ranks_share_the_images_that_are_trained_on():
    chosen = list(range(0, 40, 2))
    seen = []
    for rank in (0, 1):
        for batch in make(train_indices=chosen, batch_size=10, world_size=2, rank=rank).train_loader():
            assert len(batch) == 5
            seen += batch.index.tolist()
    assert sorted(seen) == chosen
    whole = list(make(train_indices=chosen, batch_size=10).train_loader(epoch=1, start=1))
    assert_same(whole, list(make(train_indices=chosen, batch_size=10).train_loader(epoch=1))[1:])


@pytest.mark.filterwarnings("ignore:skipped")
def test_what_is_held_out_does_not_stand_in():
    chosen = [1, 3, 4, 20, 21, 38, 39, 0]
    batches = epochs(make(Noise(bad={3, 4, 39}), train_indices=chosen).train_loader(), 3)
    for batch in batches:
        assert sorted(batch.index.tolist()) == sorted([1, 20, 20, 20, 21, 38, 0, 0])
        assert torch.equal(batch.label, batch.index % 2)
    data = make(Noise(bad=set(chosen)), train_indices=chosen)
    with pytest.raises(ConfigError, match="8 in a row cannot be read, from noise0"):
        data.check_readable(probes=False)


@pytest.mark.parametrize("indices", [[], [-1, 2], [1, 40], [3, 3]])
def test_impossible_training_images_are_named(indices):
    with pytest.raises(ConfigError, match="train_indices is not possible: different positions from 0 to 39 are needed"):
        make(train_indices=indices, batch_size=1)


def test_the_interpolation_of_the_clean_view():
    for interpolation in ("bilinear", "bicubic"):
        (batch,) = make(eval_interpolation=interpolation).feature_loader("val", [7], 1)
        assert torch.equal(batch.image[0], Evaluation(16, 0.875, interpolation)(Noise().load(7)[0]))
    assert not torch.equal(batch.image[0], Evaluation(16, 0.875, "bilinear")(Noise().load(7)[0]))
    with pytest.raises(ConfigError, match=r"data.eval_interpolation=nearest is not known"):
        make(eval_interpolation="nearest")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clean_views_of_any_images(num_workers):
    split, seen = Noise(11, bad=()), []
    for rank in (0, 1):
        data = make(world_size=2, rank=rank, num_workers=num_workers)
        for batch in data.loader_of(split, 3):
            assert torch.equal(batch.label, batch.index % 2)
            assert all(
                torch.equal(image, Evaluation(16, 0.875)(split.load(int(index))[0]))
                for image, index in zip(batch.image, batch.index, strict=True)
            )
            seen += batch.index.tolist()
    assert sorted(seen) == list(range(11))
    (batch,) = make().loader_of(split, 8, [9, 2], eval_crop=1.0)
    assert batch.index.tolist() == [9, 2]
    assert torch.equal(batch.image[1], Evaluation(16, 1.0)(split.load(2)[0]))


# ---- where images are augmented --------------------------------------------------------------------------------------

THREE = RECIPES | {"mae": MAE(16)}
ALL = {"contrastive": "moco_v3", "mim": "simmim", "other": "mae"}


class Array(Noise):
    """Noise of one size, as an array, which can be had without Pillow."""

    def __init__(self, num=40, size=(20, 24)):
        super().__init__(num)
        pixels = np.random.default_rng(0).integers(0, 256, (num, *size, 3), dtype=np.uint8)
        self.images = ArrayImages(pixels, [index % 2 for index in range(num)], "noise")

    def split(self, name):
        return self.images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with smooth and with sharp parts, no two of one size."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        rng = np.random.default_rng(number)
        size = (17 + 5 * number % 60, 20 + 7 * number % 50)
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse) + rng.normal(0, 25, (size[1], size[0], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / f"{number:02d}.png")
    return Folder(str(root), val_fraction=0.1)


def assert_alike(raw, batch):
    """The same batch; of a thousand pixels one may be further off than one grey level (solarised on the other side)."""
    assert isinstance(raw, RawBatch)
    assert isinstance(batch, Batch)
    augmented = raw.augment()
    assert augmented.views.keys() == batch.views.keys()
    for name, views in batch.views.items():
        for ours, theirs in zip(augmented.views[name], views, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            levels = (ours - theirs).abs() * 255 * torch.tensor(IMAGE_STD)[:, None, None]
            assert (levels > 1.01).float().mean() < 1e-3
    for field in ("label", "index", "seed"):
        assert torch.equal(getattr(augmented, field), getattr(batch, field))
    assert len(raw) == len(batch) == len(augmented)


@pytest.mark.parametrize("kind", ["shapes", "array", "files"])
@pytest.mark.filterwarnings("error:no cache")
def test_the_device_makes_the_views_that_workers_make(kind, folder):
    shapes = Shapes(num_train=40, num_val=8, image_size=24, seed=3)
    dataset, per_batch = {"shapes": (shapes, 20), "array": (Array(), 20), "files": (folder, 10)}[kind]
    by_place = {
        place: epochs(DataModule(dataset, THREE, ALL, 16, per_batch, augment=place, seed=7).train_loader(), 2)
        for place in ("device", "workers")
    }
    assert len(by_place["device"]) == 4
    for raw, batch in zip(*by_place.values(), strict=True):
        assert_alike(raw, batch)
        whole = isinstance(raw.pixels, torch.Tensor)
        assert whole == (kind != "files")  # images of one size are cropped on the device
        pixels = [raw.pixels] if whole else [view for views in raw.pixels.values() for view in views]
        assert all(view.dtype == torch.uint8 for view in pixels)


def test_workers_apply_the_parameters_that_are_drawn():
    dataset = Noise()
    batch = next(iter(make(dataset, seed=2, augment="workers").train_loader(epoch=5)))
    for name, recipe in BOTH.items():
        seeds = mix(2, 5, batch.index, zlib.crc32(name.encode()))
        drawn = RECIPES[recipe].draw(seeds, torch.full((8,), 20), torch.full((8,), 24))
        for view, parameters in zip(batch.views[name], drawn, strict=True):
            for row, index in enumerate(batch.index.tolist()):
                assert torch.equal(view[row], augment_image(dataset.load(index)[0], parameters, row))


def test_files_are_cropped_by_pillow_before_they_go_to_the_device(folder):
    raw = next(iter(DataModule(folder, RECIPES, BOTH, 16, 8, augment="device").train_loader()))
    split = folder.split("train")
    images = [split.load(index)[0] for index in raw.index.tolist()]
    size = torch.tensor([(image.height, image.width) for image in images]).unbind(1)
    for name, recipe in BOTH.items():
        drawn = RECIPES[recipe].draw(mix(0, 0, raw.index, zlib.crc32(name.encode())), *size)
        for number, (pixels, parameters) in enumerate(zip(raw.pixels[name], drawn, strict=True)):
            assert pixels.shape == (8, 3, 16, 16)
            assert raw.augmentations[name][number].box.tolist() == [[0, 0, 16, 16]] * 8
            for row, image in enumerate(images):
                box = parameters.box[row].tolist()
                assert torch.equal(pixels[row], F.pil_to_tensor(F.resized_crop(image, *box, [16, 16])))


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("kind", ["array", "files"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_workers_change_no_bit_of_what_the_device_gets(kind, num_workers, folder):
    dataset = {"array": Array(), "files": folder}[kind]
    options = {"augment": "device", "batch_size": 8}
    with_workers = make(dataset, num_workers=num_workers, **options).train_loader()
    assert with_workers.num_workers == (0 if kind == "array" else num_workers)  # an array need only be copied
    assert_same(epochs(with_workers), epochs(make(dataset, **options).train_loader()))


@pytest.mark.parametrize("place", ["device", "workers"])
def test_ranks_resumes_and_other_views_change_no_bit(place, folder):
    whole = list(make(folder, batch_size=8, augment=place).train_loader(epoch=1))
    parts = [
        list(make(folder, batch_size=8, augment=place, world_size=2, rank=r).train_loader(epoch=1)) for r in (0, 1)
    ]
    first, second = (iter(loader) for loader in parts)
    for batch in whole:
        batch, *halves = (b.augment() if place == "device" else b for b in (batch, next(first), next(second)))
        for name, views in batch.views.items():
            for number, view in enumerate(views):
                assert torch.equal(torch.cat([half.views[name][number] for half in halves]), view)
    assert_same(list(make(folder, batch_size=8, augment=place).train_loader(epoch=1, start=1)), whole[1:])
    alone = next(iter(make(folder, {"mim": "simmim"}, 8, augment=place).train_loader(epoch=1)))
    alone, batch = (b.augment() if place == "device" else b for b in (alone, whole[0]))
    assert torch.equal(alone.views["mim"][0], batch.views["mim"][0])


@pytest.mark.parametrize("place", ["device", "workers"])
def test_a_batch_of_large_images_is_worked_on_in_parts(place, folder, monkeypatch):
    whole = epochs(make(folder, augment=place).train_loader())
    for pixels in (1, 4000):
        monkeypatch.setattr(batches_module, "_PIXELS_AT_ONCE", pixels)
        assert_same(epochs(make(folder, augment=place).train_loader()), whole)


@pytest.mark.filterwarnings("ignore:skipped")
def test_stand_ins_have_the_parameters_of_the_image_asked_for_drawn_for_their_own_size():
    class Sizes(Noise):
        def load(self, index):
            image, label = super().load(index)
            return image.resize((20 + index, 60 - index)), label

    good, bad = Sizes(), Sizes(bad={3, 4, 39})
    for asked, *by_place in zip(
        make(good, seed=1).train_loader(),
        make(bad, seed=1, augment="device").train_loader(),
        make(bad, seed=1, augment="workers").train_loader(),
        strict=True,
    ):
        assert_alike(*by_place)
        raw, batch = by_place
        used = [{3: 5, 4: 5, 39: 0}.get(index, index) for index in asked.index.tolist()]
        assert raw.index.tolist() == batch.index.tolist() == used
        assert raw.seed.tolist() == batch.seed.tolist() == mix(1, 0, asked.index).tolist()
        seeds = mix(1, 0, asked.index, zlib.crc32(b"mim"))
        (drawn,) = RECIPES["simmim"].draw(seeds, 60 - batch.index, 20 + batch.index)
        for row, index in enumerate(used):
            assert torch.equal(batch.views["mim"][0][row], augment_image(good.load(index)[0], drawn, row))


@pytest.mark.parametrize(
    ("dataset", "augment", "on_gpu", "on_device"),
    [
        (Noise(), "auto", False, False),
        (Noise(), "auto", True, True),
        (Noise(), "device", False, True),
        (Noise(), "workers", True, False),
        (Array(), "auto", False, True),
        (Array(), "auto", True, True),
        (Array(), "workers", True, False),
        (Shapes(num_train=40, num_val=8, image_size=16), "auto", False, True),
        (Shapes(num_train=40, num_val=8, image_size=16, cache=False), "auto", False, False),
        (Shapes(num_train=40, num_val=8, image_size=16, cache=False), "auto", True, True),
    ],
)
def test_where_images_are_augmented(dataset, augment, on_gpu, on_device):
    batch = next(iter(make(dataset, augment=augment, on_gpu=on_gpu).train_loader()))
    assert isinstance(batch, RawBatch if on_device else Batch)


def noisy(image):
    """A recipe without parameters: everything random comes from torch's generator."""
    return to_tensor(image), torch.rand(3, 4, 4)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_any_function_of_an_image_is_a_recipe(num_workers):
    recipes, views = RECIPES | {"own": noisy}, {"own": "own", "mim": "simmim"}
    options = {"num_workers": num_workers, "on_gpu": True, "seed": 4}
    batch = next(iter(DataModule(Array(), recipes, views, 16, 8, **options).train_loader(epoch=2)))
    assert isinstance(batch, Batch)
    for row, index in enumerate(batch.index.tolist()):
        assert torch.equal(batch.views["own"][0][row], to_tensor(Array().split("train").load(index)[0]))
        torch.manual_seed(mix_int(4, 2, index, zlib.crc32(b"own")))
        assert torch.equal(batch.views["own"][1][row], torch.rand(3, 4, 4))
    drawn_alone = next(iter(make(Array(), {"mim": "simmim"}, augment="workers", seed=4).train_loader(epoch=2)))
    assert torch.equal(batch.views["mim"][0], drawn_alone.views["mim"][0])
    with pytest.raises(ConfigError, match=r"data.augment=device is not possible: the recipe own does not say"):
        DataModule(Array(), recipes, views, 16, 8, augment="device")
    DataModule(Array(), recipes, {"mim": "simmim"}, 16, 8, augment="device")  # what is not needed does not matter


@pytest.mark.parametrize("dataset", [Noise(), Array()])
def test_lightning_moves_a_raw_batch_as_one_thing(dataset):
    raw = next(iter(make(dataset, augment="device").train_loader()))
    moved = move_data_to_device(raw, torch.device("meta"))
    assert isinstance(moved, RawBatch)
    pixels = moved.pixels if isinstance(dataset, Array) else moved.pixels["contrastive"][1]
    assert {tensor.device.type for tensor in (pixels, moved.label, moved.index, moved.seed)} == {"meta"}
    assert moved.augmentations["contrastive"][0].box.device.type == "cpu"
    assert_same([raw.apply(torch.clone)], [raw])


def test_unknown_places_are_named():
    with pytest.raises(ConfigError, match=r"data.augment=gpu is not known: auto, workers or device"):
        make(augment="gpu")


# ---- clean views of arrays -------------------------------------------------------------------------------------------


class NoPillow(ArrayImages):
    """An array whose images cannot be had one at a time."""

    def load(self, index):
        raise AssertionError("through Pillow")


@pytest.mark.parametrize("size", [(16, 16), (24, 24)])
def test_clean_views_that_change_nothing_are_copies(size):
    data = Array(21, size)
    through_pillow = torch.stack([Evaluation(size[0], 1.0)(data.images.load(index)[0]) for index in range(21)])
    quick = NoPillow(data.images.images, data.images.labels, "noise").take(np.arange(20, -1, -1))
    loader = DataModule(Noise(), {}, {}, size[0], 8, num_workers=2, eval_crop=1.0).loader_of(quick, 8)
    batches = list(loader)
    assert loader.num_workers == 0
    assert torch.equal(torch.cat([batch.image for batch in batches]), through_pillow.flip(0))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(21))
    assert torch.cat([batch.label for batch in batches]).tolist() == [index % 2 for index in range(20, -1, -1)]
    slow = type("Slow", (), {name: getattr(data.images, name) for name in ("__len__", "load", "name")})
    slow.__len__ = lambda self: 21
    through_load = list(DataModule(Noise(), {}, {}, size[0], 8, eval_crop=1.0).loader_of(slow(), 8))
    for ours, theirs in zip(batches, through_load, strict=True):
        assert torch.equal(ours.seed, theirs.seed)
        assert ours.image.is_contiguous()


@pytest.mark.parametrize(
    ("size", "view", "eval_crop"), [((16, 16), 16, 0.875), ((16, 16), 20, 1.0), ((12, 20), (12, 20), 1.0)]
)
def test_other_clean_views_of_arrays_are_made_by_pillow(size, view, eval_crop):
    data = Array(5, size)
    (batch,) = DataModule(data, {}, {}, view, 5, eval_crop=eval_crop).feature_loader("val", None, 8)
    clean = Evaluation(view, eval_crop)
    for index, image in enumerate(batch.image):
        assert torch.equal(image, clean(data.images.load(index)[0]))


def test_clean_views_of_shapes_are_the_same_with_and_without_a_cache():
    found = []
    for cache in (True, False):
        dataset = Shapes(num_train=24, num_val=12, image_size=16, cache=cache)
        found.append(list(DataModule(dataset, {}, {}, 16, 4, eval_crop=1.0, num_workers=1).feature_loader("val")))
    for ours, theirs in zip(*found, strict=True):
        for field in ("image", "label", "index", "seed"):
            assert torch.equal(getattr(ours, field), getattr(theirs, field))
