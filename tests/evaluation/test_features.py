"""The frozen feature: what it is, in which mode, of which images, on how many ranks."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from harmonize.evaluation.features import FeatureCollector, extract, pooled_features, resolve
from harmonize.types import ConfigError, FeatureSpec
from tests.helpers import random_batch, tiny_encoder


def part(batch, rows):
    return replace(batch, image=batch.image[rows], label=batch.label[rows], index=batch.index[rows])


@pytest.mark.parametrize("layer", [1, 2, -1])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("pool", ["cls", "patch_mean", "cls_patch_mean"])
def test_the_feature_is_what_its_name_says(layer, norm, pool):
    encoder = tiny_encoder(num_registers=2).eval()
    images = random_batch().image
    tokens = list(encoder.iter_blocks(images))[layer - 1 if layer > 0 else layer]
    tokens = encoder.final_norm(tokens) if norm else tokens
    parts = {"cls": tokens[:, 0], "patch_mean": tokens[:, 3:].mean(1)}
    expected = torch.cat([parts[p] for p in ("cls", "patch_mean") if p in pool], dim=1)
    torch.testing.assert_close(pooled_features(encoder, images, [FeatureSpec(layer, pool, norm)])[0], expected)


def test_the_default_feature_ends_the_forward_pass():
    encoder, batch = tiny_encoder().eval(), random_batch()
    expected = encoder(batch.image)[:, 0]
    torch.testing.assert_close(pooled_features(encoder, batch.image, [FeatureSpec(pool="cls")])[0], expected)


def test_without_a_class_token():
    encoder = tiny_encoder(class_token=False)
    assert resolve(FeatureSpec(), encoder.spec).pool == "patch_mean"
    with pytest.raises(ConfigError, match=r"feature\.pool=cls .* patch_mean"):
        resolve(FeatureSpec(pool="cls"), encoder.spec)


@pytest.mark.parametrize(("spec", "message"), [(FeatureSpec(layer=3), "1 ... 2"), (FeatureSpec(pool="max"), "one of")])
def test_a_feature_that_does_not_exist(spec, message):
    with pytest.raises(ConfigError, match=message):
        resolve(spec, tiny_encoder().spec)


def test_train_mode_is_refused():
    encoder = tiny_encoder(drop_path=0.5).eval()
    encoder.blocks[1].train()
    with pytest.raises(RuntimeError, match="eval mode"):
        extract(encoder, [random_batch()], [FeatureSpec()], "cpu")


def test_half_precision_around_it_changes_nothing():
    encoder, batch = tiny_encoder().eval(), random_batch()
    expected = pooled_features(encoder, batch.image, [FeatureSpec()])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = pooled_features(encoder, batch.image, [FeatureSpec()])[0]
    assert actual.dtype == torch.float32
    assert actual.equal(expected)
    assert not actual.requires_grad


def test_order_and_doubles():
    encoder, batch = tiny_encoder().eval(), random_batch(6)
    whole = extract(encoder, [batch], [FeatureSpec()], "cpu")[0]
    loader = [part(batch, [5, 2]), part(batch, [0, 1, 2]), part(batch, [4, 3])]
    pieces = extract(encoder, loader, [FeatureSpec()], "cpu")[0]
    assert pieces.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert pieces.label.equal(whole.label)
    torch.testing.assert_close(pieces.x, whole.x)
    assert pieces.spec == whole.spec


def test_batches_need_the_clean_view():
    with pytest.raises(ValueError, match=r"Batch\.image"):
        FeatureCollector(tiny_encoder().eval(), [FeatureSpec()]).update(replace(random_batch(), image=None))


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    batch = random_batch(7)
    # Shares of different lengths, one of them empty, and image 4 twice.
    shares = {0: [[0, 4], [6, 2]], 1: [[1, 3, 4, 5]], 2: []}
    loader = [part(batch, rows) for rows in shares[rank]]
    features = extract(tiny_encoder().eval(), loader, [FeatureSpec()], "cpu")[0]
    torch.save([features.x, features.label, features.index], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_the_work(tmp_path):
    mp.start_processes(work, (str(tmp_path),), nprocs=3, start_method="fork")
    alone = extract(tiny_encoder().eval(), [random_batch(7)], [FeatureSpec()], "cpu")[0]
    for rank in range(3):
        x, label, index = torch.load(tmp_path / f"{rank}.pt")
        assert index.tolist() == list(range(7))
        assert label.equal(alone.label)
        torch.testing.assert_close(x, alone.x)


def test_one_pass_makes_the_features_of_every_block_as_one_pass_each_does():
    encoder, batch = tiny_encoder().eval(), random_batch()
    specs = [FeatureSpec(2), FeatureSpec(1, "patch_mean"), FeatureSpec(1, "cls", False), FeatureSpec(1, "patch_mean")]
    together = extract(encoder, [batch], specs, "cpu")
    for spec, features in zip(specs, together, strict=True):
        (alone,) = extract(encoder, [batch], [spec], "cpu")
        assert features.spec == alone.spec == resolve(spec, encoder.spec)
        assert torch.equal(features.x, alone.x)


def test_spread_takes_evenly_spaced_images():
    (features,) = extract(tiny_encoder().eval(), [random_batch(6)], [FeatureSpec()], "cpu")
    assert features.spread(3).index.tolist() == [0, 2, 4]
    assert features.spread(10) is features
