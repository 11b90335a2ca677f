import math

import pytest
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

from harmonize.backbones.timm_vit import POSITIONS, ViTEncoder
from harmonize.functional.positions import sincos_2d
from tests.helpers import tiny_encoder


def images(n=3, size=16):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_patches_are_embedded_as_timm_does_it_in_training_too():
    encoder = tiny_encoder(image_size=(16, 24))
    x = torch.randn(3, 3, 16, 24)
    want = encoder.patch_embed.eval()(x)
    torch.testing.assert_close(encoder.patch_embed.train()(x), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match=r"images of \(24, 16\) px in an encoder for \(16, 24\)"):
        encoder.patch_embed(x.transpose(2, 3))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("class_token", "num_registers"), [(True, 0), (False, 0), (True, 2), (False, 1)])
def test_without_a_mask_it_is_timms_forward_features(positions, class_token, num_registers):
    encoder = tiny_encoder(
        positions=positions, class_token=class_token, num_registers=num_registers, layer_scale=0.1
    ).eval()
    plain = VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=0,
        global_pool="",
        class_token=class_token,
        reg_tokens=num_registers,
        init_values=0.1,
        pos_embed="none" if positions == "none" else "learn",
    ).eval()
    plain.load_state_dict(encoder.state_dict())
    want = plain.forward_features(images())
    assert torch.equal(encoder(images()), want)
    assert torch.equal(VisionTransformer.forward_features(encoder, images()), want)
    assert want.shape == (3, encoder.spec.num_prefix_tokens + 16, 24)
    *_, last = encoder.iter_blocks(images())
    assert torch.equal(encoder.final_norm(last), want)


@pytest.mark.parametrize("relative_position", ["shared", "per_block"])
def test_relative_positions_are_those_of_timms_beit(relative_position):
    encoder = tiny_encoder(
        image_size=(16, 24), positions="none", relative_position=relative_position, layer_scale=0.1
    ).eval()
    beit = Beit(
        img_size=(16, 24),
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=0,
        global_pool="token",
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=relative_position == "per_block",
        use_shared_rel_pos_bias=relative_position == "shared",
    ).eval()
    for parameter in encoder.parameters():
        if parameter.shape[-1] == 3 and parameter.dim() == 2:
            torch.nn.init.normal_(parameter)
    state = {}
    for key, value in encoder.state_dict().items():
        key = key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if key.startswith("blocks"):
            key = key.replace("rel_pos_bias.", "attn.")
        if key.endswith("qkv.bias"):
            state[key.replace("qkv.bias", "q_bias")], state[key.replace("qkv.bias", "v_bias")] = value[:24], value[48:]
        else:
            state[key] = value
    missing, unexpected = beit.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [k for k in missing if "index" not in k and "k_bias" not in k]
    x = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(encoder(x), beit.forward_features(x), rtol=1e-5, atol=1e-6)


def test_masked_patches_carry_the_mask_token_and_nothing_of_the_image():
    encoder = tiny_encoder().eval()
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 5] = True
    token = torch.randn(1, 1, 24)
    x = images()
    changed = x.clone()
    changed[:, :, 4:8, 4:8] += 1.0  # patch 5 of the 4 x 4 grid
    assert torch.equal(encoder(x, mask, token), encoder(changed, mask, token))
    assert not torch.allclose(encoder(x), encoder(changed))
    assert not torch.allclose(encoder(x, mask, token), encoder(x, mask, token + 1))


@pytest.mark.parametrize("relative_position", ["none", "shared", "per_block"])
def test_all_patches_visible_is_the_whole_image(relative_position):
    encoder = tiny_encoder(relative_position=relative_position, num_registers=1).eval()
    if relative_position != "none":
        for name, parameter in encoder.named_parameters():
            if "bias_table" in name:
                torch.nn.init.normal_(parameter)
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    seen = encoder.encode_visible(images(), order)
    whole = encoder(images())
    torch.testing.assert_close(seen[:, :2], whole[:, :2])
    for i in range(3):
        torch.testing.assert_close(seen[i, 2:], whole[i, 2:][order[i]])


def test_hidden_patches_do_not_enter():
    encoder = tiny_encoder().eval()
    keep = torch.tensor([[0, 3, 7]]).expand(3, -1)
    changed = images()
    changed[:, :, 4:8, 4:8] += 1.0
    assert torch.equal(encoder.encode_visible(images(), keep), encoder.encode_visible(changed, keep))


def test_moco_v3_positions_are_maes_with_the_halves_swapped():
    rows_first, columns_first = sincos_2d((3, 5), 8), sincos_2d((3, 5), 8, columns_first=True)
    assert torch.equal(rows_first, torch.cat([columns_first[:, 4:], columns_first[:, :4]], dim=1))
    assert torch.equal(rows_first[7, :4], torch.tensor([math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]))


def test_fixed_parts_get_no_gradient():
    encoder = tiny_encoder(positions="sincos", freeze_patch_embed=True)
    encoder(images()).sum().backward()
    without = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert without == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_initialisations():
    def std(encoder, name):
        return dict(encoder.named_parameters())[name].std().item()

    sizes = {"width": 192, "num_heads": 3, "patch_size": 8}
    moco = tiny_encoder(initialization="moco_v3", **sizes)
    # uniform on [-a, a] has standard deviation a / sqrt(3)
    assert std(moco, "blocks.0.attn.qkv.weight") == pytest.approx(math.sqrt(6 / (192 + 192) / 3), rel=0.02)
    assert std(moco, "patch_embed.proj.weight") == pytest.approx(math.sqrt(6 / (3 * 64 + 192) / 3), rel=0.02)
    mae = tiny_encoder(initialization="mae", **sizes)
    assert std(mae, "blocks.0.attn.qkv.weight") == pytest.approx(math.sqrt(6 / (3 * 192 + 192) / 3), rel=0.02)
    assert std(mae, "cls_token") == pytest.approx(0.02, rel=0.2)
    simmim = tiny_encoder(initialization="simmim", positions="learned", **sizes)
    assert std(simmim, "blocks.0.mlp.fc1.weight") == pytest.approx(0.02, rel=0.02)
    assert std(simmim, "blocks.1.mlp.fc2.weight") == pytest.approx(0.02 / 2, rel=0.02)
    assert dict(simmim.named_parameters())["pos_embed"].abs().max() <= 0.02
    for encoder in (moco, mae, simmim):
        assert all((p == 0).all() for n, p in encoder.named_parameters() if n.endswith(".bias"))


def test_spec():
    spec = ViTEncoder((32, 48), 8, 24, 2, 3, num_registers=2).spec
    assert (spec.grid, spec.num_patches, spec.num_prefix_tokens, spec.image_size) == ((4, 6), 24, 3, (32, 48))


@pytest.mark.parametrize("option", ["positions", "relative_position", "initialization"])
def test_unknown_options_are_named(option):
    with pytest.raises(ValueError, match=rf"^{option}=nonsense must be one of"):
        tiny_encoder(**{option: "nonsense"})
