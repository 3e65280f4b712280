"""What one row costs at a site, in multiply-adds and bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-adds in both conventions.

    Attributes:
        all: every product.
        papers: without query-key and attention-value products.
    """

    all: int = 0
    papers: int = 0

    def __add__(self, other: "Macs") -> "Macs":
        return Macs(self.all + other.all, self.papers + other.papers)

    def __sub__(self, other: "Macs") -> "Macs":
        return Macs(self.all - other.all, self.papers - other.papers)

    def times(self, factor: float) -> "Macs":
        """Scaled, and rounded to whole multiply-adds."""
        return Macs(round(self.all * factor), round(self.papers * factor))


@dataclass(frozen=True, slots=True)
class Attended:
    """The sizes of one attention, for one row.

    Attributes:
        queries: N, tokens that ask.
        text: T, tokens of the text that is attended to; 0 in self-attention.
        width: D, features of all heads together.
        rows: calls or folded rows for one row of the denoiser's batch (frames of a video).
    """

    queries: int
    text: int
    width: int
    rows: int = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """What one row costs at a site.

    Attributes:
        macs: its multiply-adds.
        bytes: the bytes of every tensor of its output, in order.
        parts: the multiply-adds of every module inside it, by relative path.
        attended: the sizes of its attention, of the one attention inside it, or of that whose projection it shares.
        itemsize: bytes of one number.
        tokens: N, where what comes out is one tensor of tokens, (rows, N, D); else 0.
    """

    macs: Macs
    bytes: tuple[int, ...]
    parts: Mapping[str, Macs] = field(default_factory=dict)
    attended: Attended | None = None
    itemsize: int = 4
    tokens: int = 0

    def part(self, *paths: str) -> Macs:
        """The multiply-adds of some modules inside; those that it does not have cost nothing."""
        return sum((self.parts.get(path, Macs()) for path in paths), Macs())
