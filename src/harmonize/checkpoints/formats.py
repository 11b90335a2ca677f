"""The layouts of published checkpoint files: one row of a table each, and the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from harmonize.types import IMAGE_MEAN, IMAGE_STD

# Name, without its prefix, in a file (a pattern) -> ours. "#" sets apart which part of a joint tensor it is; names that
# are not here are ours already (timm's, which MoCo v3, MAE, SimMIM, BEiT, DINO, iBOT and DeiT share).
NAMES: Mapping[str, str] = {
    r"(blocks\.\d+\.)gamma_([12])": r"\1ls\2.gamma",
    r"(blocks\.\d+\.)attn\.(relative_position_bias_table)": r"\1rel_pos_bias.\2",
    r"(blocks\.\d+\.attn\.)([qv])_bias": r"\1qkv.bias#\2",
    r"dist_token": "reg_token",  # DeiT's distillation token stands where a register does
    # Hugging Face transformers
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.distillation_token": "reg_token",
    r"embeddings\.mask_token": "mask_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.(.*)": r"patch_embed.proj.\1",
    r"encoder\.layer\.(\d+)\.attention\.attention\.([qkv])[a-z]+\.(.*)": r"blocks.\1.attn.qkv.\3#\2",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)": r"blocks.\1.attn.proj.\2",
    r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.*)": r"blocks.\1.mlp.fc1.\2",
    r"encoder\.layer\.(\d+)\.output\.dense\.(.*)": r"blocks.\1.mlp.fc2.\2",
    r"encoder\.layer\.(\d+)\.layernorm_before\.(.*)": r"blocks.\1.norm1.\2",
    r"encoder\.layer\.(\d+)\.layernorm_after\.(.*)": r"blocks.\1.norm2.\2",
    r"layernorm\.(.*)": r"norm.\1",
    r"classifier\.(.*)": r"head.\1",
}
# Name, ours -> why it is left out, in every format.
DROPPED: Mapping[str, str] = {
    r"(mask_token|masked_embed)$": "stands for hidden patches while training",
    r"(.*\.)?num_batches_tracked$": "a count of batches",
}
# Top-level entry -> why it is left out. Any other entry must hold no tensors at all.
ENTRIES: Mapping[str, str] = {
    r"optimizer.*": "the optimiser's state",
    r".*scaler|amp": "the loss scaler's state",
    r"(lr_)?scheduler.*": "the learning-rate schedule's state",
    r"dino_loss|ibot_loss": "the loss's centre",
    r"best_.*|max_accuracy|metric": "an accuracy",
    r"model_ema|state_dict_ema": "a moving average of the weights; the weights themselves are read",
}


def our_name(name: str) -> str:
    """Our name of an encoder tensor, after its prefix has been taken off.

    >>> our_name("blocks.0.attn.q_bias")
    'blocks.0.attn.qkv.bias#q'
    """
    for pattern, ours in NAMES.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(ours)
    return name


@dataclass(frozen=True)
class Evidence:
    """What a format is recognised by.

    Attributes:
        prefix: What stands before an encoder tensor's name, with the top-level entry before a slash.
        names: Of all tensors; those of the encoder are ours.
        entries: Top-level names.
        positions: Kind of absolute positions, as ``ViTEncoder`` calls them.
        described: Whether a JSON file lies beside it, as timm, Hugging Face and our own exports write it.
    """

    prefix: str
    names: Collection[str]
    entries: Collection[str]
    positions: str
    described: bool = False

    def has(self, pattern: str) -> bool:
        """Whether a name begins with the pattern."""
        return any(re.match(pattern, name) for name in self.names)


@dataclass(frozen=True)
class Format:
    """One layout of checkpoint files.

    Attributes:
        family: What it is called in messages.
        note: What such a file is; ``{branch}`` stands for the branch that is read.
        when: Whether a file whose encoder has been found by ``branches`` is one.
        branches: Name -> pattern of the prefix of its encoder's tensors; the first is read unless another is asked for.
        dropped: The start of a name (with entry and prefix outside the encoder) -> why it is left out.
        num_heads: Width -> published number of heads.
        heads_from: Where these numbers are published.
        initialization: How its networks begin, as ``ViTEncoder`` calls it.
        mean: Per colour, of the images' normalisation.
        std: Per colour.
    """

    family: str
    note: str
    when: Callable[[Evidence], bool]
    branches: Mapping[str, str]
    dropped: Mapping[str, str] = field(default_factory=dict)
    num_heads: Mapping[int, int] = field(default_factory=dict)
    heads_from: str = ""
    initialization: str = "timm"
    mean: tuple[float, ...] = IMAGE_MEAN
    std: tuple[float, ...] = IMAGE_STD


_PLAIN = {"": r"(?:(?:model|state_dict|module)/)?(?:module\.)?"}
_BACKBONES = {
    "teacher": r"teacher/(?:module\.)?backbone\.",
    "student": r"student/(?:module\.)?backbone\.",
}
_DINO_HEADS = {r"(student|teacher)/(module\.)?head\.": "the projection head"}
_HALF = (0.5, 0.5, 0.5)

_MOCO_HEADS = ({384: 12, 768: 12}, "MoCo v3's vits.py: 12 for every size")
_MAE_HEADS = ({768: 12, 1024: 16, 1280: 16}, "MAE's models_mae.py")
_SIMMIM_HEADS = ({768: 12}, "SimMIM's configuration of ViT-B")
_BEIT_HEADS = ({768: 12, 1024: 16}, "BEiT's models: heads of 64")
_DINO_HEADS_BY_WIDTH = ({192: 3, 384: 6, 768: 12, 1024: 16}, "the models of DINO and iBOT: heads of 64")
_PLAIN_HEADS = (
    {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16},
    "the models of timm, DeiT and DINO: heads of 64, ViT-H of 80",
)


def _is_beit(evidence: Evidence) -> bool:
    return evidence.has(r"blocks\.0\.attn\.qkv\.bias#q") or evidence.has(r"(blocks\.0\.)?rel_pos_bias\.")


# The first that fits is taken, so the more particular stand above the more general.
FORMATS = (
    Format(
        "Hugging Face ViT",
        "a Vision Transformer of Hugging Face transformers",
        lambda e: True,
        {"": r"(?:(?:model|state_dict)/)?(?:vit\.|deit\.)?(?=embeddings\.)"},
        {
            r"pooler\.": "a layer on the class token that classification does not use",
            r"decoder\.": "the decoder of masked pre-training",
        },
        *_PLAIN_HEADS,
    ),
    Format(
        "MoCo v3, pre-trained",
        "a pre-training file of MoCo v3; the {branch} is read",
        lambda e: True,
        {
            "base": r"(?:state_dict/)?(?:module\.)?base_encoder\.",
            "momentum": r"(?:state_dict/)?(?:module\.)?momentum_encoder\.",
        },
        {r"head\.": "MoCo v3's projector", r"(state_dict/)?(module\.)?predictor\.": "MoCo v3's predictor"},
        *_MOCO_HEADS,
        "moco_v3",
    ),
    Format(
        "iBOT, pre-trained",
        "a pre-training file of iBOT; the {branch} is read",
        lambda e: "ibot_loss" in e.entries or e.has("masked_embed|student/.*masked_embed"),
        _BACKBONES,
        _DINO_HEADS,
        *_DINO_HEADS_BY_WIDTH,
    ),
    Format(
        "DINO, pre-trained",
        "a pre-training file of DINO; the {branch} is read",
        lambda e: True,
        _BACKBONES,
        _DINO_HEADS,
        *_DINO_HEADS_BY_WIDTH,
    ),
    Format(
        "SimMIM, pre-trained",
        "a pre-training file of SimMIM",
        lambda e: True,
        {"": r"(?:model/)?(?:module\.)?encoder\."},
        {r"(model/)?(module\.)?decoder\.": "SimMIM's decoder"},
        *_SIMMIM_HEADS,
        "simmim",
    ),
    Format(
        "MAE, pre-trained",
        "a pre-training file of MAE, with its decoder",
        lambda e: e.has(r"decoder_embed\."),
        _PLAIN,
        {r"decoder_": "MAE's decoder"},
        *_MAE_HEADS,
        "mae",
    ),
    Format(
        "MAE, linear probe",
        "a linear probe of MAE: its BatchNorm is folded into the linear layer",
        lambda e: e.has(r"head\.0\.running_mean"),
        _PLAIN,
        {},
        *_MAE_HEADS,
        "mae",
    ),
    Format(
        "BEiT, pre-trained",
        "a pre-training file of BEiT, whose images have mean and standard deviation 0.5",
        lambda e: _is_beit(e) and e.has(r"lm_head\.|mask_token"),
        _PLAIN,
        {r"lm_head\.": "BEiT's prediction of visual words"},
        *_BEIT_HEADS,
        "simmim",
        _HALF,
        _HALF,
    ),
    Format(
        "SimMIM, fine-tuned",
        "fine-tuned by SimMIM's code",
        lambda e: _is_beit(e) and not {"config", "max_accuracy", "amp"}.isdisjoint(e.entries),
        _PLAIN,
        {},
        *_SIMMIM_HEADS,
        "simmim",
    ),
    Format(
        "BEiT, fine-tuned",
        "fine-tuned as BEiT is, with images of mean and standard deviation 0.5 (if it is SimMIM's, ImageNet's)",
        _is_beit,
        _PLAIN,
        {},
        *_BEIT_HEADS,
        "simmim",
        _HALF,
        _HALF,
    ),
    Format(
        "MAE, fine-tuned",
        "fine-tuned as MAE is: mean of the patch tokens, then a norm",
        lambda e: e.has(r"fc_norm\.") and e.prefix.startswith("model/"),
        _PLAIN,
        {},
        *_MAE_HEADS,
        "mae",
    ),
    Format(
        "MoCo v3, linear probe",
        "a linear probe of MoCo v3, with the frozen base encoder: no file of the pre-training",
        # "best_acc1" is in files of main_lincls.py only, of which all names begin with "module."
        lambda e: (
            e.has(r"head\.")
            and not e.described
            and (e.positions == "sincos" or ("best_acc1" in e.entries and e.prefix == "state_dict/module."))
        ),
        _PLAIN,
        {},
        *_MOCO_HEADS,
        "moco_v3",
    ),
    Format(
        "MoCo v3, backbone",
        "an encoder with the fixed positions of MoCo v3",
        lambda e: e.positions == "sincos" and not e.described,
        _PLAIN,
        {},
        {768: 12},  # at 384, MoCo v3 itself has 12 heads, but most others have 6
        "MoCo v3's vits.py",
        "moco_v3",
    ),
    Format(
        "MAE, backbone",
        "an encoder with the fixed positions of MAE",
        lambda e: e.positions == "sincos_mae",
        _PLAIN,
        {},
        *_MAE_HEADS,
        "mae",
    ),
    Format(
        "iBOT, backbone",
        "an encoder in the layout of iBOT's backbone files",
        lambda e: e.has("masked_embed") or (e.prefix == "state_dict/" and not e.has(r"head\.")),
        _PLAIN,
        {},
        *_DINO_HEADS_BY_WIDTH,
    ),
    Format(
        "timm or DeiT, classifier",
        "a Vision Transformer with timm's names and a classifier, as of timm or DeiT (some of timm's take "
        "images of mean and standard deviation 0.5)",
        lambda e: e.has(r"head\."),
        _PLAIN,
        {r"head_dist\.": "DeiT's second classifier, of the distillation token"},
        *_PLAIN_HEADS,
    ),
    Format(
        "DINO or timm, backbone",
        "a Vision Transformer with timm's names and no classifier, as DINO's backbone",
        lambda e: True,
        _PLAIN,
        {},
        *_PLAIN_HEADS,
    ),
)
