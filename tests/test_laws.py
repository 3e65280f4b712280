"""Every method obeys the laws on every pipeline it accepts, and refuses the others in words that help.

A new method adds a row to SETTINGS. The quick tests of the slower laws run on a few cases; `pytest -m slow` runs all.
"""

import laws
import pytest
from interruptions import INTERRUPTIONS, can_be_interrupted
from laws import Setting
from pipelines import CASES

from whenwhere import DeepCache, FasterDiffusion, GuidanceStop, TGate, ToCa

# One reason per column of cases: no skip connections, no cross-attention, branches that no rule covers.
WITHOUT_SKIPS = dict.fromkeys(
    [
        *("pixart-alpha", "pixart-alpha-sized", "pixart-sigma", "dit", "latte", "sana", "wan"),
        *("sd3", "sd35", "flux", "flux-true-cfg"),
    ],
    "TGate works on .* GuidanceStop on all",
)
WITHOUT_TEXT_ATTENTION = dict.fromkeys(
    ["dit", "skip-dit", "sd3", "sd35", "flux", "flux-true-cfg"], "needs cross-attention; .* GuidanceStop works"
)
PERTURBED = {"sd-pag": "perturbed-attention guidance splits its batch"}
THREE_BRANCHES = dict.fromkeys(["sd-pag", "sd-pix2pix"], "averages two guidance branches; .* has 3. GuidanceStop works")
WITHOUT_ENCODER = dict.fromkeys(
    ["pixart-alpha", "pixart-alpha-sized", "pixart-sigma", "dit", "latte", "sana", "wan"], "use FORA or DeltaDiT"
)
WITHOUT_ENCODER |= dict.fromkeys(["sd3", "sd35", "flux", "flux-true-cfg"], "FORA works on it")
WITHOUT_ENCODER |= {"sd-adapter": "changes in place; DeepCache works with adapters"}
WITHOUT_PURE_NOISE = dict.fromkeys(["sd-img2img", "sdxl-img2img", "sdxl-inpaint"], "starts from a picture .* alpha=0")
PLAIN_STACKS = ("dit", "pixart-alpha", "pixart-alpha-sized", "pixart-sigma", "wan")

SETTINGS = (
    Setting(
        "T-GATE",
        (TGate(gate_step=3, sp_interval=2, fi_interval=2, warm_up=0),),
        neutral=lambda steps: (TGate(gate_step=steps, sp_interval=1),),
        refused=WITHOUT_TEXT_ATTENTION,
        refused_later=THREE_BRANCHES,
    ),
    Setting(
        "guidance stop",
        (GuidanceStop(2),),
        neutral=lambda steps: (GuidanceStop(steps),),
        refused={},
        refused_later=PERTURBED,
        idle=frozenset({"flux", "sd-lcm"}),
    ),
    Setting(
        "DeepCache",
        (DeepCache(interval=3, branch=1),),
        neutral=lambda _: (DeepCache(interval=1, branch=1),),
        refused=WITHOUT_SKIPS,
        refused_later={},
    ),
    Setting(
        "T-GATE + DeepCache",
        (TGate(gate_step=2, sp_interval=1, warm_up=0), DeepCache(interval=4)),
        neutral=lambda steps: (TGate(gate_step=steps, sp_interval=1), DeepCache(interval=1)),
        refused=WITHOUT_SKIPS | WITHOUT_TEXT_ATTENTION,
        refused_later=THREE_BRANCHES,
    ),
    Setting(
        "Faster Diffusion",
        (FasterDiffusion(every=3, alpha=0),),
        neutral=lambda _: (FasterDiffusion(every=1, alpha=0),),
        refused=WITHOUT_ENCODER,
        refused_later={},
    ),
    Setting(
        "Faster Diffusion, ahead and with noise",
        (FasterDiffusion(every=3, batch_cap=2),),
        neutral=lambda _: (FasterDiffusion(every=1, alpha=0, batch_cap=2),),
        refused=WITHOUT_ENCODER,
        refused_later=WITHOUT_PURE_NOISE,
    ),
    Setting(
        "ToCa",
        (ToCa(interval=3, fresh_ratio=0.3),),
        neutral=lambda _: (ToCa(interval=1),),
        refused=dict.fromkeys([case for case in CASES if case not in PLAIN_STACKS], "stacks of plain blocks")
        | dict.fromkeys(("flux", "flux-true-cfg"), "has text among it: schedule='flux'"),
        refused_later={"wan": "normalises its queries; take score='value_norm'"},
    ),
)

# One case of every family, and of every way to guide.
SOME = ("sd-deep", "sd-controlnet", "sd-img2img", "sd-pix2pix", "sdxl", "svd", "pixart-alpha", "dit", "hunyuan-dit")
SOME += ("latte", "sd3", "flux-true-cfg")
FEW = ("sd", "sdxl", "dit", "hunyuan-dit", "flux-true-cfg")

EVERY_PAIR = [(setting, case) for setting in SETTINGS for case in CASES]
ACCEPTED = [(setting, case) for setting, case in EVERY_PAIR if setting.accepts(case)]


def pairs(quick):
    """All accepted pairs; those outside the quick selection are marked slow."""
    return pytest.mark.parametrize(
        ("setting", "case"),
        [pytest.param(*pair, marks=() if pair[1] in quick else pytest.mark.slow) for pair in ACCEPTED],
        ids=lambda value: str(value),
    )


@pytest.mark.parametrize(("setting", "case"), EVERY_PAIR, ids=lambda value: str(value))
def test_a_pipeline_is_accepted_or_refused_as_the_table_says(setting, case):
    laws.accepted_or_refused(setting, case)


@pairs(quick=SOME)
def test_neutral_is_exact(setting, case):
    laws.neutral_is_exact(setting, case)


@pairs(quick=SOME)
def test_nothing_is_left_after_detaching(setting, case):
    laws.nothing_left(setting, case)


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
@pairs(quick=FEW)
def test_nothing_is_left_after_an_interrupted_generation(interruption, setting, case):
    if not can_be_interrupted(interruption, case):
        pytest.skip(f"{case} knows no {interruption}")
    laws.nothing_left_after(interruption, setting, case)


@pairs(quick=SOME)
def test_generations_are_independent(setting, case):
    laws.generations_are_independent(setting, case)


@pairs(quick=SOME)
def test_the_plan_tells_the_truth(setting, case):
    laws.plan_tells_the_truth(setting, case)


@pairs(quick=SOME)
def test_the_cost_is_what_was_promised(setting, case):
    laws.cost_is_what_was_promised(setting, case)


@pairs(quick=SOME)
def test_a_batch_equals_its_prompts_one_by_one(setting, case):
    laws.batch_equals_its_prompts(setting, case)
