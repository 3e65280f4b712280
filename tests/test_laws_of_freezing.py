"""The laws, for the methods that freeze the text: cross-attention alone, with a gate that decides, the text's stream.

What is decided while running is planned exactly where the decision is forced: a threshold of 0 waits for the latest
gate. The quick tests run on a few pipelines; `pytest -m slow` runs all.
"""

import laws
import pytest
from interruptions import INTERRUPTIONS, can_be_interrupted
from laws import Setting

from whenwhere import AdaptiveTGate, CrossAttentionFreeze, GuidanceStop, TextStreamFreeze

SEPARATE = ("sd", "sd-deep", "sd-img2img", "sd-controlnet", "sd-ip-adapter", "sd-lcm", "sdxl", "sdxl-inpaint")
SEPARATE += ("pixart-alpha-sized", "pixart-sigma", "hunyuan-dit", "latte")
JOINT = ("sd3", "sd35", "flux", "flux-true-cfg")
WITHOUT_CROSS_ATTENTION = dict.fromkeys(("dit", *JOINT), "needs cross-attention; .* GuidanceStop works")
WITHOUT_JOINT_ATTENTION = dict.fromkeys(("sd", "svd", "dit", "pixart-sigma"), "freezes the text in joint attention")
THREE_BRANCHES = dict.fromkeys(["sd-pag", "sd-pix2pix"], "averages two guidance branches; .* has 3")

SETTINGS = {
    Setting(
        "frozen cross-attention",
        (CrossAttentionFreeze(3),),
        neutral=lambda steps: (CrossAttentionFreeze(steps),),
        refused=WITHOUT_CROSS_ATTENTION,
        refused_later={},
    ): (*SEPARATE, "sd-pix2pix", "dit", "sd3"),
    Setting(
        "frozen cross-attention, guidance stopped later",
        (CrossAttentionFreeze(2, "mean"), GuidanceStop(3)),
        neutral=lambda steps: (CrossAttentionFreeze(steps, "mean"), GuidanceStop(steps)),
        refused=WITHOUT_CROSS_ATTENTION,
        refused_later=THREE_BRANCHES,
    ): (*(case for case in SEPARATE if case != "sd-lcm"), "svd", "sd-pag", "sd-pix2pix", "flux"),
    Setting(
        "adaptive T-GATE",
        (AdaptiveTGate(0, 2, 3),),
        neutral=lambda steps: (AdaptiveTGate(0, steps, steps),),
        refused=WITHOUT_CROSS_ATTENTION,
        refused_later=THREE_BRANCHES,
    ): (*SEPARATE, "sd-pag", "sd-pix2pix", "dit", "flux"),
    Setting(
        "frozen text stream",
        (TextStreamFreeze(3),),
        neutral=lambda steps: (TextStreamFreeze(steps),),
        refused=WITHOUT_JOINT_ATTENTION,
        refused_later={},
    ): (*JOINT, "sd", "svd", "dit", "pixart-sigma"),
}

QUICK = ("sd", "pixart-sigma", "sd3", "flux-true-cfg")
ALL = [(setting, case) for setting, cases in SETTINGS.items() for case in cases]
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


@pytest.mark.parametrize(("setting", "case"), ALL, ids=lambda value: str(value))
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
