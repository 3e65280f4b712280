"""No method is outside the laws: every one has a setting that is tried on every pipeline, and a neutral one.

The settings of `test_laws.py` and `test_laws_of_freezing.py` are tried there. Here are the others, on every pipeline;
the quick tests run on a few, `pytest -m slow` runs all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import laws
import pytest
import test_laws
import test_laws_of_freezing
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import TaylorSeerCacheConfig
from interruptions import INTERRUPTIONS, can_be_interrupted
from laws import STEPS, UNTOLD, Setting, steps_of
from pipelines import CASES, build, run
from test_nag import text
from tiny_models import TOKENS

import whenwhere
from whenwhere import (
    FORA,
    NAG,
    NASA,
    VSF,
    BlockCaching,
    Calibration,
    DeltaDiT,
    Method,
    SkipCache,
    SkipDrift,
    SkipForecast,
    SkipOffset,
    ToCa,
    Upstream,
    attach,
    calibrate,
)
from whenwhere.methods import CFG

ON_CASES = Callable[[str], tuple[Method, ...]]

JOINT = ("sd3", "sd35", "flux", "flux-true-cfg")
LONG_SKIPS = ("hunyuan-dit", "skip-dit")
TRANSFORMERS = (
    *JOINT,
    *LONG_SKIPS,
    "pixart-alpha",
    "pixart-alpha-sized",
    "pixart-sigma",
    "dit",
    "latte",
    "sana",
    "wan",
)
U_NETS = tuple(case for case in CASES if case not in TRANSFORMERS)
PIXART = tuple(case for case in CASES if "pixart" in case)
WITHOUT_TEXT = dict.fromkeys(("svd", "dit", "skip-dit"), "guidance inside attention is not known for")


def others(*accepted: str) -> tuple[str, ...]:
    return tuple(case for case in CASES if case not in accepted)


@dataclass(frozen=True, eq=False)
class Row:
    """A setting that may differ from case to case; the fields are those of a `Setting`.

    Attributes:
        untried: laws that say nothing of it, each with the reason.
    """

    name: str
    methods: ON_CASES
    neutral: ON_CASES
    refused: Mapping[str, str] = field(default_factory=dict)
    refused_later: Mapping[str, str] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    guided: bool = True
    told: tuple[str, ...] = UNTOLD
    untried: Mapping[Callable[..., None], str] = field(default_factory=dict)

    @cache  # noqa: B019  (one per row)
    def on(self, case: str) -> Setting:
        """The setting on a case."""
        return Setting(
            self.name,
            self.methods(case),
            lambda _: self.neutral(case),
            self.refused,
            self.refused_later,
            self.idle,
            self.guided,
            self.told,
        )

    def accepts(self, case: str) -> bool:
        return case not in self.refused and case not in self.refused_later

    def __str__(self) -> str:
        return self.name


def every(*methods: Method) -> ON_CASES:
    """The same on all cases."""
    return lambda _: methods


# -- the settings ----------------------------------------------------------------------------------------------------


@cache
def calibrated(case: str) -> Calibration:
    pipe = build(case)
    told = True if case in UNTOLD else None
    return calibrate(pipe, lambda: run(case, pipe, steps=STEPS, prompts=2), "branch", guidance=told)


def block_caching(case: str) -> tuple[Method, ...]:
    """With a threshold of about two steps' change."""
    measured = calibrated(case)
    changes = sorted(change for row in measured.changes.values() for change in row[1:])
    return (BlockCaching(measured, 1.9 * changes[len(changes) // 2]),)


def magnitude(case: str, threshold: float) -> tuple[Method, ...]:
    steps = steps_of(case)
    config = MagCacheConfig(threshold, num_inference_steps=steps, mag_ratios=torch.full((steps,), 0.99))
    return (Upstream(config),)


def broadcast(interval: int) -> ON_CASES:
    """In all attention, at all timesteps."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        cross_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=(-1, 1001),
        cross_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks",),
        cross_attention_block_identifiers=("blocks",),
    )
    return every(Upstream(config))


ALWAYS = {"start_timestep": 1000, "stop_timestep": 0}
MIDDLE_ONLY = dict.fromkeys(LONG_SKIPS, 'Choose mode="middle"')
NO_STACK = dict.fromkeys(U_NETS, "is a U-Net. DeepCache works")
NO_LONG_SKIPS = dict.fromkeys(others(*LONG_SKIPS), "DeepCache works on U-Nets, FORA and DeltaDiT on other")
DECIDES = {laws.plan_tells_the_truth: "it decides while it runs", laws.cost_is_what_was_promised: "as above"}
OTHER_STEPS = {laws.generations_are_independent: "it is made for one number of steps"}
ITS_OWN_COST = {laws.cost_is_what_was_promised: "it costs more than nothing; tests/test_nag.py counts it on every case"}
KNOWN_PLAN = {laws.trace_costs_what_was_counted: "its plan says so beforehand"}
STEERED = {"told": (*UNTOLD, *PIXART), "untried": ITS_OWN_COST | KNOWN_PLAN}


def skipping(name: str, method: Method, neutral: Method) -> Row:
    return Row(name, every(method), every(neutral), NO_LONG_SKIPS, untried=KNOWN_PLAN)


def steering(name: str, kind: type[Method], on: dict[str, float], off: dict[str, float], **fields: object) -> Row:
    def methods(case: str) -> tuple[Method, ...]:
        return (kind(**on, negative_prompt_embeds=text(case)),)

    def neutral(case: str) -> tuple[Method, ...]:
        return (kind(**on | off, negative_prompt_embeds=text(case)),)

    return Row(name, methods, neutral, **{"refused": WITHOUT_TEXT} | STEERED | fields)


ROWS = (
    Row("FORA", every(FORA(2)), every(FORA(interval=1)), untried=KNOWN_PLAN),
    Row(
        "Δ-DiT",
        every(DeltaDiT(interval=3, boundary=3)),
        every(DeltaDiT(interval=1)),
        NO_STACK | MIDDLE_ONLY,
        untried=KNOWN_PLAN,
    ),
    Row(
        "Δ-DiT, middle",
        every(DeltaDiT(interval=2, blocks=2, mode="middle")),
        every(DeltaDiT(interval=1, mode="middle")),
        NO_STACK,
        untried=KNOWN_PLAN,
    ),
    Row(
        "Block Caching",
        block_caching,
        lambda case: (BlockCaching(calibrated(case), 0),),
        untried=OTHER_STEPS | KNOWN_PLAN,
    ),
    skipping("Skip-Cache", SkipCache(2, 1, **ALWAYS), SkipCache(interval=1)),
    skipping("Skip-Cache, offset", SkipOffset(3, 2, **ALWAYS), SkipOffset(interval=1)),
    skipping("Skip-Cache, forecast", SkipForecast(2, 1, **ALWAYS), SkipForecast(interval=1)),
    skipping("Skip-Cache, drift", SkipDrift(threshold=float("inf"), longest=3), SkipDrift(longest=1)),
    Row(
        "ToCa as on Flux",
        every(ToCa(3, 0.6, schedule="flux")),
        every(ToCa(1, 0.6, schedule="flux")),
        dict.fromkeys(others(*test_laws.PLAIN_STACKS, "flux", "flux-true-cfg"), "stacks of plain blocks"),
        {"wan": "normalises its queries; take score='value_norm'"},
        untried=KNOWN_PLAN,
    ),
    Row(
        "first-block cache",
        every(Upstream(FirstBlockCacheConfig(threshold=0.8))),
        every(Upstream(FirstBlockCacheConfig(threshold=0.0))),
        dict.fromkeys(others(*PIXART, "dit", "wan", "flux", "flux-true-cfg"), "does not fit|fails on .* in diffusers"),
        untried=DECIDES | {laws.batch_equals_its_prompts: "diffusers' threshold is one for the whole batch"},
    ),
    Row("Pyramid Attention Broadcast", broadcast(2), broadcast(1), untried=DECIDES),
    Row(
        "TaylorSeer",
        every(Upstream(TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1))),
        every(Upstream(TaylorSeerCacheConfig(cache_interval=1, disable_cache_before_step=1))),
        dict.fromkeys(others(*JOINT), "attaches nothing"),
        untried=DECIDES,
    ),
    Row(
        "MagCache",
        lambda case: magnitude(case, 0.5),
        lambda case: magnitude(case, 0.0),
        dict.fromkeys(others(*PIXART, *JOINT, "dit", "wan"), "attaches nothing|does not fit|fails on .* in diffusers"),
        untried=DECIDES | OTHER_STEPS,
    ),
    steering("NAG", NAG, {"scale": 2.5, "tau": 2.0, "alpha": 0.5}, {"scale": 1.0}),
    Row(
        "NAG, two image streams",
        lambda case: (NAG(2.5, 2.0, 0.5, negative_prompt_embeds=text(case, tokens=TOKENS), mode="reference"),),
        lambda case: (NAG(2.5, 2.0, 0.0, negative_prompt_embeds=text(case, tokens=TOKENS), mode="reference"),),
        WITHOUT_TEXT,
        **STEERED,
    ),
    steering("NASA", NASA, {"phi": 0.4}, {"phi": 0.0}),
    steering(
        "VSF",
        VSF,
        {"scale": 3.0},
        {"end": 0},
        refused=WITHOUT_TEXT | dict.fromkeys(JOINT, "made for cross-attention"),
        refused_later={"sd-ip-adapter": "does not go with an IP-Adapter"},
        guided=False,
    ),
)

QUICK = ("sd", "pixart-sigma", "skip-dit", "wan", "flux-true-cfg")  # every row accepts one
LAWS = (
    laws.neutral_is_exact,
    laws.nothing_left,
    laws.generations_are_independent,
    laws.plan_tells_the_truth,
    laws.cost_is_what_was_promised,
    laws.trace_costs_what_was_counted,
    laws.batch_equals_its_prompts,
)
ACCEPTED = [(row, case) for row in ROWS for case in CASES if row.accepts(case)]


def marked(*values, quick: bool):
    return pytest.param(*values, marks=() if quick else pytest.mark.slow, id="-".join(map(name_of, values)))


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


def first_quick(row: Row) -> str:
    return next(case for case in QUICK if row.accepts(case))


# -- nothing is missing ----------------------------------------------------------------------------------------------


def kinds_of(methods: tuple[Method, ...]) -> set[type]:
    return {type(method) for method in methods}


def leaves(kind: type) -> set[type]:
    """What derives from it and has nothing below."""
    below = kind.__subclasses__()
    return set().union(*map(leaves, below)) if below else {kind}


def test_every_method_is_under_the_laws():
    settled = [s.methods for s in (*test_laws.SETTINGS, *test_laws_of_freezing.SETTINGS)]
    settled += [row.methods(first_quick(row)) for row in ROWS]
    public = {kind for name in whenwhere.__all__ if isinstance(kind := getattr(whenwhere, name), type)}
    methods = {kind for kind in public if issubclass(kind, Method) and kind is not Method}
    defined = {
        kind for kind in leaves(Method) if kind.__module__.startswith(("whenwhere.methods", "whenwhere.guidance"))
    }
    assert set().union(*map(kinds_of, settled)) == methods == defined


def test_every_cache_of_diffusers_that_is_known_is_under_the_laws():
    from whenwhere.upstream import CONFIGURATIONS

    ours = [method for row in ROWS for method in row.methods(first_quick(row)) if isinstance(method, Upstream)]
    assert {type(method.config).__name__ for method in ours} == set(CONFIGURATIONS)


@pytest.mark.parametrize("row", [CFG("blurry"), whenwhere.FewerSteps(3)], ids=name_of)
def test_what_is_compared_but_is_no_method_is_not_attached(row):
    with pytest.raises(TypeError, match="is not a method; methods are objects such as"):
        attach(build("sd"), row)


# -- the laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "case"), [marked(row, case, quick=case in QUICK) for row in ROWS for case in CASES])
def test_a_pipeline_is_accepted_or_refused_as_the_table_says(row, case):
    laws.accepted_or_refused(row.on(case), case)


@pytest.mark.parametrize(
    ("law", "row", "case"),
    [
        marked(law, row, case, quick=case == first_quick(row) or (case in QUICK and law is laws.neutral_is_exact))
        for row, case in ACCEPTED
        for law in LAWS
        if law not in row.untried
    ],
)
def test_the_laws_hold(law, row, case):
    law(row.on(case), case)


@pytest.mark.parametrize(
    ("interruption", "row", "case"),
    [
        marked(interruption, row, case, quick=case == first_quick(row) and interruption == "error")
        for row, case in ACCEPTED
        if laws.generations_are_independent not in row.untried
        for interruption in INTERRUPTIONS
    ],
)
def test_nothing_is_left_after_an_interrupted_generation(interruption, row, case):
    if not can_be_interrupted(interruption, case):
        pytest.skip(f"{case} knows no {interruption}")
    laws.nothing_left_after(interruption, row.on(case), case)
