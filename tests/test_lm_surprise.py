"""Surprise is what the equations say, on numbers a reader can check; nothing in it looks ahead."""

import math

import pytest
import torch

from whenwhere.lm.criterion import BetaSchedule
from whenwhere.lm.networks import prior_width
from whenwhere.lm.surprise import (
    Evidence,
    gaussian_surprise,
    inverse_softplus,
    moving_average,
    static_surprise,
    weigh,
)

ONE = torch.tensor(1.0)
CHANGE = torch.tensor([[[2.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 4.0]]])  # (1, 4, 2)
GUESS = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 2.0]]])
RANK = torch.arange(4)[None]


def by_hand(window: int = 2) -> Evidence:
    static = static_surprise(CHANGE)
    average = moving_average(static, RANK, window)
    o_ce, m_cu = torch.tensor(math.e), torch.tensor(0.5)
    return weigh(static, static_surprise(CHANGE - GUESS), average, o_ce, m_cu, (ONE, 2 * ONE))


def test_the_hand_computed_example():
    found = by_hand()
    assert found.static.tolist() == [[2, 1, 0, 8]]
    assert found.change.tolist() == [[2, 0, 2, 2]]
    torch.testing.assert_close(found.expected, torch.tensor([[1.0, 2, -1, 7]]))  # D_st - D_ch + 1
    torch.testing.assert_close(found.unexpected, torch.tensor([[1.0, 0.25, -0.25, 6]]))  # averages 2, 1.5, 0.5, 4
    a, b = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert found.gate[0, 0].item() == pytest.approx(a + b - a * b, abs=1e-6)


def test_gate_and_score_say_the_same_and_the_score_does_not_saturate():
    found = by_hand()
    assert (found.gate >= 0).all()
    assert (found.gate <= 1).all()
    assert found.gate[0, 3] == 1
    torch.testing.assert_close(found.score[:, :3], -torch.log1p(-found.gate[:, :3]), atol=1e-6, rtol=1e-6)
    assert found.score.argsort().tolist() == found.gate.argsort().tolist()
    far = weigh(torch.tensor([[90.0, 80.0]]), torch.zeros(1, 2), torch.zeros(1, 2), ONE, ONE, (100 * ONE, ONE))
    assert far.gate.tolist() == [[1, 1]]
    assert far.score[0, 0] > far.score[0, 1]


@pytest.mark.parametrize("criteria", ["ce", "cu"])
def test_one_criterion_alone(criteria):
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    found = weigh(one, zero, zero, ONE, ONE, (ONE, 3 * ONE), criteria)
    assert found.gate.item() == pytest.approx(torch.sigmoid(ONE * (1 if criteria == "ce" else 3)).item())


@pytest.mark.parametrize("padding", ["available", "replicate"])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_the_moving_average_is_that_of_a_loop_and_of_chunks(padding, window):
    values = torch.rand(2, 11, generator=torch.Generator().manual_seed(0))
    rank = torch.stack([torch.arange(11), torch.tensor([0, 0, 0, 1, 2, 3, 4, 0, 1, 2, 3])])
    expected = torch.zeros(2, 11)
    for row in range(2):
        for t in range(11):
            document = values[row, t - rank[row, t] : t + 1]
            last = document[-window:].tolist()
            missing = [] if padding == "available" else [document[0].item()] * (window - len(last))
            expected[row, t] = sum(missing + last) / len(missing + last)
    torch.testing.assert_close(moving_average(values, rank, window, padding), expected)
    chunk = moving_average(values[:, 8:], rank[:, 8:], window, padding, values[:, max(0, 8 - window + 1) : 8])
    torch.testing.assert_close(chunk, expected[:, 8:])


def test_nothing_changes_is_the_same_hypothesis_in_both_units():
    zero = torch.zeros_like(CHANGE)
    torch.testing.assert_close(gaussian_surprise(CHANGE, zero, zero), static_surprise(CHANGE) / 2)
    torch.testing.assert_close(gaussian_surprise(zero, zero, zero), torch.zeros(1, 4))
    p, q = torch.distributions.Normal(2.0, 1.0), torch.distributions.Normal(0.5, 3.0)
    found = gaussian_surprise(
        torch.full((1, 1, 3), 2.0), torch.full((1, 1, 3), 0.5), torch.full((1, 1, 3), math.log(9))
    )
    assert found.item() == pytest.approx(torch.distributions.kl_divergence(p, q).item(), rel=1e-5)


def test_widths_of_the_guess():
    assert [prior_width(896, 1 / n) for n in (16, 8, 4, 2)] == [56, 112, 224, 448]
    assert prior_width(10, 0.01) == 2
    assert prior_width(30, 0.1) == 4


def test_softplus_and_its_inverse():
    for value in (0.437, 1.025, 1.1, 30.0):
        raw = torch.tensor(inverse_softplus(value))
        assert torch.nn.functional.softplus(raw).item() == pytest.approx(value, rel=1e-6)


def test_beta_rises_after_warming_up():
    linear, cosine = BetaSchedule(0.1, 10, 100), BetaSchedule(0.1, 10, 100, "cosine")
    assert [linear.at(step, 1100) for step in (0, 100, 600, 1100)] == pytest.approx([0.1, 0.1, 5.05, 10])
    assert [cosine.at(step, 1100) for step in (100, 600, 1100)] == pytest.approx([0.1, 5.05, 10], abs=1e-5)
    with pytest.raises(ValueError, match="β must be above 0"):
        BetaSchedule(start=0)
