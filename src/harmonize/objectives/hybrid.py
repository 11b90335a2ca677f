"""The hybrid of arXiv:2305.00729: ``L = (1 - lambda) * L_MIM + lambda * L_CL`` on one encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harmonize.functional.schedules import weight_schedule
from harmonize.functional.seeding import mix
from harmonize.objectives.chunks import in_chunks
from harmonize.objectives.contrastive import Contrastive
from harmonize.objectives.depth import ScaledByDepth, weights_by_depth
from harmonize.objectives.mim import MaskedPrediction
from harmonize.types import Batch, Encoder, ObjectiveOutput, Progress


class Hybrid(nn.Module):
    """Weights the two objectives; has no science of its own.

    A part whose weight is a constant 0 is not built: lambda = 0 IS the MIM run and lambda = 1 IS the contrastive run,
    bit for bit. Under a schedule a part is skipped in the steps in which its weight is 0. Both parts draw their
    initial weights from the same generator state, so each starts as it would alone, whatever lambda is.

    Args:
        encoder: The encoder to train.
        contrastive: Makes the contrastive objective from the encoder.
        mim: Makes the MIM objective from the encoder.
        lambda_: Weight of the contrastive loss: a number in [0, 1] or a schedule, see ``weight_schedule``.
        mim_view: ``own``: the MIM objective's own recipe; ``contrastive``: the first contrastive view.
        contrastive_input: ``clean``: queries see whole views; ``masked``: they see views masked as in MIM (keys
            always see whole views).
        lambda_by_depth: Weights of the contrastive loss over the depth of the encoder: one for each block, or a
            schedule whose start is at the first block and whose end at the last. Heads, decoder and the loss that is
            logged keep ``lambda_``, which must then be a number within (0, 1). None: ``lambda_`` for all blocks.
        share_views: Encode the masked view once for both parts: it is the first contrastive view, and its tokens make
            both the reconstruction and the first query. Where only one part has a weight there is nothing to share.

    Raises:
        ValueError: For a value outside these.
    """

    def __init__(
        self,
        encoder: Encoder,
        contrastive: Callable[[Encoder], Contrastive],
        mim: Callable[[Encoder], MaskedPrediction],
        lambda_: float | Mapping[str, float | str] = 0.2,
        mim_view: str = "own",
        contrastive_input: str = "clean",
        share_views: bool = False,
        lambda_by_depth: float | Mapping[str, float | str] | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if mim_view not in ("own", "contrastive"):
            raise ValueError(f"mim_view={mim_view} must be one of own, contrastive")
        if contrastive_input not in ("clean", "masked"):
            raise ValueError(f"contrastive_input={contrastive_input} must be one of clean, masked")
        if lambda_by_depth is not None and (isinstance(lambda_, Mapping) or not 0 < lambda_ < 1):
            raise ValueError(f"lambda={lambda_} must be a number between 0 and 1 with lambda_by_depth, both excluded")
        if lambda_by_depth is not None and share_views:
            raise ValueError("lambda_by_depth needs share_views=false: one pass has one gradient for both losses")
        self.weight = weight_schedule(lambda_)
        self.weight_by_depth = None
        if lambda_by_depth is not None:
            self.weight_by_depth = weights_by_depth(lambda_by_depth, encoder.spec.depth)
        self.share_views = share_views
        self.one_view = share_views or mim_view == "contrastive"
        self.mask_contrastive = contrastive_input == "masked"
        self.scheduled = isinstance(lambda_, Mapping)
        state = torch.get_rng_state()
        self.mim = self.contrastive = None
        if lambda_ != 1 or self.mask_contrastive:  # masked queries need MIM's masks and its mask token
            self.mim = mim(encoder)
            self.mim.decoder.requires_grad_(lambda_ != 1)
            torch.set_rng_state(state)
        if lambda_ != 0 or self.one_view:  # the one view is made by the contrastive recipe
            self.contrastive = contrastive(encoder)
            if lambda_ == 0:
                self.contrastive.requires_grad_(False)

        self.required_views: dict[str, str] = {}
        if self.contrastive is not None:
            self.required_views |= self.contrastive.required_views
        if self.mim is not None and lambda_ != 1 and not self.one_view:
            self.required_views |= self.mim.required_views

    def before_step(self, encoder: Encoder, progress: Progress) -> None:
        """Move the momentum network, also in steps whose contrastive weight is 0."""
        if self.contrastive is not None:
            self.contrastive.before_step(encoder, progress)

    def forward(self, encoder: Encoder, batch: Batch, progress: Progress) -> ObjectiveOutput:
        """The weighted loss of one micro-batch, with both raw terms."""
        weight = self.weight(progress.fraction)
        parts: list[tuple[float, ObjectiveOutput]]
        if self.share_views and 0 < weight < 1:
            mim, contrastive = self._share(encoder, batch, progress)
            parts = [(1 - weight, mim), (weight, contrastive)]
        else:
            parts = []
            for_mim, for_contrastive = self._by_depth(encoder, weight)
            if weight < 1:
                assert self.mim is not None
                mim_batch = replace(batch, views={"mim": batch.views["contrastive"][:1]}) if self.one_view else batch
                parts.append((1 - weight, self.mim(for_mim, mim_batch, progress)))
            if weight > 0:
                assert self.contrastive is not None
                features = self._masked_features(for_contrastive, batch) if self.mask_contrastive else None
                parts.append((weight, self.contrastive(for_contrastive, batch, progress, features)))
        loss = torch.stack([share * output.loss for share, output in parts]).sum()
        terms: dict[str, Tensor] = {}
        stats: dict[str, Tensor | float] = {"lambda": weight}
        for _, output in parts:
            terms |= output.terms
            stats |= output.stats
        return ObjectiveOutput(loss=loss, terms=terms, stats=stats)

    def _by_depth(self, encoder: Encoder, weight: float) -> tuple[Encoder, Encoder]:
        """The encoder as the MIM and as the contrastive part see it: with the depth's weight in place of ``weight``."""
        at = self.weight_by_depth
        if at is None:
            return encoder, encoder
        scaled: tuple[Any, Any] = (
            ScaledByDepth(encoder, lambda share: (1 - at(share)) / (1 - weight)),
            ScaledByDepth(encoder, lambda share: at(share) / weight),
        )
        return scaled

    def _share(self, encoder: Encoder, batch: Batch, progress: Progress) -> tuple[ObjectiveOutput, ObjectiveOutput]:
        """Both parts' outputs; the first contrastive view is encoded once, under MIM's mask."""
        mim, contrastive = self.mim, self.contrastive
        assert mim is not None
        assert contrastive is not None

        def encode(first: Tensor, second: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
            mask = mim.mask(seed)
            if self.mask_contrastive:
                both = torch.cat([mask, mim.mask(mix(seed, 2))])
                tokens = mim.encode(encoder, torch.cat([first, second]), both).chunk(2)
            else:
                tokens = mim.encode_beside(encoder, first, mask, second)
            return *map(contrastive.pooled, tokens), *mim.errors(tokens[0], first, mask)

        views = batch.views["contrastive"]
        *features, loss, chance = in_chunks(encode, contrastive.images_at_once, *views, batch.seed)
        return mim.output(loss, chance), contrastive(encoder, batch, progress, tuple(features))

    def _masked_features(self, encoder: Encoder, batch: Batch) -> tuple[Tensor, ...]:
        """Features (B, D) of both contrastive views, each under a mask of its own."""
        mim, contrastive = self.mim, self.contrastive
        assert mim is not None
        assert contrastive is not None

        def encode(first: Tensor, second: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
            mask = mim.mask(torch.cat([mix(seed, view) for view in (1, 2)]))
            return contrastive.pooled(mim.encode(encoder, torch.cat([first, second]), mask)).chunk(2)

        return in_chunks(encode, contrastive.images_at_once, *batch.views["contrastive"], batch.seed)
