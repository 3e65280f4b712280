"""Decisions that run a network for several steps at once, where the later ones do not depend on their latents.

The batch is widened: within every guidance branch, the rows of the present step are followed by those of the next ones,
each with its own timestep. Sites whose output all these steps share run on the rows of the first. The predictions for
the steps ahead are remembered and handed out when their turn comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..decision import Call, Compute, Decision, Keep, Output, Slot, map_tensors, whole
from ..layout import Branches


@dataclass(frozen=True, slots=True)
class Ahead(Decision):
    """Run the denoiser for this step and the next ones; remember their predictions.

    Attributes:
        timesteps: of these steps, at least two; known where the plan was laid for a scheduler.
    """

    timesteps: tuple[float | None, ...]

    symbol: ClassVar[str] = ">"
    name: ClassVar[str] = "computed for the next steps too"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Widen every argument that holds rows, run, part the predictions.

        Raises:
            RuntimeError: nobody declared the guidance branches, or the pipeline transforms the timestep.
        """
        branches, width = _declared(call), len(self.timesteps)
        total = len(branches.roles) * branches.samples
        kwargs = {
            name: _widened(value, total, len(branches.roles), width) if name in branches.arguments else value
            for name, value in call.kwargs.items()
        }
        output = call.forward(**kwargs | {"timestep": self._times(call, branches)})
        steps = [map_tensors(output, partial(_of_step, len(branches.roles), width, step)) for step in range(width)]
        slot.put(tuple(steps[1:]), call)
        return steps[0]

    def _times(self, call: Call, branches: Branches) -> Tensor:
        """The timestep of every row of the widened batch; those ahead are known where this one is the scheduler's."""
        given = call.kwargs["timestep"]
        like = given if isinstance(given, Tensor) else torch.as_tensor(given, device=call.tokens.device)
        scale = getattr(getattr(call.module, "config", None), "timestep_scale", 1)  # Sana's pipeline multiplies by it
        times = like.new_tensor([t * scale for t in self.timesteps if t is not None])
        tolerance = 4 * torch.finfo(like.dtype).eps if like.is_floating_point() else 0.0
        if not torch.allclose(like, times[0].expand_as(like), rtol=tolerance, atol=0.0):
            raise RuntimeError(
                f"step {call.step.index}: {call.site} was called with timestep {float(like.flatten()[0]):.6g}, but the "
                f"scheduler's is {float(times[0]):.6g}: the pipeline transforms it, so those of the steps ahead "
                "cannot be known. Set batch_cap=1."
            )
        return times[None, :, None].expand(len(branches.roles), -1, branches.samples).flatten()

    @property
    def keeps(self) -> bool:
        """Always."""
        return True

    def kept_bytes(self, parts: Sequence[int], branches: int) -> int:
        """The predictions for the steps ahead."""
        return sum(parts) * (branches - branches // len(self.timesteps))

    def inner_branches(self, branches: int) -> int:
        """As many for every step."""
        return branches * len(self.timesteps)

    def inner_layout(self, branches: Branches) -> Branches:
        """Every branch has the samples of all steps."""
        return replace(branches, samples=branches.samples * len(self.timesteps))


@dataclass(frozen=True, slots=True)
class Handed(Decision):
    """Hand out the prediction that was computed ahead, so many steps ago."""

    place: int

    symbol: ClassVar[str] = "<"
    name: ClassVar[str] = "computed ahead"
    recalls: ClassVar[bool] = True
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall."""
        return slot.get(call)[self.place - 1]

    def fresh(self) -> Decision:
        """Run for this step alone."""
        return Compute()


@dataclass(frozen=True, slots=True)
class Once(Decision):
    """Run a site on the rows of the first of several steps, and give its output to all of them."""

    width: int
    keep: Keep | None = whole

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Narrow, run, repeat."""
        return _repeated(Compute(self.keep).apply(_narrowed(call, self.width), slot), call, self.width)

    @property
    def keeps(self) -> bool:
        """Whether a keep is asked for."""
        return self.keep is not None

    def bare(self) -> Decision:
        """Without keeping."""
        return Once(self.width, None)

    def kept_bytes(self, parts: Sequence[int], branches: int) -> int:
        """Those of one step."""
        return 0 if self.keep is None else self.keep.size(parts, branches // self.width)

    def share(self) -> float:
        """One step's."""
        return 1 / self.width


@dataclass(frozen=True, slots=True)
class Again(Decision):
    """Give what a site put out at an earlier step to several steps."""

    width: int
    keep: Keep

    symbol: ClassVar[str] = "."
    name: ClassVar[str] = "reused"
    recalls: ClassVar[bool] = True
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall and repeat."""
        return _repeated(slot.get(_narrowed(call, self.width)), call, self.width)

    def fresh(self) -> Decision:
        """Run on the rows of the first step."""
        return Once(self.width, self.keep)


def _declared(call: Call) -> Branches:
    if call.branches is None:
        raise RuntimeError(
            "steps can be computed ahead only where it is known which rows are which guidance branch; say "
            "attach(..., guidance=True), or False."
        )
    return call.branches


def _widened(value: Any, total: int, branches: int, width: int) -> Any:
    """Every tensor of `total` rows in a nested argument, repeated within each branch."""
    return map_tensors(value, lambda t: _repeat(t, branches, width) if t.ndim and len(t) == total else t)


def _repeat(tensor: Tensor, branches: int, width: int) -> Tensor:
    """(branches * B, ...) -> (branches * width * B, ...): branch by branch, in it step by step."""
    rows = tensor.reshape(branches, 1, -1, *tensor.shape[1:])
    return rows.expand(-1, width, *rows.shape[2:]).flatten(0, 2).contiguous()


def _of_step(branches: int, width: int, step: int, tensor: Tensor) -> Tensor:
    """The rows of one step, on their own: (branches * width * B, ...) -> (branches * B, ...)."""
    return torch.cat(list(tensor.reshape(branches, width, -1, *tensor.shape[1:])[:, step]))


def _narrowed(call: Call, width: int) -> Call:
    """The same call with the rows of the first step only."""
    branches = _declared(call)
    count = len(branches.roles)
    rows = (len(call.tokens), count * branches.samples)  # those of frames, if there are any, and those of videos

    def first(tensor: Tensor) -> Tensor:
        return _of_step(count, width, 0, tensor) if tensor.ndim and len(tensor) in rows else tensor

    def narrow(name: str, value: Any) -> Any:
        # Text may come with images, nested; other nested arguments (rotary embeddings, masks) hold no rows.
        nested = not isinstance(value, Tensor) and name != "encoder_hidden_states"
        return value if nested else map_tensors(value, first)

    kwargs = {name: narrow(name, value) for name, value in call.kwargs.items()}
    return replace(call, args=tuple(narrow("", value) for value in call.args), kwargs=kwargs)


def _repeated(output: Output, call: Call, width: int) -> Output:
    return map_tensors(output, lambda t: _repeat(t, len(_declared(call).roles), width))
