"""Shape bias of encoders that know one cue, both or neither, and of decisions counted by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from harmonize.data.shapes import SHAPES, TEXTURES, Shapes
from harmonize.evaluation.classifier import linear_head
from harmonize.evaluation.features import feature_width
from harmonize.evaluation.shape_bias import ShapeBias
from harmonize.types import ConfigError, FeatureSpec
from tests.evaluation.benches import Memory, Reader, make_bench, on_ranks, plain, read_level

KINDS = len(SHAPES)
CLASSES = ["circle", "square", "star"]


class ColouredShapes(Shapes):
    """Shapes that are told by their redness, textures by their greenness; blue is noise."""

    def split(self, name):
        return ColouredSplit(super().split(name))


class ColouredSplit:
    def __init__(self, split):
        self.split, self.shapes, self.textures = split, split.shapes, split.textures

    def __len__(self):
        return len(self.split)

    def prepare(self):
        pass

    def load(self, index):
        shape, texture = self.split.factors(index)
        noise = np.random.default_rng(index).integers(KINDS)
        return Image.fromarray(plain([[shape, texture, noise]])[0]), shape

    def name(self, index):
        return self.split.name(index)


def knows(*channels, kinds=KINDS):
    """An encoder whose feature says which levels these colours have, and nothing else."""

    def read(images):
        levels = [torch.nn.functional.one_hot(read_level(images, channel), kinds) for channel in channels]
        return torch.cat(levels, dim=1)

    return Reader(read, kinds * len(channels))


def shape_bias(folder, channels, num_train=216, num_val=96, **options):
    dataset = ColouredShapes(num_train, num_val, image_size=16)
    return ShapeBias().run(make_bench(folder, dataset, knows(*channels), **options))


@pytest.mark.parametrize(("channel", "bias", "shape", "texture"), [(0, 1.0, 1.0, 0.0), (1, 0.0, 0.0, 1.0)])
def test_an_encoder_that_knows_one_cue(tmp_path, channel, bias, shape, texture):
    """The other head answers with what goes along with the known cue in training, which never does in conflict."""
    results = shape_bias(tmp_path, [channel])
    assert [(row.metric, row.value) for row in results] == [
        ("shape_bias", bias), ("shape_accuracy", shape), ("texture_accuracy", texture),
    ]  # fmt: skip
    assert results[0].interval == (bias, bias)
    assert results[0].error is None
    assert all(row.num_images == 96 and row.note.startswith("two linear probes") for row in results)


def test_an_encoder_that_knows_both_cues(tmp_path):
    results = shape_bias(tmp_path, [0, 1])
    assert [row.value for row in results] == [0.5, 1.0, 1.0]


def test_an_encoder_that_knows_neither(tmp_path):
    bias, shape, texture = shape_bias(tmp_path, [2], num_val=600)
    chance = math.sqrt(1 / KINDS * (1 - 1 / KINDS) / 600)
    assert abs(shape.value - 1 / KINDS) < 4 * chance
    assert abs(texture.value - 1 / KINDS) < 4 * chance
    assert abs(bias.value - 0.5) < 4 * 0.5 / math.sqrt(100)
    low, high = bias.interval
    # Of about 100 decisions for either cue half are for the shape: 1.96 standard errors of such a share to each side.
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(600 * (shape.value + texture.value)), rel=0.15)
    assert low < bias.value < high
    for row in (shape, texture):
        assert row.error == pytest.approx(math.sqrt(row.value * (1 - row.value) / 599))


def test_two_ranks_give_what_one_gives(tmp_path):
    ranks = on_ranks(tmp_path / "ranks", lambda: shape_bias(tmp_path / "two", [2], 108, 131))
    assert ranks == [shape_bias(tmp_path / "one", [2], 108, 131)] * 2


def test_as_many_images_as_asked_for(tmp_path):
    results = shape_bias(tmp_path, [0, 1], num_val=96, num_train=108)
    assert {row.num_images for row in shape_bias(tmp_path, [0, 1], num_val=96)} == {96}
    dataset = ColouredShapes(216, 96, image_size=16)
    few = ShapeBias().run(make_bench(tmp_path, dataset, knows(0, 1), num_val=20))
    assert {row.num_images for row in few} == {20}
    assert [row.value for row in few] == [row.value for row in results]


def test_the_head_of_a_checkpoint_cannot_name_both(tmp_path):
    """It names shapes alone, so that two probes are fitted whatever the checkpoint brings."""
    encoder = knows(0)
    head = linear_head(encoder.spec, [FeatureSpec(1, "patch_mean")], torch.zeros(KINDS, KINDS), torch.zeros(KINDS))
    bench = make_bench(tmp_path, ColouredShapes(108, 48, image_size=16), encoder, head=head)
    assert ShapeBias().run(bench)[0].value == 1.0


# ---- a folder in the layout of model-vs-human ----------------------------------------------------------------------


def cue_conflict(root, pairs):
    """SHAPE/SHAPE1-TEXTURE2.png for (shape, texture) pairs; several of one pair get numbers."""
    for number, (shape, texture) in enumerate(pairs):
        folder = root / CLASSES[shape]
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(plain([[shape, texture, number % 3]])[0])
        image.save(folder / f"{CLASSES[shape]}{number}-{CLASSES[texture]}{number}.png")
    return str(root)


def folder_data():
    """Images whose redness tells the class."""
    labels = np.arange(30) % 3
    images = plain(np.stack([labels, labels[::-1], labels * 0], axis=1))
    return Memory((images, labels), (images[:9], labels[:9]), CLASSES)


PAIRS = [(s, t) for s in range(3) for t in range(3) for _ in range(1 + s + 2 * t)]


@pytest.mark.parametrize("sub_folder", ["", "cue-conflict"])
def test_decisions_counted_by_hand(tmp_path, sub_folder):
    encoder = knows(0, 1, kinds=3)
    # How much a cue of each class speaks for that class, and what speaks for it anyhow.
    by_shape, by_texture, anyhow = [3.0, 1.0, 2.5], [2.0, 2.2, 0.5], [0.0, 0.0, 1.0]
    weight = torch.cat([torch.diag(torch.tensor(by_shape)), torch.diag(torch.tensor(by_texture))], dim=1)
    head = linear_head(encoder.spec, [FeatureSpec(1, "patch_mean")], weight, torch.tensor(anyhow), "by hand")
    cue_conflict(tmp_path / "images" / sub_folder, PAIRS)
    bench = make_bench(tmp_path, folder_data(), encoder, head=head)
    results = ShapeBias(str(tmp_path / "images")).run(bench)
    decisions = {"shape": 0, "texture": 0, "neither": 0}
    for s, t in PAIRS:
        scores = [anyhow[c] + by_shape[c] * (s == c) + by_texture[c] * (t == c) for c in range(3)]
        if s != t:
            decision = scores.index(max(scores))
            decisions["shape" if decision == s else "texture" if decision == t else "neither"] += 1
    num = sum(decisions.values())
    assert min(decisions["shape"], decisions["texture"]) > 0
    assert num == sum(s != t for s, t in PAIRS) < len(PAIRS)
    bias, shape, texture = results
    assert bias.value == decisions["shape"] / (decisions["shape"] + decisions["texture"])
    assert (shape.value, texture.value) == (decisions["shape"] / num, decisions["texture"] / num)
    assert {row.num_images for row in results} == {num}
    assert {row.note for row in results} == {"by hand"}
    assert bias.interval[0] < bias.value < bias.interval[1]


def test_a_probe_takes_the_place_of_a_missing_head(tmp_path):
    """Fitted on the training images, whose redness tells the class: it decides for the shape."""
    bench = make_bench(tmp_path, folder_data(), knows(0, kinds=3))
    results = ShapeBias(cue_conflict(tmp_path / "images", PAIRS)).run(bench)
    assert [row.value for row in results] == [1.0, 1.0, 0.0]
    assert results[0].note == "linear probe on 30 training images"
    with pytest.raises(ConfigError, match=r"eval\.head=checkpoint needs a checkpoint with a head for the 3 classes"):
        ShapeBias(str(tmp_path / "images"), head="checkpoint").run(bench)


def test_no_conflict_is_a_sentence(tmp_path):
    bench = make_bench(tmp_path, folder_data(), knows(0, kinds=3))
    root = cue_conflict(tmp_path / "images", [(0, 0), (1, 1)])
    with pytest.raises(ConfigError, match=r"eval\.root=.* holds no image whose shape and texture are of different"):
        ShapeBias(root).run(bench)


def test_no_decision_for_a_cue_is_a_sentence(tmp_path):
    encoder = knows(0, kinds=3)
    width = feature_width(FeatureSpec(1, "patch_mean"), encoder.spec)
    head = linear_head(
        encoder.spec, [FeatureSpec(1, "patch_mean")], torch.zeros(3, width), torch.tensor([0.0, 0.0, 1.0])
    )
    root = cue_conflict(tmp_path / "images", [(0, 1), (1, 0)])
    with pytest.raises(ConfigError, match="No decision is for the shape or the texture"):
        ShapeBias(root).run(make_bench(tmp_path, folder_data(), encoder, head=head))


def test_other_data_have_no_conflict(tmp_path):
    with pytest.raises(ConfigError, match=r"data=shapes has, or eval\.root names a folder"):
        ShapeBias().run(make_bench(tmp_path))
    assert len(TEXTURES) == KINDS
