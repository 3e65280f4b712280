"""Key steps of Faster Diffusion: the published sets, rules of one's own, and a choice by what was measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..ranges import at_least

Keys = tuple[int, ...] | str | Callable[[int], Sequence[int]]  # as listed, a preset's name, or by the number of steps

_SD = (0, 1, 2, 3, 5, 10, 15, 25, 35)

# Key steps of the published results, with the number of steps they were made for (section 4 and the authors' code).
PRESETS: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "sd-50": (50, _SD),  # also text to video, and ControlNet
    "sd-20": (20, _SD[:7]),  # DPM-Solver and DPM-Solver++
    "dreambooth-50": (50, (*_SD, 40)),  # also Custom Diffusion
    "if-1": (100, tuple(i for i in range(100) if i < 10 or i > 85 or i % 5 == 0)),  # DeepFloyd-IF, stage 1
    # The code's; the paper says every step.
    "if-2": (50, tuple(i for i in range(50) if i < 20 or i > 40 or i % 2 == 0)),
    "if-3": (75, tuple(j * (j + 3) // 2 for j in range(11))),
}


def rescaled(preset: str, steps: int) -> tuple[int, ...]:
    """The key steps of a preset, moved in proportion to another number of steps; those that meet become one."""
    made_for, keys = PRESETS[preset]
    return tuple(sorted({min(round(key * steps / made_for), steps - 1) for key in keys}))


def ascending(keys: Sequence[int]) -> tuple[int, ...]:
    """Key steps as a tuple.

    Raises:
        TypeError: one is no whole number.
        ValueError: they do not ascend from 0, each once.
    """
    at_least(0, **{f"keys[{i}]": key for i, key in enumerate(keys)})
    if not keys or keys[0] != 0 or list(keys) != sorted(set(keys)):
        raise ValueError(f"keys must ascend from 0, each once, got {tuple(keys)}")
    return tuple(keys)


@dataclass(frozen=True, repr=False)
class Rule:
    """A function that gives the key steps for a number of steps, always the same. It is shown by its name."""

    of: Callable[[int], Sequence[int]]

    def __call__(self, steps: int) -> tuple[int, ...]:
        """The key steps among so many.

        Raises:
            TypeError, ValueError: the function gives no key steps; see `ascending`.
        """
        keys = self.of(steps)
        try:
            return ascending(tuple(keys))
        except (TypeError, ValueError) as error:
            raise type(error)(f"keys={self} gives {keys!r} for {steps} steps: {error}") from error

    def __repr__(self) -> str:
        function = getattr(self.of, "func", self.of)  # of a partial
        return getattr(function, "__name__", type(function).__name__)


@lru_cache(maxsize=64)
def chosen(keys: Keys, every: int, steps: int) -> tuple[int, ...]:
    """The key steps among so many.

    Args:
        keys: which; without any, every n-th step.
        every: n.
        steps: that are executed.

    Raises:
        TypeError, ValueError: they do not fit.
    """
    if isinstance(keys, str):
        made_for, listed = PRESETS[keys]
        if steps != made_for:
            raise ValueError(
                f"keys={keys!r} was made for {made_for} steps, {steps} are executed (PNDM executes one more than it "
                f"is asked for). keys=rescaled({keys!r}, {steps}) of whenwhere.methods.fasterdiffusion moves it."
            )
        return listed
    listed = tuple(keys(steps)) if callable(keys) else keys or tuple(range(0, steps, every))
    if listed[-1] >= steps:
        raise ValueError(f"keys: only the steps 0 to {steps - 1} are executed, and the last key is {listed[-1]}.")
    return listed


def spread_by_change(changes: Mapping[int, Sequence[float]], threshold: float) -> tuple[int, ...]:
    """A key step wherever the changes since the last one add up to more than a threshold, at any resolution.

    Args:
        changes: by resolution, from step s - 1 to step s; the first one does not count.
        threshold: at least 0; 0 makes a key step of every step at which something changes.

    Raises:
        ValueError: the threshold is negative or no number.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    keys, drift = [0], dict.fromkeys(changes, 0.0)
    for s in range(1, min(map(len, changes.values()))):
        drift = {edge: drift[edge] + row[s] for edge, row in changes.items()}
        if max(drift.values()) > threshold:
            keys.append(s)
            drift = dict.fromkeys(changes, 0.0)
    return tuple(keys)
