"""The copy that is fine-tuned: everything trained, stochastic depth, relative positions of its own for each block."""

import pytest
import torch
from timm.layers import DropPath

from harmonize.backbones.fine_tuning import trainable_copy
from harmonize.backbones.timm_models import TimmEncoder
from harmonize.functional.hashing import weights_hash
from harmonize.types import ConfigError
from tests.helpers import random_batch, tiny_encoder


def rates(blocks):
    return [
        [m.drop_prob if isinstance(m, DropPath) else 0.0 for m in (block.drop_path1, block.drop_path2)]
        for block in blocks
    ]


def test_everything_is_trained_and_the_original_stays():
    encoder = tiny_encoder(positions="sincos_mae", freeze_patch_embed=True).requires_grad_(False).eval()
    before = weights_hash(encoder.state_dict())
    copy = trainable_copy(encoder, drop_path=0.1)
    assert all(p.requires_grad for p in copy.parameters())
    assert copy.pos_embed.requires_grad  # MAE's fixed positions become trainable
    assert all(module.training for module in copy.modules())
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1)
    assert weights_hash(encoder.state_dict()) == before
    assert copy.spec == encoder.spec


def test_stochastic_depth_rises_linearly_and_replaces_what_was_there():
    encoder = tiny_encoder(depth=4, drop_path=0.4)
    assert [rate for rate, _ in rates(trainable_copy(encoder, 0.3).blocks)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [rate for _, rate in rates(trainable_copy(encoder, 0.3).blocks)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert rates(trainable_copy(encoder).blocks) == [[0.0, 0.0]] * 4
    assert rates(encoder.blocks)[-1] == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_an_impossible_rate_is_a_sentence(rate):
    with pytest.raises(ConfigError, match=rf"eval\.drop_path={rate} "):
        trainable_copy(tiny_encoder(), rate)


def test_a_table_of_its_own_for_each_block_computes_the_same():
    encoder = tiny_encoder(relative_position="shared", positions="none", class_token=True).eval()
    torch.nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table)
    copy = trainable_copy(encoder, per_block=True).eval()
    images = random_batch().image
    assert torch.equal(copy(images), encoder(images))
    tables = [block.rel_pos_bias.relative_position_bias_table for block in copy.blocks]
    assert len({id(table) for table in tables}) == 2
    names = {name for name in copy.state_dict() if "relative_position" in name}
    assert names == {f"blocks.{i}.rel_pos_bias.relative_position_bias_table" for i in (0, 1)}
    assert copy.relative_position == "per_block"
    assert encoder.relative_position == "shared"
    # the state is that of an encoder built with a table for each block
    own = tiny_encoder(relative_position="per_block", positions="none").eval()
    own.load_state_dict(copy.state_dict())
    assert torch.equal(own(images), copy(images))


@pytest.mark.parametrize("relative_position", ["none", "per_block"])
def test_without_a_shared_table_there_is_nothing_to_copy(relative_position):
    encoder = tiny_encoder(relative_position=relative_position)
    assert list(trainable_copy(encoder, per_block=True).state_dict()) == list(encoder.state_dict())
    shared = tiny_encoder(relative_position="shared")
    assert list(trainable_copy(shared).state_dict()) == list(shared.state_dict())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_models_of_timm(name):
    encoder = TimmEncoder(name, pretrained=False, image_size=28 if "14" in name else 32).eval().requires_grad_(False)
    copy = trainable_copy(encoder, 0.2, per_block=True)
    found = [rate for rate, _ in rates(copy.model.blocks)]
    assert found[0] == 0
    assert found[-1] == pytest.approx(0.2)
    assert all(p.requires_grad for p in copy.parameters())
    images = random_batch(2, encoder.spec.image_size[0]).image
    with torch.no_grad():
        assert torch.equal(copy.eval()(images), encoder(images))
