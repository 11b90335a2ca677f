import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from harmonize.data.datasets import Folder, UnreadableImage
from harmonize.data.module import DataModule
from harmonize.data.views import Evaluation, MoCoV3, SimMIM
from harmonize.functional.seeding import mix
from harmonize.types import ConfigError

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
        assert len(again[2]([again[0][next(iter(again[1]))[0]]])) == 1


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
