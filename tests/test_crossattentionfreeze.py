"""Frozen cross-attention alone, and T-GATE as its sum with a stop of guidance."""

import naive
import pytest
import torch
from naive import distance
from pipelines import build, run

from whenwhere import CrossAttentionFreeze, DeepCache, GuidanceStop, TGate, attach, plan

UNCONDITIONAL = ("sd", "sd-deep", "sd-controlnet", "sd-ip-adapter", "sdxl", "pixart-alpha-sized", "pixart-sigma")
UNCONDITIONAL += ("hunyuan-dit", "latte")


def latents_of(name, *methods, prompts=2, **options):
    pipe = build(name)
    with attach(pipe, *methods) as attachment:
        return run(name, pipe, prompts=prompts, **options), attachment.trace


@pytest.mark.parametrize("name", [*UNCONDITIONAL, "svd"])
def test_t_gate_is_frozen_cross_attention_and_stopped_guidance_bit_for_bit(name):
    """Text-to-image goes on with the unconditional branch, Stable Video Diffusion with the conditional one."""
    branch = "conditional" if name == "svd" else "unconditional"
    gated, trace = latents_of(name, TGate(3, sp_interval=1))
    apart, sum_trace = latents_of(name, CrossAttentionFreeze(3, "mean"), GuidanceStop(3, branch))
    assert torch.equal(gated, apart)
    assert dict(trace.groups)["model"] == dict(sum_trace.groups)["model"]
    assert (trace.cost, trace.held) == (sum_trace.cost, sum_trace.held)


@pytest.mark.parametrize("anchor", ["each", "mean"])
@pytest.mark.parametrize("name", ["sd", "pixart-sigma", "svd"])
def test_guidance_goes_on_where_only_cross_attention_is_frozen(name, anchor):
    """A naive loop of hooks: cross-attention returns what it returned in the third evaluation."""
    pipe = build(name)
    with naive.frozen_cross_attention(naive.denoiser(name, pipe), 3, mean=anchor == "mean"):
        expected = run(name, pipe, prompts=2)
    latents, trace = latents_of(name, CrossAttentionFreeze(3, anchor))
    assert distance(latents, expected) <= 1e-6
    assert dict(trace.groups)["model"] == "######"
    assert all(row == "###..." for label, row in trace.groups if label.startswith("cross-attention"))


def test_attention_to_a_single_token_never_changes_so_freezing_it_costs_nothing():
    """Stable Video Diffusion attends to one image embedding: the softmax over one token is 1."""
    latents, trace = latents_of("svd", CrossAttentionFreeze(1))
    assert torch.equal(latents, run("svd", build("svd"), prompts=2))
    assert trace.cost.macs.all < trace.cost.baseline.all


def test_each_decision_has_its_own_step():
    _, trace = latents_of("sd", CrossAttentionFreeze(2), GuidanceStop(4))
    assert dict(trace.groups) == {"model": "####//", "cross-attention x4": "##...."}
    later, trace = latents_of("sd", CrossAttentionFreeze(4), GuidanceStop(2))
    assert dict(trace.groups) == {"model": "##////", "cross-attention x4": "####.."}
    assert not torch.equal(later, latents_of("sd", GuidanceStop(2))[0])


def test_each_branch_that_goes_on_keeps_its_own_output():
    """Frozen at the last guided step, the conditional branch alone is what a run of that branch alone would be."""
    stopped, _ = latents_of("sd", CrossAttentionFreeze(3, "each"), GuidanceStop(3, "conditional"))
    other, _ = latents_of("sd", CrossAttentionFreeze(3, "each"), GuidanceStop(3, "unconditional"))
    mean, _ = latents_of("sd", CrossAttentionFreeze(3, "mean"), GuidanceStop(3, "conditional"))
    assert not torch.equal(stopped, other)
    assert not torch.equal(stopped, mean)
    assert torch.equal(mean, latents_of("sd", TGate(3, sp_interval=1))[0])


def test_all_cross_attention_is_reached_at_the_step_that_keeps():
    made = plan(build("sd-deep"), CrossAttentionFreeze(3), DeepCache(interval=4), steps=6)
    assert made.row("mid_block") == "#.#.#."


def test_three_branches_have_no_mean_but_may_be_frozen_each():
    with pytest.raises(ValueError, match=r'averages two guidance branches; .* has 3\. anchor="each" works on it'):
        latents_of("sd-pix2pix", CrossAttentionFreeze(3, "mean"))
    latents, _ = latents_of("sd-pix2pix", CrossAttentionFreeze(3, "each"))
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 0}, "step must be at least 1, got 0"),
        ({"step": 1.5}, "a fraction of the schedule between 0 and 1, got 1.5"),
        ({"anchor": "cond"}, "anchor must be one of 'each', 'mean'; got 'cond'"),
    ],
)
def test_what_is_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CrossAttentionFreeze(**fields)


def test_a_step_behind_the_last_is_refused():
    with pytest.raises(ValueError, match="freezes at step 9, but only 6 steps are executed"):
        plan(build("sd"), CrossAttentionFreeze(9), steps=6)


def test_models_without_cross_attention_are_refused():
    with pytest.raises(ValueError, match="needs cross-attention; SD3Transformer2DModel has none"):
        attach(build("sd3"), CrossAttentionFreeze(3))
