"""Methods: published algorithms, each a frozen dataclass whose fields are the paper's hyper-parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from .clock import Step
from .decision import Decision
from .site import Kind, Site


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known of a generation before its first step; `None` where a plan made beforehand cannot know.

    Attributes:
        steps: evaluations that will be executed.
        scheduler: class name of the scheduler.
        guidance: the guidance scale, where the pipeline tells it.
        size: shape of one row of what enters the denoiser.
        skipped: evaluations that the scheduler laid out before the first that is executed, in image-to-image.
        branches: in the guidance batch, where somebody declares them; else they are known after the first step.
        configuration: what the scheduler was made with, as JSON; see `whenwhere.setting.configuration_of`.
        timesteps: that will be executed, where a method reads them.
        handover: the step at which a second denoiser takes over; that after the last where there is none.
    """

    steps: int
    scheduler: str | None = None
    guidance: float | None = None
    size: tuple[int, ...] | None = None
    skipped: int | None = None
    branches: int | None = None
    configuration: str | None = None
    timesteps: tuple[float, ...] | None = None
    handover: int | None = None


class Method(ABC):
    """A published algorithm: one pure function from (site, step) to a decision.

    A concrete method is a frozen dataclass. It carries no state: what it must remember lives in the attachment's
    memory.
    """

    kinds: ClassVar[frozenset[Kind]]  # the kinds of site it has an opinion about
    reads_timestep: ClassVar[bool] = (
        False  # whether it needs `step.timestep`, which costs one synchronisation a generation
    )
    # Whether its decisions stand next to the module whatever the order of attaching: guidance changes what attention
    # computes, the others decide whether it does.
    innermost: ClassVar[bool] = False
    # Whether a full evaluation that other methods ask for leaves its decisions as they are: what it remembers serves a
    # batch of any branches.
    lasting: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False  # whether it revises its decisions while they are carried out
    observes: ClassVar[bool] = False  # whether sites that are not reached are its doing, by what it installed
    steers: ClassVar[bool] = False  # whether it runs attention, or all of the network, for a text of its own as well
    # What is likely wrong if every site was computed at every step.
    idle_reason: ClassVar[str] = (
        "its plan computes everything at this number of steps; print(attachment.plan) shows it."
    )

    @abstractmethod
    def decide(self, site: Site, step: Step) -> Decision | None:
        """What to do at this site and step; `None` for no opinion. Pure: no tensors, no counters.

        Raises:
            ValueError: a field does not fit the number of steps.
        """

    def asks(self, site: Site) -> bool:
        """Whether it ever has an opinion about a site; only such sites are wrapped."""
        return site.kind in self.kinds

    def check(self, sites: Sequence[Site], model: str) -> None:  # noqa: B027  (an optional refinement, not abstract)
        """Refuse a model by raising ValueError that names the methods which fit it instead."""

    def conflict(self, other: "Method", sites: Sequence[Site]) -> str:
        """Why it does not go with another method on a model with these sites; empty if it does."""
        if type(self) is type(other) and any(self.asks(site) and other.asks(site) for site in sites):
            return f"both have the same sites; one {type(self).__name__} decides about them."
        return ""

    def fit(self, denoiser: nn.Module, pipe: object = None) -> Self:  # noqa: ARG002
        """The method with everything filled in that depends on the model, or on the pipeline where one is attached to.

        Raises:
            ValueError: it does not fit this model.
        """
        return self

    def review(self, setting: Setting) -> None:  # noqa: B027  (as above)
        """Look at a generation that is about to begin: refuse it by ValueError, or doubt it by a warning."""

    def settle(self, setting: Setting) -> None:  # noqa: B027  (as above)
        """Look again after the first step, where only now the branches are known; refuse by ValueError."""

    def revise(self, decision: Decision, step: Step, notes: Mapping[str, Any]) -> Decision:  # noqa: ARG002
        """What a planned decision comes to, now that the steps before it were carried out; asked of adaptive methods.

        It must spend no more than planned.
        """
        return decision

    def cheapest(self) -> Self:
        """The same as it runs where it saves most; itself, where nothing is decided while it runs."""
        return self

    def install(self, denoiser: nn.Module, present: Callable[[], Step]) -> Callable[[], None]:  # noqa: ARG002
        """Put on the model what is no decision of ours; the answer takes it off again.

        Args:
            denoiser: the model, with everything of ours inside it in place.
            present: the step that is running.

        Raises:
            ValueError: it does not fit this model.
        """
        return lambda: None

    def missed(self, site: Site) -> Decision | None:  # noqa: ARG002
        """What the trace says of a site that was not reached though nothing around it was skipped; for observers."""
        return None

    def remark(self, step: Step, notes: Mapping[str, Any]) -> str:  # noqa: ARG002
        """What a plan or trace says below its table that the table does not show; empty for nothing.

        Args:
            step: any of the schedule.
            notes: what the method wrote down; nothing before it ran.
        """
        return ""

    def renews(self, step: Step) -> bool:  # noqa: ARG002
        """Whether the other methods must compute everything at this step.

        A method says so when it keeps outputs that the others would have skipped, or when it changes the batch.
        """
        return False
