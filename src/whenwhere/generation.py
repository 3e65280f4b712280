"""One generation: its table, its memory, the trace it writes. Born at the denoiser's first call, dropped at the end."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from torch import nn

from .anatomy import Anatomy, Role
from .clock import lay_out
from .decision import Call, Memory, Output
from .layout import Branches, branches_of, settle
from .method import Method
from .site import Kind, Site
from .table import Column, Opinion, ancestors, lay, slot_key

# Separate guidance calls within one step; more mean that the scheduler listened to is not the one in use.
_MOST_PASSES = 8


class Generation:
    """The state of one generation.

    Attributes:
        memory: what is remembered.
        plan: the table in force.
        trace: what was done, a column for every evaluation so far.
        samples: images or videos generated at once; 0 until known.
        notes: what every method wrote down, by its number.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        methods: Sequence[Method],
        anatomy: Anatomy,
        timesteps: Sequence[float | None],
        declared: tuple[Role, ...] | None,
        modules: Sequence[nn.Module | None] = (),
        sigmas: Sequence[float | None] = (),
        successors: Sequence[nn.Module | None] = (),
        handover: int | None = None,
    ) -> None:
        self.memory = Memory()
        self.plan: list[Column] = []
        self.trace: list[Column] = []
        self.samples = 0
        self.branches: Branches | None = None  # of the batch that enters the model
        self.inner: Branches | None = None  # of the batch that reaches the sites inside
        self._sites, self._methods, self._anatomy = sites, methods, anatomy
        self._modules = modules or [None] * len(sites)
        self._successors, self._handover = successors, handover  # a second network, and the step at which it takes over
        self.notes: list[dict[str, Any]] = [{} for _ in methods]
        self.unattended = False  # while a module runs past all decisions
        self._timesteps, self._sigmas = timesteps, sigmas
        self._declared = declared
        self._roles = declared or anatomy.roles
        self._branch_count, self._passes = 0, 1
        self._rows: dict[int, int] = {}  # of the batch, by pass
        self._open: tuple[int, int] | None = None
        self._pass = 0
        self.column: Column
        self.traced: Column

    @property
    def count(self) -> int:
        """Evaluations that this generation executes."""
        return len(self._timesteps)

    def open(self, index: int, rows: int | None) -> None:
        """Turn to the column of a step and the present pass, unless it is open already.

        Args:
            index: the step.
            rows: rows of the batch that enters the denoiser; `None` from a network that is called before it.

        Raises:
            RuntimeError: the rows are no whole number of branches, or the scheduler does not move.
        """
        if rows is not None:
            self._learn_rows(rows)
        branches = self._branch_count  # a further call in the step may have another batch (skip-layer guidance)
        if self._pass == 0:
            branches = len(self.branches.roles if self.branches else self._roles)
        if self._pass >= _MOST_PASSES:
            raise RuntimeError(
                f"the denoiser was called {self._pass} times without a step of the scheduler that was attached: "
                "another scheduler must be in use. Attach with that one."
            )
        if branches != self._branch_count or self._pass >= self._passes:
            self._lay(index, branches, max(self._passes, self._pass + 1))
        if self._open != (index, self._pass):
            if (index, self._pass) == (self._handover, 0):
                self.memory.clear()
                self._modules = self._successors
            self._open = (index, self._pass)
            self.column = self._revised(self.plan[index * self._passes + self._pass])
            self.traced = Column(self.column.step, [()] * len(self._sites), [False] * len(self._sites))
            self.trace.append(self.traced)
        if rows is not None:
            self._enter()

    def _revised(self, column: Column) -> Column:
        """A column of the plan after what adaptive methods learnt in the steps before."""
        if not any(method.adaptive for method in self._methods):
            return column

        def revised(opinion: Opinion) -> Opinion:
            number = opinion.method
            decision = self._methods[number].revise(opinion.decision, column.step, self.notes[number])
            return Opinion(number, decision)

        return Column(column.step, [tuple(map(revised, opinions)) for opinions in column.opinions], column.reached)

    def close(self) -> None:
        """The denoiser returned: a further call within the same step is the next pass."""
        for number, method in enumerate(self._methods):
            if method.observes:
                self._note_the_missed(number, method)
        self._pass += 1

    @cached_property
    def _within(self) -> list[list[int]]:
        return ancestors(self._sites)

    def _note_the_missed(self, number: int, method: Method) -> None:
        """Write down the outermost sites that were not reached by the doing of a method."""
        missed = [not reached for reached in self.traced.reached]
        for i, site in enumerate(self._sites):
            decision = method.missed(site) if missed[i] and not site.beside and method.asks(site) else None
            if decision is not None and not any(missed[j] or self._stopped(j) for j in self._within[i]):
                self.traced.opinions[i], self.traced.reached[i] = (Opinion(number, decision),), True

    def _stopped(self, i: int) -> bool:
        return any(opinion.decision.stops for opinion in self.traced.opinions[i])

    def stepped(self, samples: int) -> None:
        """The scheduler moves that many samples: now the branches are known, whatever was declared."""
        if self._anatomy.doubled and self.branches is not None:
            samples = self.branches.samples  # the pipeline moves all branches together
        if samples != self.samples and self._rows:
            self.samples = samples
            self.branches = settle(self._anatomy, self._roles, self._rows[0], samples)
            self.memory.settle(self.branches)
            if len(self.branches.roles) != self._branch_count:
                self._lay(0, len(self.branches.roles), self._passes)
                for column in self.trace:
                    column.step = replace(column.step, branches=self._branch_count)
        self._pass = 0

    def carry_out(
        self, i: int, opinions: tuple[Opinion, ...], original: Callable[..., Output], args: Any, kwargs: dict[str, Any]
    ) -> Output:
        """Apply the opinions about one call, outermost first."""
        first, rest = opinions[0], opinions[1:]
        slot = self.memory.slot(*slot_key(first, i, self._pass))
        decision = first.decision
        # A slot that several sites fill together is not to be read in the step that fills it.
        filling = bool(decision.home) and slot.step == self.column.step.index
        if decision.recalls and (slot.empty or filling):
            decision = decision.fresh()
        self.traced.opinions[i] += (Opinion(first.method, decision),)
        forward = partial(self._inner, i, rest, original) if rest else original
        site = self._sites[i]
        branches = self._reaching(opinions) if site.kind is Kind.MODEL else self.inner
        call = Call(site, self.column.step, forward, args, kwargs, branches, self._modules[i])
        call.alone, call.method = partial(self._alone, original), self._methods[first.method]
        call.notes = self.notes[first.method]
        return decision.apply(call, slot)

    def _reaching(self, opinions: tuple[Opinion, ...]) -> Branches | None:
        """The layout that reaches the first of these decisions about the model, through those outside it."""
        branches, every = self.branches, self.column.opinions[0]
        for outer in every[: len(every) - len(opinions)]:
            branches = branches and outer.decision.inner_layout(branches)
        return branches

    def _alone(self, original: Callable[..., Output], *args: Any, **kwargs: Any) -> Output:
        self.unattended = True
        try:
            return original(*args, **kwargs)
        finally:
            self.unattended = False

    def _inner(
        self, i: int, opinions: tuple[Opinion, ...], original: Callable[..., Output], *args: Any, **kwargs: Any
    ) -> Output:
        return self.carry_out(i, opinions, original, args, kwargs)

    def _learn_rows(self, rows: int) -> None:
        """Take note of the size of the batch; what was remembered of another size is dropped."""
        if self._rows.get(self._pass, rows) != rows:
            self.memory.clear()  # guidance was switched on or off between two steps
        self._rows[self._pass] = rows
        if self.samples:
            self.branches = settle(self._anatomy, self._roles, rows, self.samples)
        elif self._declared is not None:
            samples, rest = divmod(rows, len(self._declared))
            if rest:
                raise RuntimeError(
                    f"the pipeline declares the guidance branches {', '.join(self._declared)}, but its batch has "
                    f"{rows} rows, which {len(self._declared)} does not divide."
                )
            self.branches = branches_of(self._anatomy, self._declared, samples)

    def _enter(self) -> None:
        """The layout that reaches the sites inside, after the decisions about the model itself."""
        self.inner = self.branches
        for opinion in self.column.opinions[0]:
            if self.inner is not None:
                self.inner = opinion.decision.inner_layout(self.inner)

    def _lay(self, index: int, branches: int, passes: int) -> None:
        """Lay the table anew: all of it if a further pass shows up, else from a step on, with nothing remembered."""
        index = index if passes == self._passes else 0
        self._branch_count, self._passes = branches, passes
        steps = lay_out(self._timesteps, branches, passes, self._sigmas)[index * passes :]
        laid = lay(self._sites, self._methods, steps, self._handover)
        probe = branches_of(self._anatomy, self._roles if branches > 1 else self._roles[:1], 1)
        for opinion in {opinion for column in laid for opinion in column.opinions[0]}:
            opinion.decision.inner_layout(probe)  # refuses now what could not be carried out later
        self.plan = self.plan[: index * passes] + laid
