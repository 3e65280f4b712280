"""What methods on long skips share: the blocks they ask about, what they ask of a model, the window of timesteps.

Skip-Cache (Chen et al., 2024, https://arxiv.org/abs/2411.17616) runs the first and the last k blocks at every step, and
everything in between at full steps only.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from .clock import Step
from .front import Front
from .layout import argument_reader
from .method import Method
from .site import Kind, Site

_TRAINED = 1000  # timesteps of training, in all families; larger timesteps are noisier


class LongSkips(Method):
    """A method on blocks joined by long skips, with Skip-Cache's window."""

    depth: int
    start_timestep: float
    stop_timestep: float

    kinds: ClassVar = frozenset({Kind.BLOCK})
    reads_timestep: ClassVar = True
    idle_reason: ClassVar = "no step is partial: so few steps leave none in the window, or the interval is 1."

    def check_window(self) -> None:
        """Both bounds of the window are timesteps, in order.

        Raises:
            TypeError: one is no number.
            ValueError: one is out of range.
        """
        start, stop = self.start_timestep, self.stop_timestep
        for name, value in (("start_timestep", start), ("stop_timestep", stop)):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 < start <= _TRAINED:
            raise ValueError(f"start_timestep must be above 0 and at most {_TRAINED}, got {start}")
        if not 0 <= stop < start:
            raise ValueError(f"stop_timestep must be at least 0 and below start_timestep ({start}), got {stop}")

    def asks(self, site: Site) -> bool:
        """Blocks joined by long skips."""
        return site.kind in self.kinds and site.depth is not None

    def check(self, sites: Sequence[Site], model: str) -> None:
        """It needs long skips, two blocks for each, and as many as are recomputed."""
        blocks = max((site.blocks for site in sites if self.asks(site)), default=0)
        if not blocks:
            raise ValueError(
                f"{self} needs blocks joined by long skip connections; {model} has none. DeepCache works on U-Nets, "
                "FORA and DeltaDiT on other transformers."
            )
        if blocks % 2:
            raise ValueError(f"{self} pairs the first half of the blocks with the second; {model} has {blocks}.")
        if self.depth > blocks // 2 - 1:
            raise ValueError(f"{self}: with {blocks} blocks, as {model} has, depth is 1 to {blocks // 2 - 1}.")

    def fit(self, denoiser: nn.Module, pipe: object = None) -> Self:  # noqa: ARG002
        """Every recomputed pair needs its skip: our networks may join the outermost pairs only.

        Raises:
            ValueError: a pair has none.
        """
        pairs = getattr(getattr(denoiser, "config", None), "skip_pairs", None)  # none: all of them, or another network
        if pairs is not None and self.depth > pairs:
            raise ValueError(
                f"{self} computes {self.depth} blocks at each end at every step, but this {type(denoiser).__name__} "
                f"joins only the outermost {pairs} pairs of blocks: depth is 1 to {pairs}."
            )
        return self

    def install(self, denoiser: nn.Module, present: Callable[[], Step]) -> Callable[[], None]:  # noqa: ARG002
        """Look at the timesteps of every batch: what is kept of one timestep serves no row of another.

        The denoiser raises ValueError where they differ.
        """
        named = argument_reader(type(denoiser).forward)

        def checked(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                t = named(args, kwargs).get("timestep")
                if isinstance(t, Tensor) and _several(t):
                    raise ValueError(
                        f"{self} goes by the timestep of a step, but the rows of this batch have several: "
                        f"{', '.join(f'{value:g}' for value in sorted(set(t.flatten().tolist())))}. Sample them apart."
                    )
                return original(*args, **kwargs)

            return forward

        return Front(denoiser, "forward", checked).remove

    def full_every(self, interval: int, step: Step) -> bool:
        """Whether everything is computed at a step: on the grid, above the window, or after the first step below it.

        Raises:
            ValueError: no timestep is known, or the scheduler evaluates one twice.
        """
        t, previous = step.timestep, step.previous
        if t is None:
            raise ValueError(f"{self} goes by timesteps: plan(..., scheduler=one whose set_timesteps was called).")
        if t == previous:
            raise ValueError(
                f"{self} counts steps, but this scheduler evaluates timestep {t:g} twice. Use one with a single "
                "evaluation per step (DDPM, DDIM, DPM-Solver++, Euler)."
            )
        stopped = previous is not None and previous <= self.stop_timestep
        return step.index % interval == 0 or t >= self.start_timestep or stopped


def _several(t: Tensor) -> bool:
    """Whether timesteps differ. Asks nothing of the device where they are one, or one that was expanded."""
    return t.numel() > 1 and any(t.stride()) and not bool((t == t.flatten()[0]).all())
