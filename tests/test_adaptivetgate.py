"""Adaptive T-GATE: gates are decided by convergence, within bounds, for every sample by itself."""

import math

import pytest
import torch
from naive import Attentions, combine, denoiser, distance, fill, half, noise_of, opening, sample
from pipelines import build, run

from whenwhere import AdaptiveTGate, DeepCache, Plan, TGate, attach, plan

ALIKE = ("sd", "sdxl", "pixart-sigma", "hunyuan-dit", "latte")


def drawn(name, method, *others, **options):
    pipe = build(name)
    with attach(pipe, method, *others) as attachment:
        latents = run(name, pipe, **options)
    return latents, attachment


@pytest.mark.parametrize(("threshold", "gate"), [(math.inf, 2), (0, 4)])
@pytest.mark.parametrize("name", ALIKE)
def test_at_its_bounds_it_is_t_gate_bit_for_bit(name, threshold, gate):
    latents, attachment = drawn(name, AdaptiveTGate(threshold, 2, 4), prompts=2)
    fixed, expected = drawn(name, TGate(gate, sp_interval=1), prompts=2)
    assert attachment.notes()["gates"] == [gate, gate]
    assert torch.equal(latents, fixed)
    rows = dict(attachment.trace.groups)["model"].replace("?", "#")
    assert rows == dict(expected.trace.groups)["model"]


@pytest.mark.parametrize("name", ALIKE)
def test_the_gate_closes_at_the_first_step_of_the_window_that_is_calm(name):
    _, attachment = drawn(name, AdaptiveTGate(0, 2, 5))
    rates = [rate for (rate,) in attachment.notes()["rates"].values()]  # after evaluations 2, 3, 4, 5
    for threshold in (1.05 * rates[1], 1.05 * rates[2]):
        latents, attachment = drawn(name, AdaptiveTGate(threshold, 2, 5))
        gate = 2 + next(i for i, rate in enumerate(rates) if rate <= threshold)
        assert attachment.notes()["gates"] == [gate]
        assert torch.equal(latents, drawn(name, TGate(gate, sp_interval=1))[0])
        assert attachment.trace.remarks == (f"AdaptiveTGate: gates at {gate} of 6",)


def test_the_measured_rate_is_that_of_the_unprojected_outputs_within_a_third():
    """Eight directions estimate a length with a relative deviation of about a quarter for one token; there are many."""
    pipe = build("sd")
    outputs: dict[str, list] = {}
    for path, module in pipe.unet.named_modules():
        if path.endswith(".attn2"):
            module.register_forward_hook(lambda _, __, output, path=path: outputs.setdefault(path, []).append(output))
    run("sd", pipe)
    means = [[output.reshape(2, -1).mean(0) for output in seen] for seen in outputs.values()]
    exact = [6 * sum(float((m[s] - m[s - 1]).norm() / m[s].norm()) for m in means) / len(means) for s in range(1, 5)]
    _, attachment = drawn("sd", AdaptiveTGate(0, 2, 5))
    rates = attachment.notes()["rates"]
    assert list(rates) == [1, 2, 3, 4]
    assert [rate for (rate,) in rates.values()] == pytest.approx(exact, rel=0.33)


@pytest.mark.parametrize("name", ["sd", "pixart-sigma", "latte"])
def test_a_sample_has_its_own_gate_whatever_else_is_in_the_batch(name):
    _, attachment = drawn(name, AdaptiveTGate(0, 2, 5), prompts=3)
    first = attachment.notes()["rates"][2]
    between = (min(first) + max(first)) / 2  # so that some close after evaluation 3, the others not
    method = AdaptiveTGate(between, 3, 5)
    together, attachment = drawn(name, method, prompts=3)
    gates = attachment.notes()["gates"]
    assert len(set(gates)) > 1
    model = dict(attachment.trace.groups)["model"]
    assert model.index("/") == max(gates)
    for i in range(3):
        alone, single = drawn(name, method, seed=i)
        assert single.notes()["gates"] == [gates[i]]
        assert distance(together[i : i + 1], alone) < 1e-4


def test_without_guidance_attention_is_frozen_and_no_branch_is_dropped():
    _, attachment = drawn("sd-lcm", AdaptiveTGate(math.inf, 2, 4))
    assert dict(attachment.trace.groups)["cross-attention x4"] == "##...."
    assert "/" not in dict(attachment.trace.groups)["model"]


def test_a_plan_says_what_is_known_before_and_what_is_not(tmp_path):
    made = plan(build("sd"), AdaptiveTGate(2.0, 3, 5), steps=8)
    assert str(made).split("\n\n")[0] == "model               ##???///\ncross-attention x4  #####..."
    assert made.remarks == ("AdaptiveTGate: the gate closes between steps 3 and 5 of 8; drawn at the latest",)
    assert made.least.macs.all < made.cost.macs.all
    assert f"({made.least.ratio:.2f}x fewer)" in str(made)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made


@pytest.mark.parametrize("threshold", [0, math.inf])
def test_what_is_spent_lies_at_the_ends_of_the_planned_range(threshold):
    _, attachment = drawn("sd", AdaptiveTGate(threshold, 2, 4))
    expected = attachment.plan.least if threshold else attachment.plan.cost
    assert attachment.trace.cost.macs == expected.macs


def test_with_deepcache_all_cross_attention_is_reached_while_the_gate_is_open():
    _, attachment = drawn("sd-deep", AdaptiveTGate(math.inf, 2, 3), DeepCache(interval=6), steps=8)
    assert attachment.trace.row("mid_block") == "####..#."  # measured, kept, and anew when the batch may shrink


def test_one_token_of_context_never_changes_so_the_gate_closes_at_once():
    """Stable Video Diffusion attends to one image embedding: the softmax over one token is 1."""
    _, attachment = drawn("svd", AdaptiveTGate(1e-3, 2, 5))
    assert attachment.notes()["gates"] == [2]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"threshold": -0.1}, ValueError, "threshold must be at least 0, got -0.1"),
        ({"threshold": math.nan}, ValueError, "threshold must be at least 0, got nan"),
        ({"threshold": "low"}, TypeError, "threshold must be a number, got 'low'"),
        ({"min_step": 1}, ValueError, "min_step must be at least 2, got 1"),
        ({"max_step": 1.5}, ValueError, "between 0 and 1, got 1.5"),
    ],
)
def test_what_is_out_of_range_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        AdaptiveTGate(**fields)


@pytest.mark.parametrize(("low", "high"), [(5, 3), (3, 9)])
def test_bounds_must_lie_in_the_schedule_in_their_order(low, high):
    with pytest.raises(ValueError, match=f"between steps {low} and {high} of 6: min_step must be at most max_step"):
        plan(build("sd"), AdaptiveTGate(2.0, low, high), steps=6)


def naive_gate(start, model, threshold, low, high):
    """The paper's T-GATE with a gate that closes by the rule of the docs, on the raw denoiser, for one prompt.

    Returns the latents and the gate.
    """
    attentions, past, count = Attentions(model), {}, len(start.timesteps)
    signs = torch.Generator().manual_seed(0)
    directions, gate = {}, count

    def sketched(output):
        width = output.shape[-1]
        if width not in directions:
            drawn = torch.randint(2, (width, 8), generator=signs.manual_seed(0))
            directions[width] = 2.0 * drawn - 1
        return output @ directions[width]

    def predict(s, x, t):
        nonlocal gate, past
        if s >= gate:
            attentions.cross, attentions.halves = "reuse", 1
            return noise_of(model(**fill(half(start.inputs, 0, start.rows), x, t))[0], x)
        attentions.cross, attentions.halves = "average", 2
        predicted = combine(model(**fill(start.inputs, x, t))[0], x)
        now = {path: sketched(mean) for path, mean in attentions.stored.items()}
        if low <= s + 1 <= high:
            changes = [float((now[path] - past[path]).norm() / now[path].norm()) for path in now]
            if count * sum(changes) / len(changes) <= threshold or s + 1 == high:
                gate = s + 1
        past = now
        return predicted

    try:
        return sample(start, predict), gate
    finally:
        attentions.remove()


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-sigma"])
def test_a_naive_loop_agrees_that_closes_the_gate_inside_its_window(name):
    _, attachment = drawn(name, AdaptiveTGate(0, 2, 5))
    rates = [rate for (rate,) in attachment.notes()["rates"].values()]
    threshold = 1.01 * min(rates[1:3])  # neither at the earliest gate nor at the latest
    threshold = min(threshold, 0.99 * rates[0])
    pipe = build(name)
    start = opening(name, pipe)
    expected, gate = naive_gate(start, denoiser(name, pipe), threshold, 2, 5)
    latents, attachment = drawn(name, AdaptiveTGate(threshold, 2, 5))
    assert attachment.notes()["gates"] == [gate]
    assert 2 < gate < 5
    assert distance(latents, expected) <= 1e-6
