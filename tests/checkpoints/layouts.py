"""Tiny networks of timm, written to files as other projects write theirs."""

from argparse import Namespace

import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from harmonize.functional.positions import relative_position_index, sincos_2d

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
GRID = (4, 4)


def perturbed(model: nn.Module) -> nn.Module:
    """The model in eval mode, with no tensor left at an initial value that hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def vit(positions: str = "learned", **options) -> VisionTransformer:
    """timm's ViT with random or fixed positions."""
    torch.manual_seed(0)
    model = perturbed(VisionTransformer(**(SIZES | {"num_classes": 0} | options)))
    if positions != "learned":
        fixed = sincos_2d(GRID, model.embed_dim, columns_first=positions == "sincos_mae")
        model.pos_embed.data = torch.cat([torch.zeros(1, model.embed_dim), fixed])[None]
    return model


def beit(shared: bool, classes: int = 0, **options) -> Beit:
    """timm's BEiT: as pre-trained (shared table, final norm) or as fine-tuned (a table per block, ``fc_norm``)."""
    torch.manual_seed(0)
    settings = {
        "use_abs_pos_emb": False,
        "use_shared_rel_pos_bias": shared,
        "use_rel_pos_bias": not shared,
        "init_values": 0.1,
        "global_pool": "avg" if classes else "token",
        "num_classes": classes,
    }
    return perturbed(Beit(**(SIZES | settings | options)))


def beit_state(model: Beit) -> dict:
    """With the index buffers that timm leaves out and the official files hold."""
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith("relative_position_bias_table")]:
        state[name.replace("bias_table", "index")] = relative_position_index(GRID, 1)
    return state


def prefixed(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


def training(state_entries: dict) -> dict:
    """A training file: weights with what lies beside them."""
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}
    return state_entries | {"optimizer": moments, "epoch": 3, "args": Namespace(lr=1e-3, betas=(0.9, 0.95))}


def hugging_face(model: VisionTransformer, prefix: str = "vit.") -> dict:
    """timm's weights under the names of transformers' ``ViTForImageClassification``."""
    state = {}
    for name, value in model.state_dict().items():
        if ".qkv." in name:
            block, kind = name.split(".")[1], name.rpartition(".")[2]
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"{prefix}encoder.layer.{block}.attention.attention.{part}.{kind}"] = rows
            continue
        for ours, theirs in (
            ("blocks.", "encoder.layer."),
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ):
            name = name.replace(ours, theirs)
        name = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
        state[name.replace("head.", "classifier.") if name.startswith("head.") else f"{prefix}{name}"] = value
    return state
