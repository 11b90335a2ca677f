"""Masked image modelling: SimMIM (arXiv:2111.09886) and MAE (arXiv:2111.06377)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harmonize.functional import masking
from harmonize.functional.reconstruction import masked_l1, masked_mse, normalize_patches, patchify
from harmonize.functional.seeding import uniform
from harmonize.objectives.chunks import in_chunks
from harmonize.objectives.decoders import LinearDecoder, ViTDecoder
from harmonize.types import Batch, Encoder, ObjectiveOutput, Progress


class MaskedPrediction(nn.Module):
    """What the two objectives share: hide patches, predict them, compare on the hidden ones.

    Args:
        encoder: The encoder to train.
        mask_ratio: Share to hide, in (0, 1).
        error: (prediction, target, mask) -> loss.
        recipe: Augmentation recipe of the view.
        images_at_once: Images of a batch that are encoded at a time, see ``in_chunks``; None: all of them.
    """

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float,
        error: Callable[[Tensor, Tensor, Tensor], Tensor],
        recipe: str,
        images_at_once: int | None,
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio={mask_ratio} must lie between 0 and 1, both excluded")
        self.mask_ratio = mask_ratio
        self.error = error
        self.images_at_once = images_at_once
        self.patch_size = encoder.spec.patch_size
        self.num_patches = encoder.spec.num_patches
        self.required_views = {"mim": recipe}

    def before_step(self, encoder: Encoder, progress: Progress) -> None:
        """Nothing to do: no state moves with the step."""

    def mask(self, seed: Tensor) -> Tensor:
        """The mask (B, N) of images with these seeds (B,), True = hidden."""
        raise NotImplementedError

    def encode(self, encoder: Encoder, images: Tensor, mask: Tensor) -> Tensor:
        """Tokens of images (B, 3, h, w) under a mask (B, N), prefix tokens first."""
        raise NotImplementedError

    def encode_beside(self, encoder: Encoder, images: Tensor, mask: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of images under a mask, and of other images (B, 3, h, w) as they are, in as few passes as possible."""
        return self.encode(encoder, images, mask), encoder(whole)

    def predict(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Patches (B, N, p * p * 3) predicted from the tokens of images under a mask (B, N)."""
        raise NotImplementedError

    def reconstruct(self, encoder: Encoder, images: Tensor, mask: Tensor) -> Tensor:
        """Predicted patches (B, N, p * p * 3) of images (B, 3, h, w) under a mask (B, N)."""
        return self.predict(self.encode(encoder, images, mask), mask)

    def target(self, images: Tensor) -> Tensor:
        """What should be predicted, (B, N, p * p * 3) in fp32."""
        return patchify(images, self.patch_size).float()

    def errors(self, tokens: Tensor, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of what is predicted from the tokens of images (B, 3, h, w) under a mask (B, N).

        Returns:
            The loss, and that of always predicting the mean colour; both scalars, means over images.
        """
        target = self.target(images)
        loss = self.error(self.predict(tokens, mask).float(), target, mask)
        return loss, self.error(torch.zeros_like(target), target, mask)

    def output(self, loss: Tensor, chance: Tensor) -> ObjectiveOutput:
        """What ``forward`` returns, from the errors of a batch."""
        return ObjectiveOutput(loss=loss, terms={"mim": loss}, stats={"chance_mim": chance})

    def forward(self, encoder: Encoder, batch: Batch, progress: Progress) -> ObjectiveOutput:
        """The loss of one micro-batch with one view under ``"mim"``."""

        def errors(images: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
            mask = self.mask(seed)
            return self.errors(self.encode(encoder, images, mask), images, mask)

        (images,) = batch.views["mim"]
        return self.output(*in_chunks(errors, self.images_at_once, images, batch.seed))


class MaskedImageModeling(MaskedPrediction):
    """SimMIM: hide square blocks behind a mask token, encode everything, predict the hidden pixels.

    Args:
        encoder: The encoder to train.
        mask_ratio: Share of mask units hidden, rounded up, in (0, 1).
        mask_unit: Side of a mask unit in px, a multiple of the patch size that divides the image; None: two patches.
        decoder: ``linear`` (SimMIM's) or ``vit``.
        decoder_width: Token dimension of the ViT decoder.
        decoder_depth: Blocks of the ViT decoder.
        decoder_heads: Attention heads of the ViT decoder.
        recipe: Augmentation recipe of the view.
        images_at_once: Images of a batch that are encoded at a time, see ``in_chunks``; None: all of them.

    Source: SimMIM ``models/simmim.py``, ``data/data_simmim.py``.
    """

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.6,
        mask_unit: int | None = None,
        decoder: str = "linear",
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        recipe: str = "simmim",
        images_at_once: int | None = None,
    ) -> None:
        super().__init__(encoder, mask_ratio, masked_l1, recipe, images_at_once)
        spec = encoder.spec
        mask_unit = mask_unit or 2 * spec.patch_size
        if mask_unit % spec.patch_size or any(side % mask_unit for side in spec.image_size):
            raise ValueError(
                f"mask_unit={mask_unit} must be a multiple of backbone.patch_size={spec.patch_size} "
                f"and divide the image size {spec.image_size}"
            )
        self.patches_per_unit = mask_unit // spec.patch_size
        self.unit_grid = (spec.image_size[0] // mask_unit, spec.image_size[1] // mask_unit)
        self.mask_token = nn.Parameter(torch.empty(1, 1, spec.width))  # 3-D: weight decay goes by the dimension
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.decoder: nn.Module
        if decoder == "linear":
            self.decoder = LinearDecoder(spec)
        elif decoder == "vit":
            self.decoder = ViTDecoder(spec, decoder_width, decoder_depth, decoder_heads)
        else:
            raise ValueError(f"decoder={decoder} must be one of linear, vit")

    def mask(self, seed: Tensor) -> Tensor:
        """Block masks (B, N) of images with these seeds (B,), True = hidden."""
        noise = uniform(seed, self.unit_grid[0] * self.unit_grid[1])
        return masking.block_mask(noise, self.unit_grid, self.patches_per_unit, self.mask_ratio)

    def encode(self, encoder: Encoder, images: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, P + N, D) of images with the mask token in the hidden places."""
        return encoder(images, mask, self.mask_token)

    def encode_beside(self, encoder: Encoder, images: Tensor, mask: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Both from one pass, in which the whole images hide nothing."""
        tokens = self.encode(encoder, torch.cat([images, whole]), torch.cat([mask, torch.zeros_like(mask)]))
        return tokens[: len(images)], tokens[len(images) :]

    def predict(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Predicted patches (B, N, p * p * 3)."""
        return self.decoder(tokens)


class MaskedAutoencoder(MaskedPrediction):
    """MAE: encode the visible patches only, let a ViT decoder predict the hidden ones.

    Args:
        encoder: The encoder to train.
        mask_ratio: Share of patches hidden, in (0, 1).
        norm_pix_loss: Normalise every target patch by its own mean and standard deviation.
        decoder_width: Token dimension of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        recipe: Augmentation recipe of the view.
        images_at_once: Images of a batch that are encoded at a time, see ``in_chunks``; None: all of them.

    Source: MAE ``models_mae.py``.
    """

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        recipe: str = "mae",
        images_at_once: int | None = None,
    ) -> None:
        super().__init__(encoder, mask_ratio, masked_mse, recipe, images_at_once)
        self.num_visible = int(self.num_patches * (1 - mask_ratio))
        if self.num_visible == 0:
            raise ValueError(f"mask_ratio={mask_ratio} hides all {self.num_patches} patches; lower it")
        self.norm_pix_loss = norm_pix_loss
        self.decoder = ViTDecoder(encoder.spec, decoder_width, decoder_depth, decoder_heads)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width).normal_(std=0.02))

    def mask(self, seed: Tensor) -> Tensor:
        """Random masks (B, N) of images with these seeds (B,), True = hidden."""
        return masking.random_mask(uniform(seed, self.num_patches), self.mask_ratio)

    def encode(self, encoder: Encoder, images: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, P + K, D) of the visible patches, in ascending order."""
        return encoder.encode_visible(images, masking.visible(mask, self.num_visible))

    def predict(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Predicted patches (B, N, p * p * 3)."""
        return self.decoder(tokens, masking.visible(mask, self.num_visible), self.mask_token)

    def target(self, images: Tensor) -> Tensor:
        """Pixels of the patches, normalised per patch with ``norm_pix_loss``."""
        patches = super().target(images)
        return normalize_patches(patches) if self.norm_pix_loss else patches
