"""Which steps to compute: the schedule of least drift, exactly, by the shortest path through a schedule.

A calibration says how much every unit changes from step to step. What is reused at step s and was computed at step a
has drifted by the changes from a to s, added up; a schedule is as bad as all its reused steps together. Full steps are
the nodes of a graph, the drift between two of them is the length of the edge, and the best schedule of k full steps is
the shortest path of k edges (Bellman, 1957).
"""

from collections.abc import Sequence
from itertools import accumulate

from ..calibration import Calibration


def mean_changes(calibration: Calibration) -> tuple[float, ...]:
    """The change from step s - 1 to step s, the mean over all units; 0 for the first step."""
    rows = list(calibration.changes.values())
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def drift(changes: Sequence[float], full: Sequence[int]) -> float:
    """The drift of all reused steps together.

    Args:
        changes: from step s - 1 to step s; the first one does not count.
        full: the steps that are computed, ascending from 0.
    """
    ends = (*full[1:], len(changes))
    return sum(_between(changes, start, end) for start, end in zip(full, ends, strict=True))


def least_drift(changes: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` full steps, ascending from 0, with the least drift of all reused steps together.

    Args:
        changes: at least 0, from step s - 1 to step s; the first one does not count.
        count: in 1 ... the number of steps.

    Raises:
        ValueError: `count` out of range, or a change below 0.
    """
    steps = len(changes)
    if not 1 <= count <= steps:
        raise ValueError(f"of {steps} steps 1 to {steps} can be full ones, got {count}.")
    if not all(change >= 0 for change in changes):
        raise ValueError(f"changes must be at least 0, got {min(changes)}.")
    edges = [[_between(changes, start, end) for end in range(steps + 1)] for start in range(steps)]
    # paths[end]: drift up to the step `end`, and the full steps before it; one more of them in every round.
    paths: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(count):
        ways = [
            (end, (length + edges[start][end], (*path, start)))
            for start, (length, path) in paths.items()
            for end in range(start + 1, steps + 1)
            if start < steps
        ]
        paths = {end: min(way for found, way in ways if found == end) for end in {end for end, _ in ways}}
    return paths[steps][1]


def _between(changes: Sequence[float], start: int, end: int) -> float:
    """The drift of the steps after `start` and before `end`, all of which reuse what was computed at `start`."""
    return sum(accumulate(changes[start + 1 : end]))
