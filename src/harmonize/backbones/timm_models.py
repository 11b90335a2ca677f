"""Any Vision Transformer of timm as an encoder: for looking at networks that were trained elsewhere."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import timm
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from harmonize.backbones.tap import Visit, visit_blocks
from harmonize.types import IMAGE_MEAN, IMAGE_STD, ConfigError, EncoderSpec


class TimmEncoder(nn.Module):
    """A model of timm that has blocks of self-attention over a fixed grid: ViT, DeiT, DINOv2, DINOv3, EVA-02, BEiT ...

    Args:
        name: As in ``timm.create_model``, for example ``vit_small_patch16_224``.
        pretrained: Load timm's weights; where that is impossible, ``warning`` says so and the weights stay random.
        image_size: Side in px; None: the model's own. Position embeddings are resampled by timm.

    Attributes:
        spec: See :class:`~harmonize.types.EncoderSpec`.
        warning: What the reader of a result must know; empty if there is nothing.

    Raises:
        ConfigError: timm has no such model, or it is of another kind.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool = True, image_size: int | None = None) -> None:
        super().__init__()
        self.warning = ""
        self.model = self._create(name, pretrained, image_size)
        self.spec = _spec(name, self.model)
        source = self.model.pretrained_cfg
        for key, ours in (("mean", IMAGE_MEAN), ("std", IMAGE_STD)):
            own = source.get(key, ours)
            self.register_buffer(key, torch.tensor([own, ours]).view(2, 1, 3, 1, 1), persistent=False)

    def _create(self, name: str, pretrained: bool, image_size: int | None) -> Any:
        if not timm.is_model(name.partition(".")[0]):
            near = ", ".join(timm.list_models(f"*{name.partition('.')[0][:12]}*")[:3])
            raise ConfigError(f"checkpoint=timm:{name}: timm has no such model{f'; it has {near}' if near else ''}.")
        options: dict[str, Any] = {"num_classes": 0}
        if image_size is not None:
            options["img_size"] = image_size
        try:
            if not pretrained:
                return self._fixed(name, options)
            with _no_retries_without_network():
                return self._fixed(name, options | {"pretrained": True})
        except Exception as error:  # no network, no such tag, no weights: each raises something else
            if not pretrained or isinstance(error, ConfigError):
                raise ConfigError(f"checkpoint=timm:{name} cannot be built: {_short(error)}.") from error
            self.warning = (
                f"timm:{name}: no pre-trained weights could be loaded ({_short(error)}); the weights are RANDOM."
            )
            return self._create(name.partition(".")[0], False, image_size)

    @staticmethod
    def _fixed(name: str, options: dict[str, Any]) -> Any:
        """A model of one image size: DINOv3's default is to take any."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return timm.create_model(name, dynamic_img_size=False, **options)
            except TypeError:  # the model has no such option
                return timm.create_model(name, **options)

    def _normalized(self, images: Tensor) -> Tensor:
        """Images as this model wants them."""
        if torch.equal(self.mean[0], self.mean[1]) and torch.equal(self.std[0], self.std[1]):
            return images
        return (images * self.std[1] + self.mean[1] - self.mean[0]) / self.std[0]

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (B, P + N, D) after the final norm of images (B, 3, h, w)."""
        return self.model.forward_features(self._normalized(images)).flatten(1, -2)  # some return rows and columns

    def visit_layers(self, images: Tensor, visit: Visit) -> Tensor:
        """``forward`` that shows every layer to ``visit``, see :func:`~harmonize.backbones.tap.visit_blocks`."""
        num_tokens = self.spec.num_prefix_tokens + self.spec.num_patches
        return visit_blocks(self.model.blocks, lambda: self(images), visit, num_tokens)

    def iter_blocks(self, images: Tensor) -> Iterator[Tensor]:
        """The tokens (B, P + N, D) after each block, in order, before the final norm."""
        outputs: list[Tensor] = []
        handles = [b.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for b in self.model.blocks]
        try:
            self(images)
        finally:
            for handle in handles:
                handle.remove()
        yield from outputs

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The norm after the last block."""
        return self.model.norm(tokens)


def _spec(name: str, model: Any) -> EncoderSpec:
    """Sizes of a timm model.

    Raises:
        ConfigError: It has no blocks of self-attention, or no fixed grid.
    """
    blocks: Any = getattr(model, "blocks", None)
    patches: Any = getattr(model, "patch_embed", None)
    first = next(iter(blocks), None) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else None
    num_heads = getattr(getattr(first, "attn", None), "num_heads", None)
    if first is None or num_heads is None:
        raise ConfigError(f"checkpoint=timm:{name} is no Vision Transformer: it has no blocks with self-attention.")
    grid, sides = getattr(patches, "grid_size", None), getattr(patches, "patch_size", None)
    if grid is None or sides is None or getattr(model, "dynamic_img_size", False):
        raise ConfigError(f"checkpoint=timm:{name} takes images of any size; diagnostics need a fixed grid of patches.")
    if not hasattr(model, "num_prefix_tokens"):
        raise ConfigError(f"checkpoint=timm:{name} keeps its tokens in rows and columns; diagnostics need a list.")
    if hasattr(patches, "backbone"):  # patches of a feature map, whose sides are not in px
        sides = [length // number for length, number in zip(patches.img_size, grid, strict=True)]
    if not all(grid) or any(g * s != size for g, s, size in zip(grid, sides, patches.img_size, strict=True)):
        size = " x ".join(map(str, patches.img_size))
        raise ConfigError(f"image_size must be a multiple of the patch size of timm:{name}, {sides[0]} px, not {size}.")
    if sides[0] != sides[1]:
        raise ConfigError(f"checkpoint=timm:{name} has patches of {sides[0]} x {sides[1]} px; square ones are needed.")
    return EncoderSpec(
        width=model.embed_dim,
        depth=len(blocks),
        num_heads=num_heads,
        image_size=(patches.img_size[0], patches.img_size[1]),
        patch_size=sides[0],
        grid=(grid[0], grid[1]),
        num_prefix_tokens=model.num_prefix_tokens,
        has_class_token=getattr(model, "cls_token", None) is not None,
    )


@contextmanager
def _no_retries_without_network() -> Iterator[None]:
    """Let the hub's client look at its cache alone where its server has no address: it would retry for a minute."""
    host = urlparse(constants.ENDPOINT).hostname or ""
    before = constants.HF_HUB_OFFLINE
    try:
        if not getproxies():
            socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
