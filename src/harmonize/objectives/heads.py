"""MoCo v3's projector and predictor, with batch statistics over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harmonize.functional.distributed import all_reduce_sum, world_size


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm whose training statistics are those of the global batch, on CPU (gloo) as on GPU.

    PyTorch's own SyncBatchNorm refuses CPU tensors. With one rank this is ``nn.BatchNorm1d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C) per channel."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input.float()
        count = len(x) * world_size()  # the sampler gives every rank the same number
        # two passes: E[x^2] - E[x]^2 in fp32 would lose digits
        mean = all_reduce_sum(x.sum(dim=0)) / count
        variance = all_reduce_sum((x - mean).square().sum(dim=0)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        output = (x - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            output = output * self.weight + self.bias
        return output.to(input.dtype)


def mlp_head(in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> nn.Sequential:
    """Linear layers without bias, each followed by BatchNorm; ReLU between them, the last BatchNorm without affine.

    Source: MoCo v3 ``moco/builder.py`` (``_build_mlp``).
    """
    layers: list[nn.Module] = []
    for index in range(num_layers):
        last = index == num_layers - 1
        layers.append(nn.Linear(in_dim, out_dim if last else hidden_dim, bias=False))
        layers.append(BatchNorm(out_dim if last else hidden_dim, affine=not last))
        if not last:
            layers.append(nn.ReLU(inplace=True))
        in_dim = hidden_dim
    return nn.Sequential(*layers)
