"""The laws, for the methods that freeze the text: cross-attention alone, with a gate that decides, the text's stream.

What is decided while running is planned exactly where the decision is forced: a threshold of 0 waits for the latest
gate. The quick tests run on a few pipelines; `pytest -m slow` runs all.
"""

import laws
import pytest
from interruptions import INTERRUPTIONS, can_be_interrupted
from laws import Setting
from pipelines import CASES

from whenwhere import AdaptiveTGate, CrossAttentionFreeze, GuidanceStop, TextStreamFreeze

JOINT = ("sd3", "sd35", "flux", "flux-true-cfg")
WITHOUT_CROSS_ATTENTION = dict.fromkeys(("dit", "skip-dit", *JOINT), "needs cross-attention; .* GuidanceStop works")
WITHOUT_JOINT_ATTENTION = dict.fromkeys(
    [case for case in CASES if case not in JOINT], "freezes the text in joint attent"
)
THREE_BRANCHES = dict.fromkeys(["sd-pag", "sd-pix2pix"], "averages two guidance branches; .* has 3")
SEPARATE_CALLS = {"wan": "guides by separate calls of its denoiser. TGate works on it"}

# Every setting, and the cases it is not tried on: there one of its methods has nothing to do, or a gate closes early.
SETTINGS = {
    Setting(
        "frozen cross-attention",
        (CrossAttentionFreeze(3),),
        neutral=lambda steps: (CrossAttentionFreeze(steps),),
        refused=WITHOUT_CROSS_ATTENTION,
        refused_later={},
    ): {"svd"},  # whose attention to one image token is the same at every step
    Setting(
        "frozen cross-attention, guidance stopped later",
        (CrossAttentionFreeze(2, "mean"), GuidanceStop(3)),
        neutral=lambda steps: (CrossAttentionFreeze(steps, "mean"), GuidanceStop(steps)),
        refused=WITHOUT_CROSS_ATTENTION,
        refused_later=THREE_BRANCHES,
    ): {"sd-lcm"},
    Setting(
        "adaptive T-GATE",
        (AdaptiveTGate(0, 2, 3),),
        neutral=lambda steps: (AdaptiveTGate(0, steps, steps),),
        refused=WITHOUT_CROSS_ATTENTION,
        refused_later=THREE_BRANCHES | SEPARATE_CALLS,
    ): {"svd"},
    Setting(
        "adaptive T-GATE with one gate",
        (AdaptiveTGate(0, 3, 3),),
        neutral=lambda steps: (AdaptiveTGate(0, steps, steps),),
        refused={},
        refused_later={},
    ): set(CASES) - {"svd"},
    Setting(
        "frozen text stream",
        (TextStreamFreeze(3),),
        neutral=lambda steps: (TextStreamFreeze(steps),),
        refused=WITHOUT_JOINT_ATTENTION,
        refused_later={},
    ): set(),
}

QUICK = ("sd", "pixart-sigma", "sd3", "flux-true-cfg")
ALL = [(setting, case) for setting, untried in SETTINGS.items() for case in CASES if case not in untried]
ACCEPTED = [(setting, case) for setting, case in ALL if setting.accepts(case)]
LAWS = (
    laws.neutral_is_exact,
    laws.nothing_left,
    laws.generations_are_independent,
    laws.plan_tells_the_truth,
    laws.cost_is_what_was_promised,
    laws.batch_equals_its_prompts,
)


def pairs(found):
    return pytest.mark.parametrize(
        ("setting", "case"),
        [pytest.param(*pair, marks=() if pair[1] in QUICK else pytest.mark.slow) for pair in found],
        ids=lambda value: str(value),
    )


@pairs(ALL)
def test_a_pipeline_is_accepted_or_refused_as_the_table_says(setting, case):
    laws.accepted_or_refused(setting, case)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pairs(ACCEPTED)
def test_laws(law, setting, case):
    law(setting, case)


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
@pairs(ACCEPTED)
def test_nothing_is_left_after_an_interrupted_generation(interruption, setting, case):
    if not can_be_interrupted(interruption, case):
        pytest.skip(f"{case} knows no {interruption}")
    laws.nothing_left_after(interruption, setting, case)
