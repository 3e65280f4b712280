"""Forms: what can be tuned, as data. Every method with its knobs, their ranges, and what was published."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..methods import ToCa
from ..site import Kind

Value: TypeAlias = int | float
Values: TypeAlias = dict[str, Value]

_NOTCHES = 64  # of a knob that is no whole number, where it is turned to a cost


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`, both included."""

    name: str
    low: int
    high: int


@dataclass(frozen=True)
class Real:
    """A number from `low` to `high`, by its logarithm."""

    name: str
    low: float
    high: float


Knob: TypeAlias = Whole | Real


@dataclass(frozen=True)
class Form:
    """One method, or several together, with what may vary.

    Attributes:
        name: for readers.
        text: the expression, with the knobs' names in braces.
        knobs: what may vary.
        start: values of the knobs that a search begins with; those of the publication where there is one.
        cost: the knob that is turned to reach a cost, the others staying as they are.
        published: whether the values are somebody's published defaults.
        schedules: by number of full steps, the steps; the knob `full` chooses among them.
    """

    name: str
    text: str
    knobs: tuple[Knob, ...]
    start: Mapping[str, Value]
    cost: str
    published: bool = True
    schedules: Mapping[int, Sequence[int]] | None = None

    def write(self, values: Values) -> str:
        """The expression with these values."""
        shown: dict[str, object] = dict(values)
        if self.schedules is not None:
            shown["full"] = tuple(self.schedules[int(values["full"])])
        return self.text.format(**shown)

    def settings(self) -> list[Value]:
        """What the knob of the cost can be set to, ascending."""
        (knob,) = (knob for knob in self.knobs if knob.name == self.cost)
        if isinstance(knob, Whole):
            return list(range(knob.low, knob.high + 1))
        ratio = (knob.high / knob.low) ** (1 / (_NOTCHES - 1))
        return [float(f"{knob.low * ratio**i:.3g}") for i in range(_NOTCHES)]

    def lows(self) -> dict[str, Value]:
        """Every knob at its lowest."""
        return {knob.name: knob.low for knob in self.knobs}


def forms(
    steps: int,
    rungs: int,
    blocks: int,
    schedules: Mapping[int, Sequence[int]],
    calibration: str,
    kinds: Collection[Kind] = (),
) -> list[Form]:
    """All forms for so many evaluations; which of them fit a model is found by planning them.

    Args:
        steps: evaluations of the denoiser.
        rungs: residuals of a U-Net; 0 for networks without.
        blocks: transformer blocks.
        schedules: of least drift, by number of full steps; empty where nothing was measured.
        calibration: the file of what was measured, for Block Caching; empty for none.
        kinds: of all sites: for which of its families ToCa's settings are.
    """
    gate = Whole("gate", 1, max(1, steps - 1))
    every = Whole("interval", 2, max(2, min(10, steps // 2)))
    branch = Whole("branch", 0, max(0, rungs - 1))
    full = Whole("full", 1, max(1, steps - 1))
    found = [
        Form("GuidanceStop", "guidancestop(step={gate})", (gate,), {}, "gate"),
        Form(
            "T-GATE",
            "tgate(gate_step={gate},sp_interval={sp},fi_interval={fi},warm_up={warm})",
            (gate, Whole("sp", 1, 5), Whole("fi", 1, 4), Whole("warm", 0, 3)),
            {"sp": 5, "fi": 1, "warm": 2},
            "gate",
        ),
    ]
    if rungs:
        found += _of_networks_with_skips(gate, every, branch, full, schedules)
    if blocks:
        found += [*_of_transformers(gate, every, steps, blocks), _toca(every, steps, kinds)]
    if calibration:
        found.append(_block_caching(calibration))
    return found


def _block_caching(calibration: str) -> Form:
    text = f"blockcaching(calibration={calibration!r},threshold={{threshold}})"
    return Form("Block Caching", text, (Real("threshold", 0.01, 20.0),), {}, "threshold", False)


def _of_networks_with_skips(
    gate: Whole, every: Whole, branch: Whole, full: Whole, schedules: Mapping[int, Sequence[int]]
) -> Iterator[Form]:
    yield Form(
        "DeepCache", "deepcache(interval={interval},branch={branch})", (every, branch), {"branch": 0}, "interval"
    )
    yield Form("Faster Diffusion", "fasterdiffusion(every={interval},alpha=0)", (every,), {}, "interval")
    gated = "tgate(gate_step={gate},sp_interval=1,warm_up=0)+"
    both = "deepcache(interval={interval},branch={branch})"
    yield Form("T-GATE + DeepCache", gated + both, (gate, every, branch), {"interval": 3, "branch": 0}, "gate")
    if schedules:
        exact = "deepcache(full_steps={full},branch={branch})"
        yield Form("DeepCache, least drift", exact, (full, branch), {"branch": 0}, "full", False, schedules)
        late = {"gate": round(0.4 * gate.high) or 1, "branch": 0}
        name = "T-GATE + DeepCache, least drift"
        yield Form(name, gated + exact, (gate, full, branch), late, "full", False, schedules)


def _of_transformers(gate: Whole, every: Whole, steps: int, blocks: int) -> Iterator[Form]:
    start = Whole("start", 0, max(0, steps // 2))
    yield Form("FORA", "fora(interval={interval},start_step={start})", (every, start), {"start": 0}, "interval")
    yield Form(
        "Δ-DiT",
        "deltadit(interval={interval},blocks={blocks})",
        (every, Whole("blocks", 1, max(1, blocks - 1))),
        {"interval": 2},
        "blocks",
    )
    both = "tgate(gate_step={gate},sp_interval=1,warm_up=0)+fora(interval={interval},branches=('mlp','self-attention'))"
    yield Form("T-GATE + FORA", both, (gate, every), {"interval": 3}, "gate", False)


def _toca(every: Whole, steps: int, kinds: Collection[Kind]) -> Form:
    """ToCa as its authors set it for a model's family; for DiT by the number of steps, of which they ran 50 and 250."""
    own = "flux" if Kind.JOINT_ATTENTION in kinds else "pixart" if Kind.CROSS_ATTENTION in kinds else ""
    method = ToCa.published(own or ("dit-ddpm" if steps >= 150 else "dit-ddim"))
    # A share of tokens in hundredths, which reads better than a number with seventeen digits.
    fixed = f"score={method.score!r},schedule={method.schedule!r}"
    start = {"interval": method.interval, "share": round(100 * method.fresh_ratio)}
    text = "toca(interval={interval},fresh_ratio=0.{share:02d}," + fixed + ")"
    return Form("ToCa", text, (every, Whole("share", 2, 50)), start, "interval")
