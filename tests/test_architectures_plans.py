"""Architectures planned by their names: guidance as their pipelines have it, in one batch or in separate calls."""

import pytest

import whenwhere
from whenwhere import FORA


def planned(name: str, *methods: whenwhere.Method, steps: int = 4, guidance: bool = True) -> whenwhere.Plan:
    return whenwhere.plan(name, *methods, steps=steps, guidance=guidance)


@pytest.mark.parametrize(("name", "evaluations"), [("wan2.1-t2v-1.3b", 8), ("sana-1600m-1024", 4), ("flux1-dev", 4)])
def test_only_separate_guidance_calls_are_evaluations_of_their_own(name, evaluations):
    plan = planned(name)
    assert plan.steps == evaluations
    assert planned(name, guidance=False).steps == 4


@pytest.mark.parametrize(("name", "branches"), [("wan2.1-t2v-1.3b", 2), ("sana-1600m-1024", 2), ("flux1-dev", 1)])
def test_guidance_costs_as_much_again_unless_it_is_distilled(name, branches):
    guided, alone = planned(name).priced, planned(name, guidance=False).priced
    assert guided.baseline.all == branches * alone.baseline.all


@pytest.mark.parametrize(
    "name",
    [
        "sana-1600m-1024",
        "sd3.5-medium",
        "wan2.1-t2v-1.3b",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("playground-v2.5", "sd3.5-large", "wan2.1-t2v-14b")),
    ],
)
def test_reusing_three_steps_of_six_saves_half_of_the_blocks(name):
    cost = planned(name, FORA(interval=3), steps=6).priced  # computes the first, the third and the last step
    assert 0.5 < cost.macs.all / cost.baseline.all < (0.7 if name == "playground-v2.5" else 0.51)
