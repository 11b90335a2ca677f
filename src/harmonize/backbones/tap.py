"""Looking inside a Vision Transformer while it computes: attention, per-head outputs and the residual stream.

Nothing is kept: each layer is shown to the visitor at the moment it exists, so that no two layers' N x N maps are ever
alive at the same time, and the forward pass is the network's own, fused attention included. Attention is read at the
public ``scaled_dot_product_attention``: hooks on ``attn_drop`` see nothing where attention is fused, and timm's
``set_fused_attn`` reaches only modules that are built later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harmonize.types import AttentionView, ConfigError, TokensView

Visit = Callable[[AttentionView | TokensView], None]


def visit_blocks(blocks: Iterable[nn.Module], forward: Callable[[], Tensor], visit: Visit, num_tokens: int) -> Tensor:
    """Run a network and show each layer to ``visit``, in the order in which they are computed.

    For each block, one :class:`AttentionView` and one :class:`TokensView` of stage ``attention`` and of stage ``mlp``;
    before the first block one of stage ``embedding``.

    Args:
        blocks: The network's blocks. The residual stream after attention is what enters a block's ``norm2`` or, where
            norms follow their branch, its ``mlp``.
        forward: Runs the network; it must call every block once, in order.
        visit: Called with each view; tensors in it are the network's own and must not be changed or kept.
        num_tokens: P + N.

    Returns:
        What ``forward`` returns.

    Raises:
        ConfigError: A block does not have one self-attention over all tokens followed by an MLP.
    """
    with ExitStack() as stack:
        blocks = list(blocks)
        for block in blocks:
            stack.enter_context(_fused(block))
        tap = _Tap(visit, num_tokens)
        for layer, block in enumerate(blocks, start=1):
            for handle in tap.attach(layer, block):
                stack.callback(handle.remove)
        stack.enter_context(tap)
        result = forward()
    if tap.finished != len(blocks):
        raise ConfigError(f"The network has {len(blocks)} blocks, of which its forward pass called {tap.finished}.")
    return result


class _Tap(TorchFunctionMode):
    """Sees every call of ``scaled_dot_product_attention`` while it is entered, and the blocks it is attached to."""

    def __init__(self, visit: Visit, num_tokens: int) -> None:
        super().__init__()
        self.visit, self.num_tokens = visit, num_tokens
        self.layer = self.finished = self.calls = 0
        self.block: nn.Module | None = None
        self.before: Tensor | None = None
        self.seen_middle = False

    def attach(self, layer: int, block: nn.Module) -> Iterator[Any]:
        """Hook a block; yields the handles."""
        middles = [part for name in ("norm2", "mlp") if isinstance(part := getattr(block, name, None), nn.Module)]
        if not middles:
            raise self._unfit(
                layer, block, "has no part named norm2 or mlp, so that attention and MLP cannot be told apart"
            )
        yield block.register_forward_pre_hook(lambda _, args, kwargs: self._enter(layer, block, args), with_kwargs=True)
        for part in middles:  # the first of the two that is called takes what attention has left
            yield part.register_forward_pre_hook(lambda _, args: self._after_attention(args[0]))
        yield block.register_forward_hook(lambda _module, _args, output: self._leave(output))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self.block is not None:
            self._attention(result, *args, **kwargs)
        return result

    def _enter(self, layer: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.layer, self.block, self.calls, self.seen_middle = layer, block, 0, False
        tokens = args[0]
        if not (isinstance(tokens, Tensor) and tokens.dim() == 3 and tokens.shape[1] == self.num_tokens):
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise self._unfit(layer, block, f"takes {shape}, not a list of {self.num_tokens} tokens for each image")
        self.before = tokens
        if layer == 1:
            self.visit(TokensView(0, "embedding", tokens))

    def _attention(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.calls += 1
        if self.calls > 1:
            raise self._wrong_number()
        if query.shape[-2] != self.num_tokens or key.shape[-2] != self.num_tokens or is_causal or enable_gqa:
            raise self._unfit(self.layer, self.block, "does not attend from all tokens to all tokens")
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(~attn_mask, float("-inf"))
        if attn_mask is not None and attn_mask.dim() < 4:
            attn_mask = attn_mask.expand(1, 1, *attn_mask.shape[-2:]) if attn_mask.dim() == 2 else attn_mask[None]
        if attn_mask is not None:  # one row for all queries, say
            attn_mask = attn_mask.expand(*attn_mask.shape[:2], self.num_tokens, self.num_tokens)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.visit(AttentionView(self.layer, query, key, output, attn_mask, scale))

    def _after_attention(self, tokens: Tensor) -> None:
        if self.block is None or self.seen_middle:
            return
        if self.calls != 1:
            raise self._wrong_number()
        self.seen_middle = True
        self.visit(TokensView(self.layer, "attention", tokens, self.before))

    def _leave(self, output: Tensor) -> None:
        if self.calls != 1:
            raise self._wrong_number()
        self.visit(TokensView(self.layer, "mlp", output, self.before))
        self.block = self.before = None
        self.finished += 1

    def _wrong_number(self) -> ConfigError:
        what = "more than one" if self.calls > 1 else "no"
        return self._unfit(
            self.layer, self.block, f"makes {what} call of scaled_dot_product_attention, where one is needed"
        )

    @staticmethod
    def _unfit(layer: int, block: nn.Module | None, reason: str) -> ConfigError:
        return ConfigError(f"Diagnostics cannot read this network: block {layer} ({type(block).__name__}) {reason}.")


@contextmanager
def _fused(block: nn.Module) -> Iterator[None]:
    """Let attention go through ``scaled_dot_product_attention`` where it was switched off (``TIMM_FUSED_ATTN=0``)."""
    switched = [m for m in block.modules() if getattr(m, "fused_attn", None) is False]
    for module in switched:
        module.fused_attn = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.fused_attn = False  # type: ignore[assignment]
