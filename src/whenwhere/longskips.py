"""What methods on long skips share: the window of timesteps of Skip-Cache, and what they ask of a model.

Skip-Cache (Chen et al., 2024, https://arxiv.org/abs/2411.17616) runs the first and the last k blocks at every step, and
everything in between at full steps only.
"""

from collections.abc import Sequence

from torch import nn

from .clock import Step
from .site import Kind, Site

TRAINED = 1000  # timesteps of training, in all families; larger timesteps are noisier


def check_window(start_timestep: float, stop_timestep: float) -> None:
    """Both bounds are timesteps, in order.

    Raises:
        TypeError: one is no number.
        ValueError: one is out of range.
    """
    for name, value in (("start_timestep", start_timestep), ("stop_timestep", stop_timestep)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < start_timestep <= TRAINED:
        raise ValueError(f"start_timestep must be above 0 and at most {TRAINED}, got {start_timestep}")
    if not 0 <= stop_timestep < start_timestep:
        raise ValueError(
            f"stop_timestep must be at least 0 and below start_timestep ({start_timestep}), got {stop_timestep}"
        )


def is_full(step: Step, interval: int, start_timestep: float, stop_timestep: float, method: object) -> bool:
    """Whether everything is computed: on the grid, above the window, or after the first step below it.

    Raises:
        ValueError: no timestep is known, or the scheduler evaluates one twice.
    """
    t, previous = step.timestep, step.previous
    if t is None:
        raise ValueError(f"{method} goes by timesteps: plan(..., scheduler=one whose set_timesteps was called).")
    if t == previous:
        raise ValueError(
            f"{method} counts steps, but this scheduler evaluates timestep {t:g} twice. Use one with a single "
            "evaluation per step (DDPM, DDIM, DPM-Solver++, Euler)."
        )
    stopped = previous is not None and previous <= stop_timestep
    return step.index % interval == 0 or t >= start_timestep or stopped


def check_ladder(method: object, depth: int, sites: Sequence[Site], model: str) -> None:
    """The model has long skips, two blocks for each, and as many as are recomputed.

    Raises:
        ValueError: it has not.
    """
    blocks = max((site.blocks for site in sites if site.kind is Kind.BLOCK and site.depth is not None), default=0)
    if not blocks:
        raise ValueError(
            f"{method} needs blocks joined by long skip connections; {model} has none. DeepCache works on U-Nets, "
            "FORA and DeltaDiT on other transformers."
        )
    if blocks % 2:
        raise ValueError(f"{method} pairs the first half of the blocks with the second; {model} has {blocks}.")
    if depth > blocks // 2 - 1:
        raise ValueError(f"{method}: with {blocks} blocks, as {model} has, depth is 1 to {blocks // 2 - 1}.")


def check_skips(method: object, depth: int, denoiser: nn.Module) -> None:
    """Every recomputed pair of blocks is joined by a skip: our networks may join the outermost pairs only.

    Raises:
        ValueError: it is not.
    """
    pairs = getattr(getattr(denoiser, "config", None), "skip_pairs", None)  # none: all of them, or another network
    if pairs is not None and depth > pairs:
        raise ValueError(
            f"{method} computes {depth} blocks at each end at every step, but this {type(denoiser).__name__} joins "
            f"only the outermost {pairs} pairs of blocks: depth is 1 to {pairs}."
        )
