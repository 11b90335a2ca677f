"""The same training steps by other projects, through their public modules: stable-pretraining and lightly.

Each function returns a step on the same network (timm's Vision Transformer of the same width, depth, heads and patch
size), images and batch, with the same fused AdamW. What remains different is said in each docstring.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.steps import Size, Step, images
from harmonize.config import compose


class MissingPeerError(ImportError):
    """A peer is not installed, or not in a version that has what is compared."""


@contextmanager
def needs(package: str) -> Iterator[None]:
    """Turn a failed import into a reason to skip."""
    try:
        yield
    except ImportError as error:
        raise MissingPeerError(f"{package}: {error} (the extra [bench] brings it)") from error


def _vit(size: Size, **options: Any) -> VisionTransformer:
    backbone = compose(size.overrides).backbone
    return VisionTransformer(
        img_size=size.image_size,
        patch_size=size.patch_size,
        embed_dim=backbone.width,
        depth=backbone.depth,
        num_heads=backbone.num_heads,
        num_classes=0,
        **options,
    )


def _step(module: nn.Module, num_views: int, size: Size, device: str, loss: Callable[..., Tensor], **more: Any) -> Step:
    module.to(device).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.05, fused=True)
    return Step(module, lambda views: loss(*views), optimizer, images(size, num_views, device), **more)


# ---- stable-pretraining ----------------------------------------------------------------------------------------------


def _stable_pretraining(name: str) -> Any:
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")  # it announces every module that is built
    with needs("stable-pretraining"):
        import stable_pretraining.methods as methods
        from loguru import logger

        logger.disable("stable_pretraining")
        return getattr(methods, name)


def _momentum(module: nn.Module) -> Callable[[], None]:
    """What its TeacherStudentCallback does after every step."""
    wrappers: Any = [m for m in module.modules() if hasattr(m, "update_teacher")]

    def update() -> None:
        for wrapper in wrappers:
            wrapper.update_ema_coefficient(0, 100)
            wrapper.update_teacher()

    return update


def stable_pretraining_moco_v3(size: Size, device: str) -> Step:
    """MoCov3, with the same heads. It encodes the two views one after the other."""
    method = _stable_pretraining("MoCov3")
    # Its constructor tries an image of 224 px, whatever the images are.
    base = _vit(size, dynamic_img_size=size.image_size != 224)
    module = method(base, projector_dims=(size.head, size.head, 256), predictor_hidden_dim=size.head)
    return _step(module, 2, size, device, lambda a, b: module(a, b).loss, after=_momentum(module))


def stable_pretraining_simmim(size: Size, device: str) -> Step:
    """SimMIM. Its masks are of single patches."""
    module = _stable_pretraining("SimMIM")(_vit(size), patch_size=size.patch_size, image_size=size.image_size)
    return _step(module, 1, size, device, lambda x: module(x).loss)


def stable_pretraining_mae(size: Size, device: str) -> Step:
    """MAE, with the same decoder."""
    module = _stable_pretraining("MAE")(_vit(size))
    return _step(module, 1, size, device, lambda x: module(x).loss)


def stable_pretraining_cmae(size: Size, device: str) -> Step:
    """CMAE, the nearest to a hybrid. It does less: one view for the student, one for the teacher, small heads."""
    module = _stable_pretraining("CMAE")(_vit(size), patch_size=size.patch_size, image_size=size.image_size)
    return _step(module, 2, size, device, lambda a, b: module(a, b).loss, after=_momentum(module))


# ---- lightly ---------------------------------------------------------------------------------------------------------


class _LightlySimMIM(nn.Module):
    """SimMIM from lightly's building blocks, as its documentation puts them together, on timm's network."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from lightly.models import utils
        from lightly.models.modules import MaskedVisionTransformerTIMM

        self.utils, self.patch_size = utils, size.patch_size
        vit = _vit(size)
        self.backbone = MaskedVisionTransformerTIMM(vit)
        self.decoder = nn.Linear(vit.embed_dim, 3 * size.patch_size**2)

    def forward(self, x: Tensor) -> Tensor:
        """The loss on images (B, 3, h, w)."""
        shape = (len(x), self.backbone.sequence_length)
        _, hidden = self.utils.random_token_mask(shape, mask_ratio=0.6, device=x.device)
        tokens = self.utils.get_at_index(self.backbone.encode(x, idx_mask=hidden), hidden)
        target = self.utils.get_at_index(self.utils.patchify(x, self.patch_size), hidden - 1)
        return nn.functional.l1_loss(self.decoder(tokens), target)


class _LightlyMAE(nn.Module):
    """MAE from lightly's building blocks, as its documentation puts them together."""

    def __init__(self, size: Size, width: int = 512) -> None:
        super().__init__()
        from lightly.models import utils
        from lightly.models.modules import MaskedVisionTransformerTIMM
        from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM

        self.utils, self.patch_size = utils, size.patch_size
        vit = _vit(size)
        self.backbone = MaskedVisionTransformerTIMM(vit)
        self.embed = nn.Linear(vit.embed_dim, width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(vit.patch_embed.num_patches, width, depth=8, num_heads=16)
        self.predict = nn.Linear(width, 3 * size.patch_size**2)

    def forward(self, x: Tensor) -> Tensor:
        """The loss on images (B, 3, h, w)."""
        shape = (len(x), self.backbone.sequence_length)
        visible, hidden = self.utils.random_token_mask(shape, mask_ratio=0.75, device=x.device)
        tokens = self.embed(self.backbone.encode(x, idx_keep=visible))
        whole = self.utils.repeat_token(self.decoder.mask_token.to(tokens.dtype), shape)
        decoded = self.decoder(self.utils.set_at_index(whole, visible, tokens))
        target = self.utils.get_at_index(self.utils.patchify(x, self.patch_size), hidden - 1)
        predicted = self.predict(self.utils.get_at_index(decoded, hidden))
        return nn.functional.mse_loss(predicted, self.utils.normalize_mean_var(target))


def lightly_simmim(size: Size, device: str) -> Step:
    """SimMIM. Its masks are of single patches; only hidden patches are decoded."""
    with needs("lightly"):
        module = _LightlySimMIM(size)
    return _step(module, 1, size, device, module)


def lightly_mae(size: Size, device: str) -> Step:
    """MAE, with the same decoder; only hidden patches are predicted."""
    with needs("lightly"):
        module = _LightlyMAE(size)
    return _step(module, 1, size, device, module)


PEERS: dict[str, dict[str, Callable[[Size, str], Step]]] = {
    "contrastive": {"stable-pretraining MoCov3": stable_pretraining_moco_v3},
    "mim": {"stable-pretraining SimMIM": stable_pretraining_simmim, "lightly SimMIM": lightly_simmim},
    "mae": {"stable-pretraining MAE": stable_pretraining_mae, "lightly MAE": lightly_mae},
    "hybrid mae, shared": {"stable-pretraining CMAE": stable_pretraining_cmae},
}
"""Objective -> name -> what makes the step."""

LESS_WORK = ("stable-pretraining CMAE",)
"""Peers that do less than ours; the ratio per FLOP is the one to look at."""
