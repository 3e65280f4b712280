"""Whether a negative prompt worked, where pictures can be read exactly: shares of pictures, with their intervals.

One factor of a scene is not stated in the caption, and one of its values is the negative text. A picture succeeds in
full when that value is gone and everything that the caption states is there.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Share(NamedTuple):
    """A share of some pictures, with Wilson's interval of 95 %."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, count: int) -> "Share":
        """So many of so many; raises ValueError for none."""
        if count < 1:
            raise ValueError("a share of no pictures is not defined")
        share, z = hits / count, 1.959964
        middle = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        return cls(share, max(0.0, middle - half), min(1.0, middle + half))


class Success(NamedTuple):
    """What became of the pictures of one setting.

    Attributes:
        suppressed: the value of the negative text is not seen.
        retained: every stated factor is drawn as stated.
        joint: both, in a picture that looks like a scene at all.
        readable: it looks like a scene.
        diversity: in [0, 1], the mean over the factors of the entropy of their values, in pictures that do not state
            them, as a share of the entropy of equal frequencies; the negative value, once gone, is not counted.
        pictures: how many.
    """

    suppressed: Share
    retained: Share
    joint: Share
    readable: Share
    diversity: float
    pictures: int


def success(
    seen: Tensor,
    wanted: Tensor,
    stated: Tensor,
    error: Tensor,
    *,
    counts: Sequence[int],
    factor: int,
    value: int,
    limit: float = 0.25,
) -> Success:
    """Count.

    Args:
        seen, wanted: numbers of values, (B, F).
        stated: whether the caption states them, (B, F), bool; never `factor`.
        error: of the reading, (B,).
        counts: how many values every factor has.
        factor, value: what the negative text names.
        limit: the largest error of a picture that looks like a scene.

    Raises:
        ValueError: a caption states the factor of the negative text.
    """
    if stated[:, factor].any():
        raise ValueError(f"factor {factor} is what the negative text names; no caption may state it")
    gone = seen[:, factor] != value
    kept = ((seen == wanted) | ~stated).all(dim=1)
    fine = error <= limit
    free = ~stated
    free[:, factor] &= gone
    return Success(
        suppressed=share_of(gone),
        retained=share_of(kept),
        joint=share_of(gone & kept & fine),
        readable=share_of(fine),
        diversity=diversity(seen, free, ~stated.all(dim=0), [count - (i == factor) for i, count in enumerate(counts)]),
        pictures=len(seen),
    )


def diversity(seen: Tensor, free: Tensor, counted: Tensor, possible: Sequence[int]) -> float:
    """The mean spread of the factors, 0 where there is none to count.

    Args:
        seen: numbers of values, (B, F).
        free: whether a value is looked at, (B, F), bool.
        counted: which factors are, (F,), bool.
        possible: how many values each of them has; one of a single value is not counted.
    """
    spreads = [
        spread(seen[free[:, place], place].tolist(), many)
        for place, many in enumerate(possible)
        if many > 1 and counted[place]
    ]
    return sum(spreads) / len(spreads) if spreads else 0.0


def share_of(hits: Tensor) -> Share:
    """The share of true entries of (B,)."""
    return Share.of(int(hits.sum()), len(hits))


def spread(values: Sequence[int], possible: int) -> float:
    """Entropy of the frequencies of values, as a share of that of so many equally frequent ones; 0 for no values."""
    shares = [count / len(values) for count in Counter(values).values()]
    return -sum(share * math.log(share) for share in shares) / math.log(possible)
