"""One call of a module, intercepted, and what modules return.

What a module returns is passed around as it is: a tensor, or tuples, lists and dictionaries of tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .clock import Step
from .layout import Branches
from .site import Site

Output = Any  # a tensor, or tuples, lists, dictionaries and output objects of tensors


@dataclass(slots=True)
class Call:
    """One call of a site's module, intercepted.

    Attributes:
        site, step: where and when.
        forward: what comes next: the inner decision, or the module itself.
        args, kwargs: what the caller passed.
        branches: the guidance branches of the batch; `None` in the first step where nobody declared them yet.
        module: the module itself.
        alone: runs the module past every decision about it and about the sites inside; nothing of it is traced.
        method: the method whose decision this is, as it was fitted to the model.
        notes: what the method wrote down in this generation; it outlives the memory, so no large tensor stays in it.
    """

    site: Site
    step: Step
    forward: Callable[..., Output]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    branches: Branches | None
    module: nn.Module | None = None
    alone: Callable[..., Output] | None = None
    method: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Output:
        """Run what comes next on the arguments as they are."""
        return self.forward(*self.args, **self.kwargs)

    @property
    def tokens(self) -> Tensor:
        """The features that enter the site: the first argument, or the one called `hidden_states` or `sample`."""
        if self.args:
            return self.args[0]  # type: ignore[no-any-return]
        kwargs = self.kwargs
        return kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["sample"]  # type: ignore[no-any-return]


def map_tensors(value: Output, change: Callable[[Tensor], Tensor]) -> Output:
    """Apply a change to every tensor in nested tuples, lists, dictionaries and output objects; leave the rest."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):  # diffusers' output objects are ordered dictionaries too
        return type(value)(**{key: map_tensors(item, change) for key, item in value.items()})
    return value
