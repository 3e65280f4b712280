"""Counting multiply-adds while something runs, with PyTorch's own counter, in two conventions.

The convention of most papers leaves out attention's two products. Which operator a product becomes does not tell: a
linear layer on features that do not lie in order is a batched product as well. What was called from Python does.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from .unit import Macs


class Counting:
    """A context in which multiply-adds are counted, on any device, the meta device included."""

    def __init__(self) -> None:
        self._contexts = ExitStack()
        self._attention = _Attention()
        self._products: dict[str, int] = defaultdict(int)  # of attention, in operations, by module
        # PyTorch's table of countable operations lacks the fused attention kernel of the CPU.
        formulas = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
        noting = {operator: self._noting(formula) for operator, formula in formulas.items()}
        self._counter = FlopCounterMode(display=False, custom_mapping=noting)

    def _noting(self, formula: Callable[..., int]) -> Callable[..., int]:
        def noting(*args: Any, **kwargs: Any) -> int:
            operations = formula(*args, **kwargs)
            if self._attention.inside:
                for module in set(self._counter.mod_tracker.parents):
                    self._products[module] += operations
            return operations

        noting._get_raw = True  # type: ignore[attr-defined]  # the tensors themselves: formulas take their shapes
        return noting

    def __enter__(self) -> Self:
        self._contexts.enter_context(self._attention)
        self._contexts.enter_context(self._counter)
        return self

    def __exit__(self, *_: object) -> None:
        self._contexts.close()

    def macs(self, rows: int = 1) -> dict[str, Macs]:
        """What was counted, by module as the counter names it ("Global" is everything), for one of so many rows."""
        counts = {str(name): sum(operators.values()) for name, operators in self._counter.get_flop_counts().items()}
        return {
            name: Macs(flops // 2 // rows, (flops - self._products[name]) // 2 // rows)
            for name, flops in counts.items()
        }


class _Attention(TorchFunctionMode):
    """Knows whether a product of two tensors of features is being computed."""

    _FUNCTIONS = (torch.nn.functional.scaled_dot_product_attention, torch.bmm, torch.baddbmm)

    def __init__(self) -> None:
        super().__init__()
        self.inside = False

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer, self.inside = self.inside, self.inside or function in self._FUNCTIONS
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.inside = outer


def _cpu_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]
