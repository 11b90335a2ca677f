"""Contrastive learning: MoCo v3 (arXiv:2104.02057)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from harmonize.functional import schedules
from harmonize.functional.contrastive import chance_level, embedding_std, info_nce
from harmonize.functional.distributed import gather, rank, world_size
from harmonize.objectives.chunks import in_chunks
from harmonize.objectives.heads import mlp_head
from harmonize.types import Batch, Encoder, ObjectiveOutput, Progress


class Contrastive(nn.Module):
    """MoCo v3: each view predicts the momentum network's embedding of the other, against all other images.

    ``L = ctr(q1, k2) + ctr(q2, k1)`` with ``ctr`` = InfoNCE times 2 tau over the keys of all ranks.

    Args:
        encoder: The encoder to train; its momentum copy (without DropPath) lives here.
        temperature: tau > 0.
        momentum: Momentum of the copy's moving average at the start.
        momentum_schedule: ``cosine`` raises it to 1 over training, ``constant`` does not.
        hidden_dim: Hidden width of projector and predictor.
        out_dim: Width of the embedding.
        projector_layers: Linear layers of the projector.
        predictor_layers: Linear layers of the predictor.
        pool: Feature that is projected: ``cls`` or ``patch_mean``.
        recipe: Augmentation recipe of the two views.
        images_at_once: Images of a batch that are encoded at a time, see ``in_chunks``; None: all of them.

    Source: MoCo v3 ``moco/builder.py``, ``main_moco.py``.
    """

    def __init__(
        self,
        encoder: Encoder,
        temperature: float = 0.2,
        momentum: float = 0.99,
        momentum_schedule: str = "cosine",
        hidden_dim: int = 4096,
        out_dim: int = 256,
        projector_layers: int = 3,
        predictor_layers: int = 2,
        pool: str = "cls",
        recipe: str = "moco_v3",
        images_at_once: int | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} must be a number between 0 and 1")
        if momentum_schedule not in ("cosine", "constant"):
            raise ValueError(f"momentum_schedule={momentum_schedule} must be one of cosine, constant")
        if pool not in ("cls", "patch_mean"):
            raise ValueError(f"pool={pool} must be one of cls, patch_mean")
        if pool == "cls" and not encoder.spec.has_class_token:
            raise ValueError("pool=cls needs backbone.class_token=true; without a class token use pool=patch_mean")
        self.temperature = temperature
        self.momentum = momentum
        self.momentum_schedule = momentum_schedule
        self.pool = pool
        self.images_at_once = images_at_once
        self.num_prefix_tokens = encoder.spec.num_prefix_tokens
        self.required_views = {"contrastive": recipe}
        self.projector = mlp_head(encoder.spec.width, hidden_dim, out_dim, projector_layers)
        self.predictor = mlp_head(out_dim, hidden_dim, out_dim, predictor_layers)
        self.momentum_encoder = copy.deepcopy(encoder)
        self.momentum_projector = copy.deepcopy(self.projector)
        for parameter in (*self.momentum_encoder.parameters(), *self.momentum_projector.parameters()):
            parameter.requires_grad_(False)
        module: Any
        for module in self.momentum_encoder.modules():
            if hasattr(module, "drop_prob"):  # a stochastic teacher would be another method
                module.drop_prob = 0.0

    def momentum_at(self, progress: Progress) -> float:
        """The moving average's momentum at this optimiser step."""
        if self.momentum_schedule == "constant":
            return self.momentum
        return schedules.momentum(progress.fraction, self.momentum)

    @torch.no_grad()
    def before_step(self, encoder: Encoder, progress: Progress) -> None:
        """Move the momentum network towards the trained one; parameters only, in place, in fp32."""
        weight = 1 - self.momentum_at(progress)
        for averaged, trained in (
            (self.momentum_encoder, encoder),
            (self.momentum_projector, self.projector),
        ):
            torch._foreach_lerp_(list(averaged.parameters()), list(trained.parameters()), weight)

    def pooled(self, tokens: Tensor) -> Tensor:
        """The feature (B, D) of tokens (B, P + N, D) that is projected; patches may be left out."""
        return tokens[:, 0] if self.pool == "cls" else tokens[:, self.num_prefix_tokens :].mean(dim=1)

    def _features(self, encoder: Encoder, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The feature (B, D) of each view, from one pass through the encoder."""
        return self.pooled(encoder(torch.cat(views))).chunk(len(views))

    def forward(
        self,
        encoder: Encoder,
        batch: Batch,
        progress: Progress,
        features: tuple[Tensor, ...] | None = None,
    ) -> ObjectiveOutput:
        """The loss of one micro-batch.

        Args:
            encoder: The encoder to train.
            batch: With two views under ``"contrastive"``.
            progress: For the statistics.
            features: What becomes the queries, (B, D) for each view, where the views have been encoded already.

        Returns:
            The loss, its raw term ``"contrastive"``, and the statistics of queries and keys.
        """
        views = batch.views["contrastive"]
        if features is None:
            features = in_chunks(lambda *some: self._features(encoder, some), self.images_at_once, *views)
        q1, q2 = (self.predictor(self.projector(feature)) for feature in features)  # BatchNorm: view by view
        with torch.no_grad():
            features = in_chunks(lambda *some: self._features(self.momentum_encoder, some), self.images_at_once, *views)
            k1, k2 = map(self.momentum_projector, features)
        offset = len(q1) * rank()
        with torch.autocast(q1.device.type, enabled=False):
            loss12, accuracy12 = info_nce(q1, gather(k2.float()), self.temperature, offset)
            loss21, accuracy21 = info_nce(q2, gather(k1.float()), self.temperature, offset)
            loss = loss12 + loss21
            with torch.no_grad():
                stats = {
                    "contrastive_accuracy": (accuracy12 + accuracy21) / 2,
                    "query_std": embedding_std(q1),
                    "key_std": embedding_std(k1),
                    "query_norm": q1.float().norm(dim=1).mean(),
                    "chance_contrastive": chance_level(self.temperature, len(q1) * world_size()),
                    "momentum": self.momentum_at(progress),
                }
        return ObjectiveOutput(loss=loss, terms={"contrastive": loss}, stats=stats)
