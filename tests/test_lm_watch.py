"""Figures of routers and students are those computed by hand; collapse is noticed, and so is what is no number."""

import pytest
import torch
from tiny_language import routed, text

from whenwhere.lm import SDT, STT, Knob, MoD, router_metrics, set_step, turned, watched
from whenwhere.lm.call import Note
from whenwhere.lm.watch import _measure, area


def test_figures_by_hand():
    mask = torch.tensor([[True, True, False, False, True]])
    keep = torch.tensor([[True, True, True, True, False]])  # the last is padding
    score = torch.tensor([[3.0, 1.0, 1.0, 0.0, 9.0]])
    student = torch.tensor([[2.0, -1.0, 1.0, -1.0, 5.0]])
    found = _measure(Note(mask, score, student, score.sigmoid(), {}, {}), keep)
    assert found.realised == 0.5
    assert found.score_mean == 1.25
    assert found.tied == 0.5  # two of four have the lowest selected score, 1
    assert (found.accuracy, found.trivial, found.precision, found.recall) == (0.5, 0.5, 0.5, 0.5)
    assert found.auc == (2 + 0.5) / 4  # 2 beats 1 and -1; -1 loses to 1 and ties with -1


def test_the_area_against_all_pairs():
    scores = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(0)).float()
    positive = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.3
    pairs = scores[positive][:, None] - scores[~positive]
    expected = ((pairs > 0).double() + (pairs == 0) / 2).mean().item()
    assert area(scores, positive) == pytest.approx(expected)
    assert area(scores, torch.zeros(60, dtype=torch.bool)) is None


def test_a_student_that_learns_is_measured_to_do_so():
    model, ids = routed(STT()).train(), text(8, 32)
    set_step(model, 0, 100)
    students = [parameter for layer in model.routed for parameter in layer.student.parameters()]
    optimiser = torch.optim.Adam(students, 1e-2)
    areas = []
    for _ in range(25):
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        areas.append(router_metrics(model)[1].auc)
    assert areas[-1] > max(areas[0], 0.8)
    assert router_metrics(model)[1].accuracy > router_metrics(model)[1].trivial
    with pytest.raises(ValueError, match="needs a forward call before"):
        router_metrics(routed(MoD()))


def test_collapse_is_noticed():
    model, ids = routed(MoD()), text(4, 60)
    collapsed = r"layer [13] processes (0|100).0% of the tokens: its router has collapsed"
    with pytest.warns(RuntimeWarning, match=collapsed), watched(model):
        model(ids, threshold={1: -1e9, 3: 1e9})
    with watched(model):
        model(ids, policy="topk")
        model(ids, policy="all")
        model(text(1, 2), threshold=1e9)  # of two tokens none is no collapse
    with turned(model, Knob(threshold=1e9)):
        model(ids)


def test_what_is_no_number_is_noticed_where_it_is_asked_for():
    model, ids = routed(SDT()), text()
    model.routed[1].router.criterion.raw_o_ce.data.fill_(float("nan"))
    model(ids, policy="topk")
    with pytest.raises(FloatingPointError, match="layer 3: scores of the router are not finite"), watched(model):
        model(ids, policy="topk")
