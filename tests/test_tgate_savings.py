"""What one evaluation and its attention cost, and which of T-GATE's decisions saves how much: published shares."""

from itertools import pairwise

import pytest
from published import TERA, both, ca, plan

from whenwhere import CrossAttentionFreeze, GuidanceStop, TGate

# Tera multiply-adds of one row, without and with the two products of attention: an evaluation, cross-attention,
# self-attention. Counted on the published configurations; with the first the papers' tables are met.
UNITS = {
    "sd15": ((0.3386, 0.0143, 0.0256), (0.4016, 0.0161, 0.0868)),
    "sd21": ((0.7605, 0.0308, 0.0576), (1.0746, 0.0348, 0.3677)),
    "sdxl": ((2.9887, 0.2611, 0.4698), (3.3806, 0.2772, 0.8456)),
    "pixart-alpha-1024": ((2.1407, 0.3133, 0.6088), (3.2548, 0.3450, 1.6911)),
}


def spent(architecture, *methods, steps=25, guidance=True):
    return plan(architecture, methods, steps, guidance).cost.macs


@pytest.mark.parametrize("architecture", UNITS)
def test_the_unit_costs_are_those_of_the_published_configurations(architecture):
    """Without guidance: a plain evaluation, one that reuses cross-attention, one that reuses self-attention."""
    one = spent(architecture, steps=1, guidance=False)
    frozen = spent(architecture, CrossAttentionFreeze(1), steps=2, guidance=False)
    reused = spent(architecture, TGate(3, sp_interval=2, warm_up=0), steps=3, guidance=False)
    for kind, expected in zip(("papers", "all"), UNITS[architecture], strict=True):
        unit = getattr(one, kind)
        found = (unit, 2 * unit - getattr(frozen, kind), 3 * unit - getattr(reused, kind))
        assert [value / TERA for value in found] == pytest.approx(expected, abs=1e-4)  # one in the last digit


# Setting, total and baseline in tera multiply-adds, percent of the saving: branch, cross-attention, self-attention.
SHARES = [
    ("sd15", ca(5), 9.87, 16.93, (95.9, 4.1, 0)),
    ("sdxl", ca(10), 100.7, 149.4, (92.0, 8.0, 0)),
    ("sdxl", both(10, 5), 96.0, 149.4, (83.9, 7.3, 8.8)),
    ("pixart-alpha-1024", ca(15), 82.5, 107.0, (87.2, 12.8, 0)),
    ("pixart-alpha-1024", both(15, 3), 74.0, 107.0, (64.7, 9.5, 25.8)),
    ("pixart-alpha-1024", both(10, 5), 64.1, 107.0, (74.9, 11.0, 14.2)),
]


@pytest.mark.parametrize(("architecture", "method", "total", "baseline", "percent"), SHARES, ids=str)
def test_most_of_what_t_gate_saves_is_the_dropped_branch(architecture, method, total, baseline, percent):
    """Each decision is added to those before it: guidance stops, cross-attention freezes, self-attention is reused."""
    m = method.gate_step
    stages = ((), (GuidanceStop(m, "unconditional"),), (ca(m),), (method,))
    costs = [spent(architecture, *methods).papers for methods in stages]
    assert [costs[-1] / TERA, costs[0] / TERA] == pytest.approx([total, baseline], abs=0.051)
    saved = [100 * (before - after) / (costs[0] - costs[-1]) for before, after in pairwise(costs)]
    assert saved == pytest.approx(percent, abs=0.1)  # as above


@pytest.mark.parametrize(
    ("architecture", "full", "gated", "percent"),
    [("pixart-alpha-1024", 162.7, 91.8, -43.6), ("sdxl", 169.0, 105.7, -37.5)],
)
def test_counting_everything_stopped_guidance_alone_saves_thirty_percent(architecture, full, gated, percent):
    plain, ours = spent(architecture).all, spent(architecture, both(10, 5)).all
    assert [plain / TERA, ours / TERA] == pytest.approx([full, gated], abs=0.051)
    assert 100 * (ours / plain - 1) == pytest.approx(percent, abs=0.051)
    assert spent(architecture, GuidanceStop(10)).all / plain == pytest.approx(0.7)
