"""End-to-end fine-tuning: what is trained and scored; it learns, stops, goes on, and leaves the encoder alone."""

from functools import partial
from pathlib import Path

import pytest
import torch

from harmonize.backbones.fine_tuning import trainable_copy
from harmonize.config import compose, instantiate
from harmonize.data.module import DataModule
from harmonize.data.shapes import Shapes
from harmonize.evaluation.base import Bench, frozen
from harmonize.evaluation.classifier import Head
from harmonize.evaluation.fine_tune import Classifier, FineTune, class_scores
from harmonize.functional import distributed
from harmonize.functional.hashing import weights_hash
from harmonize.types import ConfigError, FeatureSpec
from tests.evaluation.benches import killed_after
from tests.helpers import random_batch, tiny_encoder

EASY = {
    "epochs": 2, "batch_size": 16, "lr": 2e-3, "precision": "32", "drop_path": 0.0, "randaugment": None,
    "erasing_prob": 0.0, "crop_scale": [0.5, 1.0], "mixup": 0.0, "cutmix": 0.0, "head_init_std": 0.02,
}  # fmt: skip


class Coloured:
    """Shapes whose colour gives the label away: one of two classes is dark."""

    classes = ("bright", "dark")

    def __init__(self, num=64):
        self.images = Shapes(num_train=num, num_val=num // 2, image_size=16, clutter=0.0)

    def split(self, name):
        return ColouredSplit(self.images.split(name))


class ColouredSplit:
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def load(self, index):
        image, _ = self.images.load(index)
        return image.point(lambda value: value // 3) if index % 2 else image, index % 2

    def name(self, index):
        return self.images.name(index)


def make_bench(folder, dataset=None, encoder=None, **options):
    encoder = (encoder or tiny_encoder()).requires_grad_(False).eval()
    dataset = dataset or Coloured()
    size = encoder.spec.image_size

    def make_data(recipes=None, required_views=None, batch_size=2, **more):
        ranks = {"world_size": distributed.world_size(), "rank": distributed.rank()}
        return DataModule(dataset, recipes or {}, required_views or {}, size, batch_size, **ranks | more)

    settings = {"trainable": partial(trainable_copy, encoder), "batch_size": 16} | options
    return Bench(encoder, make_data, dataset, torch.device("cpu"), 0, Path(folder), Path(folder), **settings)


def test_it_learns_scores_and_keeps(tmp_path):
    kept = []
    bench = make_bench(tmp_path, keep=lambda encoder, head: kept.append((encoder, head)))
    before = weights_hash(bench.encoder.state_dict())
    with frozen(bench.encoder):
        results = FineTune(**EASY | {"epochs": 8}).run(bench)
    assert weights_hash(bench.encoder.state_dict()) == before
    (row,) = results
    assert (row.metric, row.num_images, row.series) == ("top1", 32, "")
    assert row.value > 0.9
    assert row.error == pytest.approx((row.value * (1 - row.value) / 32) ** 0.5)
    assert "pool=patch_mean norm=none" in row.feature
    assert "last of 8 epochs; training loss there 0." in row.note
    ((encoder, head),) = kept
    assert head.classes == ["bright", "dark"]
    assert head.num_classes == 2
    assert weights_hash(encoder.state_dict()) != before
    scores, labels = class_scores(bench, encoder, head, bench.data)
    assert (scores.argmax(1) == labels).double().mean().item() == pytest.approx(
        row.value, abs=0.1
    )  # another clean view


def test_interrupted_it_goes_on_to_the_same_result(tmp_path):
    settings = EASY | {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3, "erasing_prob": 0.5, "ema": 0.9, "epochs": 3}
    settings["randaugment"] = "rand-m9-mstd0.5-inc1"
    kept = []

    def keep(encoder, head):
        kept.append(Classifier(encoder, head).state_dict())

    whole = FineTune(**settings).run(make_bench(tmp_path / "whole", keep=keep))
    assert [row.series for row in whole] == ["", "EMA"]

    with pytest.raises(KeyboardInterrupt):
        FineTune(**settings).run(make_bench(tmp_path / "part", track=killed_after(6)))
    said = []
    resumed = FineTune(**settings).run(make_bench(tmp_path / "part", keep=keep, say=said.append))
    assert said == ["fine_tune: going on after step 4 of 12."]
    assert resumed == whole
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    again = FineTune(**settings).run(make_bench(tmp_path / "part", say=said.append))
    assert again == whole
    FineTune(**settings | {"lr": 1e-3}).run(make_bench(tmp_path / "part", say=said.append))
    assert said[-1] == "fine_tune: what is stored here was trained with other settings; starting anew."


@pytest.mark.parametrize("pool", ["patch_mean", "cls"])
def test_training_and_scoring_see_the_same_network(pool):
    encoder, images = tiny_encoder().eval(), random_batch().image
    spec = FeatureSpec(-1, pool, norm=pool == "cls")
    head = Head(encoder.spec, [spec], 3, norm=pool == "patch_mean").eval()
    torch.nn.init.normal_(head.linear.weight)
    torch.testing.assert_close(Classifier(encoder, head)(images), head.logits(encoder, images))
    *_, tokens = encoder.iter_blocks(images)
    if pool == "cls":
        expected = head.linear(encoder.norm(tokens)[:, 0])
    else:
        expected = head.linear(torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), [24], eps=1e-6))
    torch.testing.assert_close(head.logits(encoder, images), expected)


def test_the_final_norm_is_trained_only_where_it_is_used(tmp_path):
    for pool in ("patch_mean", "cls"):
        kept = []
        bench = make_bench(tmp_path / pool, keep=lambda encoder, head, kept=kept: kept.append((encoder, head)))
        FineTune(**EASY | {"pool": pool, "epochs": 1}).run(bench)
        ((encoder, head),) = kept
        assert torch.equal(encoder.norm.weight, bench.encoder.norm.weight) == (pool == "patch_mean")
        assert isinstance(head.norm, torch.nn.LayerNorm) == (pool == "patch_mean")


def test_the_head_starts_as_it_should(tmp_path):
    bench = make_bench(tmp_path)
    network = FineTune(**EASY | {"head_init_std": 0.02})._network(bench)
    assert network.head.linear.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert not network.head.linear.bias.any()
    again = FineTune(**EASY | {"head_init_std": 0.02})._network(bench)
    assert torch.equal(network.head.linear.weight, again.head.linear.weight)


def test_the_loss_is_that_of_smoothed_and_mixed_targets():
    batch = random_batch(4)
    batch.views["fine_tune"] = (batch.image,)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 2))
    plain = FineTune(**EASY | {"smoothing": 0.2})._loss(2)(network, batch, 0)
    torch.testing.assert_close(
        plain, torch.nn.functional.cross_entropy(network(batch.image), batch.label, label_smoothing=0.2)
    )
    mixed = FineTune(**EASY | {"smoothing": 0.0, "mixup": 0.8})._loss(2)
    values = {mixed(network, batch, seed).item() for seed in (1, 1, 2)}
    assert len(values) == 2
    assert FineTune(**EASY | {"mixup": 0.8, "mix_prob": 0.0, "smoothing": 0.2})._loss(2)(network, batch, 1) == plain


def test_as_many_images_as_asked_for(tmp_path):
    bench = make_bench(tmp_path, num_train=32, num_val=10)
    (row,) = FineTune(**EASY | {"epochs": 1}).run(bench)
    assert row.num_images == 10
    data = FineTune(**EASY)._data(bench)
    assert data.steps_per_epoch == 2
    seen = {i for batch in data.train_loader() for i in batch.index.tolist()}
    assert seen == set(range(0, 64, 2))


def test_a_batch_larger_than_the_training_split_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"eval\.batch_size=16 is too large: there are 12 images"):
        FineTune(**EASY).run(make_bench(tmp_path, num_train=12))


def test_without_a_class_token(tmp_path):
    bench = make_bench(tmp_path, encoder=tiny_encoder(class_token=False))
    with pytest.raises(ConfigError, match="class token"):
        FineTune(**EASY | {"pool": "cls"}).run(bench)
    assert len(FineTune(**EASY | {"epochs": 1}).run(bench)) == 1


def test_a_relative_position_table_for_each_block(tmp_path):
    bench = make_bench(tmp_path, encoder=tiny_encoder(relative_position="shared", positions="none"))
    for per_block, name in ((True, "encoder.blocks.1.rel_pos_bias"), (False, "encoder.rel_pos_bias")):
        names = {n for n, _ in FineTune(**EASY | {"per_block": per_block})._network(bench).named_parameters()}
        assert f"{name}.relative_position_bias_table" in names


@pytest.mark.parametrize(("key", "value"), [("pool", "max"), ("head_init_std", 0.0)])
def test_an_impossible_value_is_a_sentence(key, value):
    with pytest.raises(ConfigError, match=rf"eval\.{key}={value} is not"):
        FineTune(**EASY | {key: value})


OFFICIAL = {
    # peak learning rate, layer decay, stochastic depth, epochs, warm-up, its first and the cosine's last learning rate
    "fine_tune_mae": (2e-3, 0.65, 0.1, 100, 5, 0.0, 1e-6),
    "fine_tune_simmim": (5e-3, 0.65, 0.1, 100, 20, 1e-6, 1e-6),
    "fine_tune_beit": (4e-3, 0.65, 0.1, 100, 20, 1e-6, 1e-6),
    "fine_tune_deit": (1e-3, 1.0, 0.1, 150, 5, 1e-6, 1e-5),
}


@pytest.mark.parametrize("name", [*OFFICIAL, "fine_tune"])
def test_the_recipes_are_the_official_ones(name):
    found = instantiate(compose([f"eval={name}", "checkpoint=x"], "evaluate").eval)
    assert isinstance(found, FineTune)
    if name in OFFICIAL:
        peak, layer_decay, drop_path, epochs, warmup, first, last = OFFICIAL[name]
        assert found.peak_lr == pytest.approx(peak)
        assert (found.layer_decay, found.drop_path, found.epochs, found.warmup_epochs) == (
            layer_decay, drop_path, epochs, warmup,
        )  # fmt: skip
        assert found.lr_at(0, 1000) == pytest.approx(first)
        assert found.lr_at(1000, 1000) == pytest.approx(last)
        assert (found.mixup, found.cutmix, found.smoothing, found.erasing_prob) == (0.8, 1.0, 0.1, 0.25)
        assert (found.clip is not None) == (name == "fine_tune_simmim")
        assert (found.ema is not None) == (name == "fine_tune_deit")
        assert found.pool == ("cls" if name == "fine_tune_deit" else "patch_mean")
