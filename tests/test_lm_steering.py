"""Thresholds that follow a budget: by hand, in pieces as at once, and towards it where the scores have drifted."""

import pytest
import torch
from tiny_language import calibrated, text

from whenwhere.lm import SDT, STT, Knob, MoD, turned
from whenwhere.lm.select import steered


def test_thresholds_by_hand():
    over = torch.tensor([[0.1, 0.1, 0.1, -0.05], [0.1, 0.1, 0.1, 0.1]])
    keep = torch.tensor([[True, True, True, True], [False, True, True, True]])
    mask, drift = steered(over, 0.4, 0.5, keep, None, torch.zeros(2))
    # 0 -> ran 0.2 -> passed 0.0 -> ran 0.2 -> passed 0.0; padding moves nothing
    assert mask.tolist() == [[True, False, True, False], [False, True, False, True]]
    torch.testing.assert_close(drift, torch.tensor([0.0, 0.2]))
    always = torch.tensor([[True, True, True, True]])
    assert steered(over[:1] - 9, 0.4, 0.5, None, always, torch.zeros(1))[0].all()


@pytest.mark.parametrize(
    "routing", [MoD(), SDT(surprise="relative"), STT()], ids=lambda routing: type(routing).__name__
)
def test_in_pieces_as_at_once(routing):
    model, ids = calibrated(routing), text(3, 20)
    with turned(model, Knob(steer=0.05)):
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :7], use_cache=True)
        second = model(ids[:, 7:15], past_key_values=first.past_key_values)
        third = [model(ids[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(15, 20)]
    torch.testing.assert_close(torch.cat([first.logits, second.logits, *third], 1), whole, atol=1e-4, rtol=1e-4)
    assert not torch.equal(model(ids, use_cache=False).logits, whole)


def test_the_budget_is_held_where_the_scores_have_drifted():
    model, ids = calibrated(MoD()), text(4, 200, seed=3)
    for layer in model.routed:
        layer.quantiles += 0.5  # as if the texts had changed since the calibration
    model(ids)
    before = [abs(share - 0.5) for share in model.realised.values()]
    with turned(model, Knob(steer=0.05)):
        model(ids)
        after = [abs(share - 0.5) for share in model.realised.values()]
        model.generate(text(2, 5), max_new_tokens=4, do_sample=False)
    assert min(before) > 0.3
    assert max(after) < 0.1


def test_what_cannot_be_steered():
    with pytest.raises(ValueError, match="give no threshold with it"):
        Knob(threshold=0.1, steer=0.1)
    with pytest.raises(ValueError, match="steer must be at least 0, got -1"):
        Knob(steer=-1)
