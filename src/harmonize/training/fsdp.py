"""Fully sharded data parallel training: every rank keeps its share of weights, gradients and moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from harmonize.functional.distributed import whole
from harmonize.training.compilation import transformer_blocks
from harmonize.training.module import PretrainModule


class FSDPStrategy(DDPStrategy):
    """``trainer.strategy=fsdp``: lightning's processes, torch's ``fully_shard``.

    Between steps a rank holds ``1 / ranks`` of every weight, momentum copies included, of its gradient and of Adam's
    moments. A Transformer block is put together while it computes; all other weights for a whole step, or for a whole
    validation, so that callbacks may call the encoder as they like. Checkpoints are those of one process: a run goes on
    with another strategy, or another number of ranks.

    Lightning's own ``ModelParallelStrategy`` is not used, since its checkpoints name and lay out the moments otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self._forward_redirection = _ForwardRedirection()

    def configure_ddp(self) -> None:
        """Shard the module, before lightning asks for its optimiser, and let the optimiser hold the shards."""
        module = self.lightning_module
        assert isinstance(module, PretrainModule)
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        before = dict(module.named_parameters())
        for block in transformer_blocks(module):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        shards = dict(module.named_parameters())
        of = {id(parameter): shards[name] for name, parameter in before.items()}
        for group in module.optimization.optimizer.param_groups:
            group["params"] = [of[id(parameter)] for parameter in group["params"]]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """By way of the module's ``__call__``, where ``fully_shard`` listens."""
        return self._forward_redirection(self.model, self.lightning_module, "training_step", *args, **kwargs)  # type: ignore[arg-type]

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The same: blocks that run before the module has run as a whole would take themselves for the whole."""
        return self._forward_redirection(self.model, self.lightning_module, "validation_step", *args, **kwargs)  # type: ignore[arg-type]

    def on_validation_start(self) -> None:
        """Put the weights outside of blocks together."""
        self.model.unshard()  # type: ignore[operator, union-attr]

    def on_validation_end(self) -> None:
        """Take them apart."""
        self.model.reshard()  # type: ignore[operator, union-attr]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors, under the names of one process; every rank must call it, and may want to keep them."""
        return {name: _on_cpu(value) for name, value in super().lightning_module_state_dict().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Whole moments, as of one process, on rank 0, which alone writes them; every rank must call it."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        moments: dict[int, dict[str, Any]] = {}
        for i, entry in state["state"].items():
            found = {key: _on_cpu(value) for key, value in entry.items()}
            if self.is_global_zero:
                moments[i] = found
        return {**state, "state": moments}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep this rank's share of whole moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {i: _share(entry, parameters[i]) for i, entry in state["state"].items()}
            optimizer.load_state_dict({**state, "state": moments})


def _on_cpu(value: Any) -> Any:
    return whole(value).cpu() if isinstance(value, DTensor) else value


def _share(entry: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """One parameter's moments, shared out as the parameter is; the number of steps is everybody's."""
    assert isinstance(parameter, DTensor)

    def share(value: Tensor) -> Tensor:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    return {key: share(value) if value.shape == parameter.shape else value for key, value in entry.items()}
