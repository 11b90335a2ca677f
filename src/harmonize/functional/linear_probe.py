"""Multinomial logistic regression on standardised features, fitted to convergence.

A convex problem with one minimum: no learning rate, no epochs, no seed can change its answer, which is what a probe
that is read at every validation epoch needs. Protocols of the papers, with their own optimisers, are evaluations of
their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier.

    Attributes:
        weight: (C, F), for standardised features.
        bias: (C,).
        mean: (F,) of the training features.
        std: (F,) of the training features; 1 where a feature is constant.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Class scores (M, C) of features (M, F)."""
        features = (features.to(self.weight.device).to(self.weight.dtype) - self.mean) / self.std
        return features @ self.weight.T + self.bias


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, l2: float = 1e-3, max_iterations: int = 200
) -> LinearProbe:
    """Minimise mean cross-entropy + l2/2 ||W||^2 over a linear classifier, from zero, by L-BFGS in fp64.

    Args:
        features: (N, F); standardised here, feature by feature.
        labels: (N,) int64 in [0, num_classes).
        num_classes: C.
        l2: Strength of the penalty on the weights (not the bias); keeps separable problems finite.
        max_iterations: Upper bound; the gradient tolerance of 1e-7 normally stops earlier.

    Returns:
        The probe, in fp64.

    >>> x, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    >>> fit_linear_probe(x, y, 2).logits(x).argmax(1).tolist()
    [0, 0, 1, 1]
    """
    # Apple's GPUs have no fp64.
    x = features.detach().to("cpu" if features.device.type == "mps" else features.device).double()
    labels = labels.to(x.device)
    mean, std = x.mean(0), x.std(0, correction=0)
    # A constant feature carries nothing: dividing by 1 leaves it at 0 instead of blowing up its rounding errors.
    std = torch.where(std > 1e-8 * (1 + mean.abs()), std, torch.ones_like(std))
    x = (x - mean) / std
    with torch.enable_grad():
        weight = x.new_zeros(num_classes, x.shape[1]).requires_grad_()
        bias = x.new_zeros(num_classes).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iterations,
            max_eval=2 * max_iterations,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight.T + bias, labels) + 0.5 * l2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return LinearProbe(weight.detach(), bias.detach(), mean, std)
