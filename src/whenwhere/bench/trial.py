"""The trial: a choice beside its rivals on held-out prompts and seeds, in turns, with bootstrap intervals."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from .baselines import baselines
from .choice import Rival
from .forms import Form
from .intervals import Case, Interval, Numbers, bootstrap, middle, ratio
from .price import Price, price
from .rows import Row
from .run import Watch, measure
from .studio import IDENTICAL, Studio
from .tune_search import NEAR, nearest
from .variant import PLAIN, Task, Variant

Column = Mapping[Case, float]


def hold_out(
    task: Task, chosen: Variant, studio: Studio, known: Sequence[Form], watch: Watch
) -> tuple[Rival, tuple[Rival, ...], list[str]]:
    """The choice, its rivals by their PSNR, and what has to be said.

    Args:
        task: held-out prompts and seeds.
        chosen: what was found.
        studio: plans.
        known: forms, of which the published ones are rivals, at the choice's multiply-adds.
        watch: is told what runs next.
    """
    prices = {PLAIN: price_quietly(task, PLAIN), chosen: price_quietly(task, chosen)}
    names = {chosen: "the choice"} | _defaults(studio, known, prices[PLAIN].planned.all / prices[chosen].planned.all)
    for baseline in baselines(task, chosen, prices):
        names.setdefault(baseline, type(baseline.items[0]).__name__)
    prices |= {variant: price_quietly(task, variant) for variant in names if variant not in prices}
    rows: dict[Variant, list[Row]] = {variant: [] for variant in prices}
    for measured in measure(task, prices, watch=watch):
        rows[measured.variant].append(measured.row)
    found = {variant: _rival(names[variant], variant, chosen, prices, rows) for variant in names}
    own = found.pop(chosen)
    rivals = tuple(sorted(found.values(), key=lambda rival: -rival.psnr.value))
    return own, rivals, verdicts(own, rivals)


def verdicts(own: Rival, rivals: Sequence[Rival]) -> list[str]:
    """Whom the choice beats and whom it does not, at equal cost; a sentence each."""
    if not rivals:
        return ["No published default and no plain baseline comes near its cost: there is nothing to compare with."]
    equal = [rival for rival in rivals if abs(rival.macs_ratio / own.macs_ratio - 1) <= NEAR]
    sentences = []
    for verdict, what in (
        ("beaten", "It beats"),
        ("not shown", "It is not shown to beat, the interval of the difference holds zero:"),
        ("ahead", "It does NOT beat, their pictures are closer to the plain ones:"),
    ):
        named = [rival.label for rival in equal if rival.verdict == verdict]
        if named:
            sentences.append(f"{what} {', '.join(named)}.")
    far = [rival.label for rival in rivals if rival not in equal]
    if far:
        sentences.append(f"Not at equal cost, so not judged: {', '.join(far)}.")
    return sentences


def price_quietly(task: Task, variant: Variant) -> Price:
    """A price without counting; what a method has to say of its settings is not said of every try."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return price(task, variant, counting=False)


def _defaults(studio: Studio, known: Sequence[Form], aim: float) -> dict[Variant, str]:
    """Published defaults, with the one knob that sets the cost turned to the choice's."""
    found: dict[Variant, str] = {}
    for form in known:
        values = nearest(studio, form, aim) if form.published else None
        if values is not None:
            found[Variant.of(form.write(values))] = form.name
    return found


def _rival(
    name: str,
    variant: Variant,
    chosen: Variant,
    prices: Mapping[Variant, Price],
    rows: Mapping[Variant, Sequence[Row]],
) -> Rival:
    mine, choice = _column(rows[variant], "psnr"), _column(rows[chosen], "psnr")
    return Rival(
        name=name,
        label=variant.label,
        macs_ratio=prices[PLAIN].planned.all / prices[variant].planned.all,
        speed_up=bootstrap(ratio, _column(rows[PLAIN], "seconds"), _column(rows[variant], "seconds")),
        psnr=bootstrap(middle, mine),
        ssim=bootstrap(middle, _column(rows[variant], "ssim")),
        lead=Interval(0.0, 0.0, 0.0) if variant == chosen else bootstrap(_lead, choice, mine),
    )


def _lead(choice: Numbers, other: Numbers) -> Numbers:
    """The median difference."""
    return middle(choice - other)


def _column(rows: Sequence[Row], name: str) -> dict[Case, float]:
    """A number of every row by prompt and seed, the median over repetitions."""
    values: dict[Case, list[float]] = {}
    for row in rows:
        values.setdefault((row.job.prompt, row.job.seed), []).append(min(getattr(row, name), _most(name)))
    return {case: float(np.median(own)) for case, own in values.items()}


def _most(name: str) -> float:
    return IDENTICAL if name == "psnr" else float("inf")
