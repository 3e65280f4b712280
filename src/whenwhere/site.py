"""Sites: the places of a model where a decision can be made.

A site is one module seen by its role. Sites know nothing of tensors or methods; they are what `Method.decide` reads.
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The role of a module."""

    MODEL = "model"  # the whole denoiser
    CONTROL = "control"  # a network beside the denoiser that feeds it residuals (ControlNet)
    SCHEDULER = "scheduler"  # not a module: the step that moves the latents
    STEM = "stem"  # what turns latents into features: the input convolution of a U-Net
    STAGE = "stage"  # all layers at one resolution of a U-Net
    LAYER = "layer"  # one residual network, spatial transformer or resampler of a U-Net
    BLOCK = "block"  # one transformer block
    SELF_ATTENTION = "self-attention"
    CROSS_ATTENTION = "cross-attention"
    JOINT_ATTENTION = "joint-attention"
    MLP = "mlp"
    EXPANSION = "expansion"  # the first half of an MLP whose second half is part of a block's projection
    PROJECTION = "projection"  # what joins attention and such an MLP into one residual branch (Flux's single blocks)


TOGETHER = (Kind.EXPANSION, Kind.PROJECTION)  # the MLP of a block whose attention shares its projection


class Side(StrEnum):
    """Where a site stands in a network with skip connections."""

    ENCODER = "encoder"
    MIDDLE = "middle"
    DECODER = "decoder"


@dataclass(frozen=True, slots=True)
class Site:
    """One module, by role.

    Attributes:
        kind: the module's role.
        path: its dotted name inside the denoiser; empty for the denoiser itself.
        index: its number among the sites of its kind, from 0, in the order of execution.
        count: how many sites of its kind there are.
        side: encoder, middle or decoder; `None` in networks without skip connections.
        depth: its rung on the skip ladder. The encoder layer that pushes skip k and the decoder layer that pops it
            both have depth k; a stage has the depth of its shallowest layer; the middle is deepest. `None` off the
            ladder.
        block: number of the transformer block that it is or lies in, from 0; blocks over space and over time that take
            turns count as one. `None` outside of blocks.
        blocks: how many blocks there are, counted so.
        parallel: whether it lies in a block with such a projection: what it puts out flows on through that one only.
        text: whether it serves the text stream alone, in networks that have two.
        branched: of the scheduler, whether it moves the latents of every guidance branch.
        carries: true for the last site of its kind on its rung: its output is what the next shallower rung receives.
    """

    kind: Kind
    path: str
    index: int
    count: int
    side: Side | None = None
    depth: int | None = None
    carries: bool = False
    block: int | None = None
    blocks: int = 0
    parallel: bool = False
    text: bool = False
    branched: bool = False

    @property
    def beside(self) -> bool:
        """Whether it is no part of the denoiser."""
        return self.kind in (Kind.CONTROL, Kind.SCHEDULER)

    def inside(self, other: "Site") -> bool:
        """Whether this site lies within another one, so that it is not reached when the other is skipped."""
        if other.beside or self.beside:
            return False
        return self.path != other.path and (other.path == "" or self.path.startswith(other.path + "."))

    def __str__(self) -> str:
        return self.path or "model"
