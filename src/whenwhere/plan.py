"""Plans and traces: the table sites x steps, before and after, as something to print, save, compare and draw."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self

from .decision import Compute
from .method import Method
from .pricing.cost import Cost, Macs, PricingError, Unit, total
from .site import Kind, Side, Site
from .table import Column, idle, lay

_NOT_REACHED = " "
_FORMAT = 1  # of the JSON files


@dataclass(frozen=True, repr=False)
class Plan:
    """A table of decisions, sites x steps.

    Attributes:
        kind: whether it was made beforehand or written while running.
        model: class name of the denoiser.
        methods: as they would be written in Python.
        sites: the rows, in the order of execution.
        rows: for every site one character per evaluation; a blank where the site is not reached.
        legend: what the characters mean.
        cost: multiply-adds and bytes; `None` where the model could not be priced, and a remark says why.
        held: the most bytes that the memory really held; `None` in a plan.
        remarks: what the methods say of it beyond the table.
        least: the cost where methods that decide while running save most; `None` in a trace, and where none does.
    """

    kind: Literal["plan", "trace"]
    model: str
    methods: tuple[str, ...]
    sites: tuple[Site, ...]
    rows: tuple[str, ...]
    legend: dict[str, str]
    cost: Cost | None
    held: int | None = None
    remarks: tuple[str, ...] = ()
    least: Cost | None = None

    @classmethod
    def of(
        cls,
        kind: Literal["plan", "trace"],
        model: str,
        methods: Sequence[Method],
        sites: Sequence[Site],
        columns: Sequence[Column],
        units: Sequence[Unit] | str,
        samples: int,
        held: int | None = None,
        notes: Sequence[Mapping[str, Any]] = (),
    ) -> Self:
        """A plan from the columns of a table, and from what one row costs at every site or why nobody knows."""
        rows = tuple("".join(_symbol(column, i) for column in columns) for i in range(len(sites)))
        legend = {Compute.symbol: Compute.name}
        for column in columns:
            for opinion in (opinion for opinions in column.opinions for opinion in opinions):
                legend[opinion.decision.symbol] = opinion.decision.name
        units, unknown = ([], units) if isinstance(units, str) else (units, "")
        cost = total(sites, units, columns, samples) if units else None
        told = notes or [{}] * len(methods)
        said = [m.remark(columns[0].step, note) for m, note in zip(methods, told, strict=True)] if columns else []
        for number, method in enumerate(methods):
            if kind == "plan" and not (method.observes or method.adaptive) and idle(columns, number):
                said.append(f"{method} changes nothing here: {method.idle_reason}")
        remarks = tuple(filter(None, [*said, unknown]))
        least, cheapest = None, [method.cheapest() for method in methods]
        if kind == "plan" and units and cheapest != list(methods):
            least = total(sites, units, lay(sites, cheapest, [column.step for column in columns]), samples)
        return cls(kind, model, tuple(map(repr, methods)), tuple(sites), rows, legend, cost, held, remarks, least)

    @property
    def priced(self) -> Cost:
        """The cost.

        Raises:
            PricingError: it is not known.
        """
        if self.cost is None:
            raise PricingError(self.remarks[-1] if self.remarks else "this table has no sites to price.")
        return self.cost

    @property
    def steps(self) -> int:
        """Evaluations of the denoiser; separate guidance calls count one each."""
        return len(self.rows[0])

    def row(self, path: str, kind: Kind | None = None) -> str:
        """The characters of one site, by its path (and its kind, where two sites share a path).

        Raises:
            KeyError: no such site.
        """
        for site, row in zip(self.sites, self.rows, strict=True):
            if site.path == path and kind in (None, site.kind):
                return row
        raise KeyError(f"{path!r} is no site of this {self.kind}")

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Label and characters of every run of sites of one kind that are treated alike."""
        found = []
        for kind in dict.fromkeys(site.kind for site in self.sites):
            rows = [(s, r) for s, r in zip(self.sites, self.rows, strict=True) if s.kind is kind]
            for row, run in groupby(rows, key=lambda pair: pair[1]):
                members = [site for site, _ in run]
                found.append((_label(kind, members, len(rows)), row))
        return found

    def __repr__(self) -> str:
        methods = ", ".join(self.methods) or "no method"
        return f"<{self.kind} of {methods} on {self.model}, {self.steps} evaluations; print it to see the table>"

    def _repr_html_(self) -> str:
        """What notebooks show: the table as it prints."""
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.groups)
        lines = [f"{label:<{width}}  {row}" for label, row in self.groups]
        legend = "   ".join(f"{symbol} {name}" for symbol, name in self.legend.items())
        return "\n".join([*lines, "", legend, *self.remarks, *self.summary])

    @property
    def summary(self) -> list[str]:
        """Multiply-adds and bytes in words, one line each."""
        if self.cost is None:
            return []
        cost, least = self.cost, self.least
        return [
            f"{_tera(cost.macs.all)} of {_tera(cost.baseline.all)} MACs ({cost}), "
            f"{_tera(cost.macs.papers)} of {_tera(cost.baseline.papers)} in the papers' convention "
            "(without QK^T and AV)",
            *([] if least is None else [f"{_tera(least.macs.all)} MACs at the least ({least})"]),
            f"{_mega(cost.bytes)} remembered at most" + ("" if self.held is None else f", {_mega(self.held)} measured"),
        ]

    def save(self, path: str | Path) -> None:
        """Write this table as JSON."""
        Path(path).write_text(json.dumps({"whenwhere": _FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table that `save` wrote.

        Raises:
            ValueError: the file is no JSON, or no plan or trace of this library.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop("whenwhere") != _FORMAT:
                raise ValueError("it was written by another version of the format")
            return cls._from(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no saved plan or trace: {error!r}") from error

    @classmethod
    def _from(cls, data: dict[str, Any]) -> Self:
        sites = tuple(
            Site(**{**site, "kind": Kind(site["kind"]), "side": Side(site["side"]) if site["side"] else None})
            for site in data["sites"]
        )
        cost, least = _cost(data["cost"]), _cost(data.get("least"))
        rows, methods = tuple(data["rows"]), tuple(data["methods"])
        data["remarks"] = tuple(data.get("remarks", ()))
        if len(rows) != len(sites) or len({len(row) for row in rows}) != 1:
            raise ValueError(f"{len(sites)} sites do not go with {len(rows)} rows, or the rows differ in length")
        return cls(**{**data, "sites": sites, "cost": cost, "least": least, "rows": rows, "methods": methods})


def _cost(data: dict[str, Any] | None) -> Cost | None:
    return data and Cost(Macs(**data["macs"]), Macs(**data["baseline"]), data["bytes"])  # type: ignore[return-value]


def _symbol(column: Column, site: int) -> str:
    """What is shown of a cell: the outermost decision that is more than computing."""
    if not column.reached[site]:
        return _NOT_REACHED
    symbols = [opinion.decision.symbol for opinion in column.opinions[site]]
    return next((symbol for symbol in symbols if symbol != Compute.symbol), Compute.symbol)


def _label(kind: Kind, members: list[Site], count: int) -> str:
    if kind in (Kind.MODEL, Kind.CONTROL):
        return kind.value
    if len(members) == count:
        return f"{kind.value} x{count}" if count > 1 else kind.value
    first, last = members[0], members[-1]
    return first.path if first is last else f"{first.path} ... {last.path}"


def _tera(macs: int) -> str:
    """Multiply-adds with four digits and a unit."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if macs >= size:
            return f"{macs / size:.4g} {unit}"
    return str(macs)


def _mega(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
