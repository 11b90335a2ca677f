"""What the tap shows is what timm's networks compute, and looking changes nothing."""

import re
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import nn

from harmonize.backbones.tap import visit_blocks
from harmonize.types import AttentionView, ConfigError, TokensView
from tests.helpers import tiny_encoder

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
NAMED = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
NETWORKS = {
    "plain": tiny_encoder,
    "not square": lambda: tiny_encoder(image_size=(16, 24)),
    "shared bias": lambda: tiny_encoder(relative_position="shared", positions="none"),
    "bias per block": lambda: tiny_encoder(relative_position="per_block", positions="none"),
    "registers": lambda: tiny_encoder(num_registers=2, layer_scale=0.5),
    "no class token": lambda: tiny_encoder(class_token=False),
    "normalised queries": lambda: VisionTransformer(**SMALL, qk_norm=True),
    "norms behind": lambda: VisionTransformer(**SMALL, block_fn=ResPostBlock, init_values=0.5),
    "BEiT": lambda: Beit(**SMALL, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    "EVA-02": lambda: Eva(**SMALL, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True),
    "DINOv3": lambda: timm.create_model("vit_small_patch16_dinov3", **NAMED, dynamic_img_size=False),
    "relative positions": lambda: timm.create_model("vit_srelpos_small_patch16_224", **NAMED),
}


def build(name):
    """In eval mode, with weights so large that attention is far from uniform and no bias is zero."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network


def images_for(network, n=3):
    return torch.randn(n, 3, *network.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def run(network, images):
    return network(images) if hasattr(network, "visit_layers") else network.forward_features(images)


@torch.no_grad()
def look(network, images, visit):
    if hasattr(network, "visit_layers"):
        return network.visit_layers(images, visit)
    num_tokens = network.num_prefix_tokens + network.patch_embed.num_patches
    return visit_blocks(network.blocks, lambda: run(network, images), visit, num_tokens)


def views_of(network, images):
    views = []
    return look(network, images, views.append), views


def num_hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def values(attention, x):
    """The value projections (B, H, S, d) of a block's attention, from its weights."""
    if getattr(attention, "qkv", None) is None:
        v = attention.v_proj(x)
    else:
        width = attention.qkv.weight.shape[0] // 3
        bias = attention.qkv.bias[-width:] if attention.qkv.bias is not None else getattr(attention, "v_bias", None)
        v = F.linear(x, attention.qkv.weight[-width:], bias)
    return v.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


class Slow:
    """What timm's own unfused attention computes: by block, the maps, inputs, branches and outputs."""

    def __init__(self, network, images):
        self.maps, self.read, self.branch, self.after = [], [], [], []
        handles = []
        for block in network.blocks:
            assert block.attn.fused_attn, "else this compares one path with itself"
            block.attn.fused_attn = False
            handles += [
                block.attn.attn_drop.register_forward_hook(lambda _m, _a, maps: self.maps.append(maps)),
                block.attn.register_forward_pre_hook(lambda _m, args: self.read.append(args[0])),
                block.drop_path1.register_forward_hook(lambda _m, _a, branch: self.branch.append(branch)),
                block.register_forward_hook(lambda _m, _a, tokens: self.after.append(tokens)),
            ]
        with torch.no_grad():
            run(network, images)
        for handle in handles:
            handle.remove()
        for block in network.blocks:
            block.attn.fused_attn = True


@pytest.mark.parametrize("name", NETWORKS)
def test_attention_is_that_of_timms_own_slow_path(name):
    network = build(name)
    images = images_for(network)
    slow = Slow(network, images)
    result, views = views_of(network, images)
    with torch.no_grad():
        assert torch.equal(result, run(network, images))  # bit for bit
    attention = [view for view in views if isinstance(view, AttentionView)]
    assert [view.layer for view in attention] == [1, 2]
    for view, want, x, block in zip(attention, slow.maps, slow.read, network.blocks, strict=True):
        weights = view.weights()
        uniform = 1 / weights.shape[-1]
        assert (want - uniform).abs().max() > uniform  # else this test would accept a wrong scale
        torch.testing.assert_close(weights, want, rtol=0, atol=2e-6)
        torch.testing.assert_close(view.take(slice(1, 3)).weights(), weights[1:])
        torch.testing.assert_close(view.logits(2).softmax(-1), weights[:, :, 2:])
        with torch.no_grad():
            output = weights @ values(block.attn, x)
        torch.testing.assert_close(view.output, output, rtol=1e-4, atol=1e-4 * output.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_residual_stream_in_the_order_of_the_blocks(name):
    network = build(name)
    images = images_for(network)
    slow = Slow(network, images)
    _, views = views_of(network, images)
    places = [(view.layer, view.stage if isinstance(view, TokensView) else "maps") for view in views]
    assert places == [(0, "embedding"), *((i, stage) for i in (1, 2) for stage in ("maps", "attention", "mlp"))]
    start = views[0].tokens
    assert views[0].before is None
    for layer, (branch, after) in enumerate(zip(slow.branch, slow.after, strict=True)):
        _, middle, end = views[1 + 3 * layer : 4 + 3 * layer]
        assert torch.equal(middle.before, start)
        assert torch.equal(end.before, start)
        tolerance = {"rtol": 1e-4, "atol": 1e-4 * after.abs().max().item()}
        torch.testing.assert_close(middle.tokens, start + branch, **tolerance)
        torch.testing.assert_close(end.tokens, after, **tolerance)
        assert (middle.tokens - end.tokens).abs().max() > 1e-3 * after.abs().max()
        start = end.tokens


@pytest.mark.parametrize(("name", "behind"), [("registers", False), ("norms behind", True)])
def test_after_attention_by_hand(name, behind):
    """Where the norms follow their branch, ``norm2`` sees the MLP's output, not the residual stream."""
    network = build(name)
    _, views = views_of(network, images_for(network))
    for block, view in zip(network.blocks, [v for v in views if getattr(v, "stage", "") == "attention"], strict=True):
        with torch.no_grad():
            branch = block.norm1(block.attn(view.before)) if behind else block.ls1(block.attn(block.norm1(view.before)))
        assert torch.equal(view.tokens, view.before + branch)


def test_layers_of_the_encoder_are_those_of_iter_blocks():
    encoder = build("bias per block")
    images = images_for(encoder)
    _, views = views_of(encoder, images)
    ends = [view.tokens for view in views if getattr(view, "stage", "") == "mlp"]
    with torch.no_grad():
        assert all(map(torch.equal, ends, encoder.iter_blocks(images)))


@pytest.mark.parametrize("name", ["plain", "EVA-02", "BEiT"])
def test_where_fused_attention_is_switched_off(name):
    """As after ``TIMM_FUSED_ATTN=0``; the switch is left as it was."""
    network = build(name)
    images = images_for(network)
    fused, views = views_of(network, images)
    network.blocks[0].attn.fused_attn = network.blocks[1].attn.fused_attn = False
    result, again = views_of(network, images)
    assert torch.equal(result, fused)
    for one, other in zip(views, again, strict=True):
        if isinstance(one, AttentionView):
            assert torch.equal(one.weights(), other.weights())
        else:
            assert torch.equal(one.tokens, other.tokens)
    assert [block.attn.fused_attn for block in network.blocks] == [False, False]
    with pytest.raises(ZeroDivisionError):
        look(network, images, lambda view: 1 / 0)
    assert [block.attn.fused_attn for block in network.blocks] == [False, False]
    network.blocks[0].attn.fused_attn = True  # each by itself
    look(network, images, lambda view: None)
    assert [block.attn.fused_attn for block in network.blocks] == [True, False]


@pytest.mark.parametrize("last", range(7))
def test_nothing_is_left_behind_when_the_visitor_raises(last):
    network, seen = build("registers"), []
    images = images_for(network)
    before = num_hooks(network)

    def visit(view):
        assert num_hooks(network) > before
        seen.append(view)
        if len(seen) > last:
            raise KeyError("enough")

    with pytest.raises(KeyError):
        look(network, images, visit)
    assert len(seen) == last + 1
    assert num_hooks(network) == before
    run(network, images)
    q = torch.randn(1, 1, 20, 4)
    F.scaled_dot_product_attention(q, q, q)
    assert len(seen) == last + 1  # and nobody listens any more


def test_nothing_is_left_behind_when_all_goes_well():
    network = build("plain")
    before = num_hooks(network)
    _, views = views_of(network, images_for(network))
    run(network, images_for(network))
    assert len(views) == 7
    assert num_hooks(network) == before


def test_no_two_layers_attention_is_alive_at_a_time():
    network = tiny_encoder(depth=4).eval()
    alive, most = weakref.WeakSet(), []

    def visit(view):
        if isinstance(view, AttentionView):
            alive.update((view.query, view.key, view.output))
            most.append(len(alive))

    look(network, images_for(network), visit)
    assert most == [3, 3, 3, 3]


# --- networks made by hand -------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention of a single head without projections, then a norm."""

    def __init__(self, calls=1, middle=True, after=False, few=False, **options):
        super().__init__()
        self.calls, self.after, self.few, self.options = calls, after, few, options
        if middle:
            self.norm2 = nn.LayerNorm(8)

    def forward(self, x):
        if self.after:
            x = self.norm2(x)
        for _ in range(self.calls):
            q = x[:, None, :1] if self.few else x[:, None]
            x = x + F.scaled_dot_product_attention(q, x[:, None], x[:, None], **self.options)[:, 0]
        return self.norm2(x) if hasattr(self, "norm2") and not self.after else x


def look_at(*blocks, x=None):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) if x is None else x
    views = []
    network = nn.Sequential(*blocks)
    visit_blocks(network, lambda: network(x), views.append, 5)
    return x, views


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block(calls=0), "block 2 (Block) makes no call of scaled_dot_product_attention, where one is needed"),
        (Block(calls=2), "block 2 (Block) makes more than one call of scaled_dot_product_attention"),
        (Block(after=True), "block 2 (Block) makes no call"),
        (Block(few=True), "block 2 (Block) does not attend from all tokens to all tokens"),
        (Block(is_causal=True), "block 2 (Block) does not attend from all tokens to all tokens"),
        (Block(middle=False), "block 2 (Block) has no part named norm2 or mlp"),
        (ParallelScalingBlock(8, 2), "block 2 (ParallelScalingBlock) has no part named norm2 or mlp"),
    ],
)
def test_blocks_that_cannot_be_read(block, message):
    first = Block()
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        look_at(first, block)
    assert re.fullmatch(r"Diagnostics cannot read this network: [^.\n]*\.", str(caught.value))  # one sentence
    assert num_hooks(nn.ModuleList([first, block])) == 0


def test_tokens_in_rows_and_columns_cannot_be_read():
    with pytest.raises(ConfigError, match=re.escape("block 1 (Block) takes (2, 5, 5, 8), not a list of 5 tokens")):
        look_at(Block(), x=torch.randn(2, 5, 5, 8))
    with pytest.raises(ConfigError, match=re.escape("block 1 (Block) takes (2, 6, 8), not a list of 5 tokens")):
        look_at(Block(), x=torch.randn(2, 6, 8))


def test_every_block_must_be_called_once():
    blocks, x = [Block(), Block()], torch.randn(2, 5, 8)
    with pytest.raises(ConfigError, match=r"^The network has 2 blocks, of which its forward pass called 1\.$"):
        visit_blocks(blocks, lambda: blocks[0](x), lambda view: None, 5)
    assert num_hooks(nn.ModuleList(blocks)) == 0


def test_attention_outside_the_blocks_is_none_of_theirs():
    """Attention pooling, for example."""
    block, x, views = Block(), torch.randn(2, 5, 8), []

    def forward():
        F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(*3 * [block(x)])

    visit_blocks([block], forward, views.append, 5)
    assert [view.layer for view in views] == [0, 1, 1, 1]


@pytest.mark.parametrize("shape", [(5, 5), (1, 5, 5), (2, 1, 5, 5), (1, 1, 5, 5), (2, 1, 1, 5)])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_every_kind_and_a_scale_of_its_own(shape, boolean):
    mask = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    if boolean:
        mask = (mask > 0) | (torch.arange(5) == 0)  # nobody is left with nothing
    mask_of_all = mask.expand(2, 1, 5, 5)
    x, views = look_at(Block(attn_mask=mask, scale=0.7))
    logits = (0.7 * x @ x.mT)[:, None]
    logits = logits.masked_fill(~mask_of_all, -torch.inf) if boolean else logits + mask_of_all
    view = views[1]
    torch.testing.assert_close(view.weights(), logits.softmax(-1))
    torch.testing.assert_close(view.take(torch.tensor([1])).weights(), logits.softmax(-1)[1:])
    torch.testing.assert_close(view.logits(2).softmax(-1), logits.softmax(-1)[:, :, 2:])
    torch.testing.assert_close(view.output, logits.softmax(-1) @ x[:, None])
