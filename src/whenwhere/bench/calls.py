"""Calls of a denoiser, noted while a pipeline runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Calls:
    """What the denoiser was called with and what it answered, one entry for every call of a run."""

    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class _Enough(Exception):  # noqa: N818  (no error: what was waited for has been seen)
    """Ends a run."""


@contextmanager
def noted(denoiser: nn.Module, count: int = 0) -> Iterator[Calls]:
    """Inside this block the denoiser's calls are noted; the run, and the block, end after `count` of them, unless 0."""
    calls = Calls()

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.inputs.append((args, dict(kwargs)))
        calls.outputs.append(output[0].detach().clone())
        if len(calls.outputs) == count:
            raise _Enough

    handle = denoiser.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    except _Enough:
        pass
    finally:
        handle.remove()
