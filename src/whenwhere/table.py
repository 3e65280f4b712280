"""The table of decisions, sites x steps, laid from the methods before anything runs.

Besides asking every method about every site and step, laying the table settles what follows from it: a region that one
method leaves empty is computed where another one keeps something of it, a recall where nothing is remembered becomes a
computation, a site inside a recalled one is not reached, and nothing is kept that no later step recalls. Printing,
costing and carrying out all read the same table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .clock import Step
from .decision import Compute, Decision
from .method import Method
from .site import Kind, Site

SlotKey = tuple[int, int | str, int]  # method, site or shared home, pass


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one method, by its number, wants at a site and step."""

    method: int
    decision: Decision


@dataclass(slots=True)
class Column:
    """One step of the table: for every site its opinions, outermost method first, and whether it is reached."""

    step: Step
    opinions: list[tuple[Opinion, ...]]
    reached: list[bool]


def lay(
    sites: Sequence[Site], methods: Sequence[Method], steps: Sequence[Step], handover: int | None = None
) -> list[Column]:
    """Ask every method about every site and step; settle recalls, reach and keeping.

    Args:
        sites: in the order of execution.
        methods: the outermost first.
        steps: in the order of evaluation; separate guidance calls follow one another.
        handover: the step at which a second network takes over, for which nothing is remembered.
    """
    columns = [Column(step, [_ask(site, methods, step) for site in sites], [True] * len(sites)) for step in steps]
    within = ancestors(sites)
    for column in columns if len(methods) > 1 else ():
        _fill_what_others_keep(column, sites, within)
    remembered: set[SlotKey] = set()
    for column in columns:
        if column.step.index == handover and column.step.pass_ == 0:
            remembered.clear()
        for i in range(len(sites)):
            column.reached[i] = not any(_stops(column.opinions[j]) and column.reached[j] for j in within[i])
            if column.reached[i]:
                column.opinions[i] = _settle(column.opinions[i], i, column.step, remembered)
        remembered |= {key for key, decision in _slots(column) if decision.keeps}
    _forget_the_unneeded(columns)
    return columns


def ancestors(sites: Sequence[Site]) -> list[list[int]]:
    """For every site the numbers of the sites it lies inside."""
    numbers = {site.path: i for i, site in enumerate(sites) if not site.beside}
    found: list[list[int]] = []
    for site in sites:
        names = [] if site.beside else site.path.split(".")
        prefixes = [".".join(names[:end]) for end in range(len(names))]
        found.append([numbers[prefix] for prefix in prefixes if prefix in numbers and prefix != site.path])
    return found


def slot_key(opinion: Opinion, site: int, pass_: int) -> SlotKey:
    """Where an opinion's memory is: by method, site and pass.

    One slot serves all passes if its decision is shared, and several sites if their decisions name one home.
    """
    return (opinion.method, opinion.decision.home or site, -1 if opinion.decision.shared else pass_)


def _slots(column: Column) -> Iterator[tuple[SlotKey, Decision]]:
    """The decisions of a column that are carried out, each with where its memory is."""
    for i, opinions in enumerate(column.opinions):
        for opinion in opinions if column.reached[i] else ():
            yield slot_key(opinion, i, column.step.pass_), opinion.decision
            if opinion.decision.stops:
                break


def idle(columns: Sequence[Column], method: int) -> bool:
    """Whether a method, by its number, changes nothing in a table."""
    opinions = (o for column in columns for cell in column.opinions for o in cell if o.method == method)
    return all(opinion.decision.neutral for opinion in opinions)


def _ask(site: Site, methods: Sequence[Method], step: Step) -> tuple[Opinion, ...]:
    renewing = [i for i, method in enumerate(methods) if method.renews(step)]
    opinions = []
    for i, method in enumerate(methods):
        decision = method.decide(site, step) if method.asks(site) else None
        if decision is not None:
            whole = site.kind in (Kind.MODEL, Kind.SCHEDULER) and not method.observes
            renewed = any(other != i for other in renewing) and not whole and not method.lasting
            opinions.append(Opinion(i, decision.fresh() if renewed else decision))
    return tuple(opinions)


def _fill_what_others_keep(column: Column, sites: Sequence[Site], within: list[list[int]]) -> None:
    """Methods that leave a region empty compute everything where another method keeps what comes out of it."""
    inside = [[i, *(j for j in within[i] if sites[j].kind is not Kind.MODEL)] for i in range(len(sites))]
    filled: set[int] = set()
    while True:
        keeping = [{opinion.method for opinion in cell if opinion.decision.reads} for cell in column.opinions]
        emptied = {
            opinion.method
            for i, cell in enumerate(column.opinions)
            for opinion in cell
            if opinion.decision.hollow and any(keeping[j] - {opinion.method} for j in inside[i])
        }
        if emptied <= filled:
            return
        filled |= emptied
        column.opinions = [
            tuple(Opinion(o.method, o.decision.fresh()) if o.method in emptied else o for o in cell)
            for cell in column.opinions
        ]


def _stops(opinions: tuple[Opinion, ...]) -> bool:
    """Whether the module itself does not run."""
    return any(opinion.decision.stops for opinion in opinions)


def _settle(opinions: tuple[Opinion, ...], site: int, step: Step, remembered: set[SlotKey]) -> tuple[Opinion, ...]:
    """Turn recalls of what no earlier step remembered into computations. What is inside a recall is not asked."""
    settled = []
    for i, opinion in enumerate(opinions):
        key = slot_key(opinion, site, step.pass_)
        if opinion.decision.recalls and key not in remembered:
            opinion = Opinion(opinion.method, opinion.decision.fresh())
        settled.append(opinion)
        if opinion.decision.stops:
            return (*settled, *opinions[i + 1 :])
    return tuple(settled)


def _forget_the_unneeded(columns: list[Column]) -> None:
    """Walk backwards and drop every keep that no later reached step recalls, and every opinion that is then empty."""
    needed: set[SlotKey] = set()
    for column in reversed(columns):
        for i, opinions in enumerate(column.opinions):
            if column.reached[i]:
                column.opinions[i] = _trim(opinions, i, column.step, needed)
        # Only now: the sites of one step that share a slot fill it together, or read it together.
        needed -= {key for key, decision in _slots(column) if decision.keeps}
        needed |= {key for key, decision in _slots(column) if decision.recalls}


def _trim(opinions: tuple[Opinion, ...], site: int, step: Step, needed: set[SlotKey]) -> tuple[Opinion, ...]:
    """Drop what keeps for nobody. An inner opinion behind a recall is not carried out and needs nothing."""
    trimmed = []
    for opinion in opinions:
        key = slot_key(opinion, site, step.pass_)
        decision = opinion.decision
        if decision.keeps and key not in needed:
            decision = decision.bare()
        if decision != Compute():
            trimmed.append(Opinion(opinion.method, decision))
        if decision.stops:
            break
    return tuple(trimmed)
