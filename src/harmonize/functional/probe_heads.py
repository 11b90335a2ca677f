"""Many linear classifiers on one frozen feature, trained together on the same mini-batches.

DINOv2 trains a grid of heads, one per learning rate and feature, in a single run over the images. Heads on the same
feature share the batch, so their weights are stacked: one matrix product gives the logits of all, one their gradients.
Nothing couples the heads (each has its own cross-entropy, no gradient norm is taken over several), so each is trained
as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OPTIMIZERS = ("sgd", "lars")
BATCH_NORM_EPS = 1e-6
BATCH_NORM_MOMENTUM = 0.1
LARS_TRUST = 0.001


class HeadStack:
    """L linear classifiers on one feature, trained by SGD with momentum or by LARS on the cross-entropy of hard labels.

    All heads start from the same weights: what tells them apart is their learning rate and weight decay, and a head
    becomes the same whichever others are trained beside it.

    SGD is that of ``torch.optim.SGD``, weight decay on the biases included. LARS is MAE's: neither weight decay nor
    trust ratio for the biases, norms taken head by head. The BatchNorm in front of the heads is MAE's as well: without
    affine parameters, hence one for all heads; eps 1e-6; batch statistics in :meth:`step`, running ones (momentum 0.1)
    in :meth:`logits`.

    Args:
        num_features: F.
        num_classes: C.
        lrs: Learning rate of each head.
        weight_decays: Weight decay of each head, or one for all.
        optimizer: ``sgd`` or ``lars``.
        momentum: Of the optimiser, without dampening.
        batch_norm: Whether a BatchNorm stands in front of the heads.
        init_std: Standard deviation of the initial weights, drawn from a normal distribution; biases start at 0.
        generator: For the initial weights; on the CPU, so that a seed means the same on every device.
        dtype: ``torch.float32`` or ``torch.float64``; features of another type are converted.
        device: Where to train; features and labels must be there.

    Attributes:
        weight: (L, C, F).
        bias: (L, C).
        running_mean: (F,), 0 without BatchNorm.
        running_var: (F,), unbiased; 1 without BatchNorm.

    Raises:
        ValueError: No head, as many weight decays as neither 1 nor L, or an unknown optimiser.

    Source:
        DINOv2 ``eval/linear.py`` (the grid), MAE ``main_linprobe.py`` and ``util/lars.py``.

    >>> heads = HeadStack(2, 2, lrs=(0.1, 1.0), init_std=0.0)
    >>> heads.step(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    >>> heads.weight[1]
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    >>> heads.logits(torch.tensor([[4.0, 0.0]]))[:, 0]
    tensor([[ 0.1000, -0.1000],
            [ 1.0000, -1.0000]])
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        lrs: Sequence[float],
        weight_decays: float | Sequence[float] = 0.0,
        optimizer: str = "sgd",
        momentum: float = 0.9,
        batch_norm: bool = False,
        init_std: float = 0.01,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not lrs:
            raise ValueError("lrs=[] must name at least one learning rate.")
        decays = [weight_decays] if isinstance(weight_decays, (int, float)) else list(weight_decays)
        if len(decays) not in (1, len(lrs)):
            raise ValueError(f"weight_decays={decays} must be one for all heads or one for each of {len(lrs)}.")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer} must be one of {', '.join(OPTIMIZERS)}.")
        self.optimizer, self.momentum, self.batch_norm = optimizer, momentum, batch_norm
        shape = len(lrs), num_classes, num_features
        one = torch.randn(shape[1:], generator=generator, dtype=dtype) * init_std
        self.weight = one.to(device).expand(shape).clone()
        self.bias = self.weight.new_zeros(shape[:2])
        self.weight_momentum = torch.zeros_like(self.weight)
        self.bias_momentum = torch.zeros_like(self.bias)
        self.running_mean = self.weight.new_zeros(num_features)
        self.running_var = self.weight.new_ones(num_features)
        self._lr = self.weight.new_tensor(list(lrs))
        self._decay = self.weight.new_tensor(decays).expand(len(lrs))
        self._decays = any(decays)  # without weight decay a pass over the weights is saved
        self._weight_gradient = torch.empty_like(self.weight)
        self._buffers = [self.weight.new_empty(0)] * 2

    @torch.no_grad()
    def step(
        self,
        features: Tensor,
        labels: Tensor,
        scale: float = 1.0,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """One step of every head on one batch.

        Args:
            features: (B, F); a slice of the columns of a wider matrix need not be copied.
            labels: (B,) int64 in [0, C).
            scale: Factor of every learning rate, from the schedule.
            reduce: Applied to each gradient, to average it over ranks. Statistics of BatchNorm stay those of the
                rank's own batch, as in MAE.

        Raises:
            ValueError: With BatchNorm, a batch of one.
        """
        x = features.to(self.weight.dtype)
        if self.batch_norm:
            x = F.batch_norm(
                x, self.running_mean, self.running_var, None, None, True, BATCH_NORM_MOMENTUM, BATCH_NORM_EPS
            )
        (num_heads, num_classes, num_features), batch = self.weight.shape, len(x)
        if len(self._buffers[0]) < batch:  # kept from step to step: fresh memory costs as much as the product
            self._buffers = [x.new_empty(batch, num_heads * num_classes) for _ in range(2)]
        logits, error = (buffer[:batch] for buffer in self._buffers)
        torch.addmm(self.bias.view(-1), x, self.weight.view(-1, num_features).T, out=logits)
        # The gradient of the mean cross-entropy by the logits is (softmax - one-hot) / B; the 1 / B comes below.
        by_head = error.view(batch, num_heads, num_classes)
        torch.softmax(logits.view_as(by_head), dim=2, out=by_head)
        by_head.scatter_(2, labels[:, None, None].expand(-1, num_heads, 1), -1.0, reduce="add")
        weight_gradient, bias_gradient = self._weight_gradient, error.sum(0).div_(batch).view_as(self.bias)
        flat = weight_gradient.view(-1, num_features)
        torch.addmm(flat, error.T, x, beta=0, alpha=1 / batch, out=flat)
        if reduce is not None:
            weight_gradient, bias_gradient = reduce(weight_gradient), reduce(bias_gradient)
        self._update(weight_gradient, bias_gradient, scale)

    def _update(self, weight_gradient: Tensor, bias_gradient: Tensor, scale: float) -> None:
        """Momentum and descent; the gradient of the weights is overwritten."""
        decay, rate = self._decay[:, None, None], -scale * self._lr[:, None, None]
        if self._decays:
            weight_gradient.addcmul_(self.weight, decay)
            if self.optimizer == "sgd":
                bias_gradient = bias_gradient.addcmul(self.bias, decay[:, 0])
        if self.optimizer == "lars":
            weight_gradient.mul_(_trust(self.weight, weight_gradient)[:, None, None])
        self.weight_momentum.mul_(self.momentum).add_(weight_gradient)
        self.bias_momentum.mul_(self.momentum).add_(bias_gradient)
        self.weight.addcmul_(self.weight_momentum, rate)
        self.bias.addcmul_(self.bias_momentum, rate[:, 0])

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Class scores (L, B, C) of features (B, F), with the running statistics of BatchNorm."""
        x = features.to(self.weight.dtype)
        if self.batch_norm:
            x = F.batch_norm(x, self.running_mean, self.running_var, eps=BATCH_NORM_EPS)
        scores = torch.addmm(self.bias.view(-1), x, self.weight.view(-1, self.weight.shape[2]).T)
        return scores.view(len(x), *self.bias.shape).transpose(0, 1)

    def fold(self, index: int) -> tuple[Tensor, Tensor]:
        """One head as a plain linear layer, BatchNorm folded in.

        Args:
            index: Of the head.

        Returns:
            Weight (C, F) and bias (C,), copies, with weight @ x + bias equal to :meth:`logits` but for rounding.
        """
        weight, bias = self.weight[index].clone(), self.bias[index].clone()
        if self.batch_norm:
            weight *= (self.running_var + BATCH_NORM_EPS).rsqrt()
            bias -= weight @ self.running_mean
        return weight, bias

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that training changes; a stack that loads them goes on as if never interrupted."""
        return {name: value.clone() for name, value in self._state().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: Other names or shapes than this stack has.
        """
        own = self._state()
        shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (state, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"The state has {shapes[0]}, these heads need {shapes[1]}.")
        for name, value in own.items():
            value.copy_(state[name])

    def _state(self) -> dict[str, Tensor]:
        names = ("weight", "bias", "weight_momentum", "bias_momentum", "running_mean", "running_var")
        return {name: getattr(self, name) for name in names}


def _trust(weight: Tensor, gradient: Tensor) -> Tensor:
    """LARS's factor of each head's gradient (L,): trust |w| / |g|, or 1 where one of the norms is 0; (L, C, F) both.

    >>> _trust(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.5]], [[1.0, 1.0]]]))
    tensor([0.0100, 1.0000])
    """
    norms = [x.flatten(1).norm(dim=1) for x in (weight, gradient)]
    return torch.where((norms[0] > 0) & (norms[1] > 0), LARS_TRUST * norms[0] / norms[1], 1.0)
