"""The hybrid of arXiv:2305.00729: ``L = (1 - lambda) * L_MIM + lambda * L_CL`` on one encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from harmonize.functional.schedules import weight_schedule
from harmonize.functional.seeding import mix
from harmonize.objectives.contrastive import Contrastive
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
    ) -> None:
        super().__init__()
        if mim_view not in ("own", "contrastive"):
            raise ValueError(f"mim_view={mim_view} must be one of own, contrastive")
        if contrastive_input not in ("clean", "masked"):
            raise ValueError(f"contrastive_input={contrastive_input} must be one of clean, masked")
        self.weight = weight_schedule(lambda_)
        self.share_view = mim_view == "contrastive"
        self.mask_contrastive = contrastive_input == "masked"
        self.scheduled = isinstance(lambda_, Mapping)
        state = torch.get_rng_state()
        self.mim = self.contrastive = None
        if lambda_ != 1 or self.mask_contrastive:  # masked queries need MIM's masks and its mask token
            self.mim = mim(encoder)
            self.mim.decoder.requires_grad_(lambda_ != 1)
            torch.set_rng_state(state)
        if lambda_ != 0 or self.share_view:  # a shared view needs the contrastive recipe
            self.contrastive = contrastive(encoder)
            if lambda_ == 0:
                self.contrastive.requires_grad_(False)

        self.required_views: dict[str, str] = {}
        if self.contrastive is not None:
            self.required_views |= self.contrastive.required_views
        if self.mim is not None and lambda_ != 1 and not self.share_view:
            self.required_views |= self.mim.required_views

    def before_step(self, encoder: Encoder, progress: Progress) -> None:
        """Move the momentum network, also in steps whose contrastive weight is 0."""
        if self.contrastive is not None:
            self.contrastive.before_step(encoder, progress)

    def forward(self, encoder: Encoder, batch: Batch, progress: Progress) -> ObjectiveOutput:
        """The weighted loss of one micro-batch, with both raw terms."""
        weight = self.weight(progress.fraction)
        outputs: list[tuple[float, ObjectiveOutput]] = []
        if weight < 1:
            assert self.mim is not None
            mim_batch = replace(batch, views={"mim": batch.views["contrastive"][:1]}) if self.share_view else batch
            outputs.append((1 - weight, self.mim(encoder, mim_batch, progress)))
        if weight > 0:
            assert self.contrastive is not None
            encode = partial(self._encode_masked, encoder, batch.seed) if self.mask_contrastive else None
            outputs.append((weight, self.contrastive(encoder, batch, progress, encode)))
        loss = torch.stack([share * output.loss for share, output in outputs]).sum()
        terms: dict[str, Tensor] = {}
        stats: dict[str, Tensor | float] = {"lambda": weight}
        for _, output in outputs:
            terms |= output.terms
            stats |= output.stats
        return ObjectiveOutput(loss=loss, terms=terms, stats=stats)

    def _encode_masked(self, encoder: Encoder, seed: Tensor, views: Tensor) -> Tensor:
        """Tokens of both contrastive views (2B, 3, h, w), each under a mask of its own."""
        assert self.mim is not None
        mask = self.mim.mask(torch.cat([mix(seed, view) for view in (1, 2)]))
        return self.mim.encode(encoder, views, mask)
