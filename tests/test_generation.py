"""One generation: branches that come and go, extra calls within a step, inputs that change."""

from dataclasses import replace

import pytest
import torch
from fakes import TOWER, Every, doubling_pipeline
from pipelines import build, run

from whenwhere import CrossAttentionFreeze, DeepCache, GuidanceStop, TGate, attach, plan
from whenwhere.site import Kind

GATE = TGate(gate_step=2, sp_interval=1, warm_up=0)


def without_guidance_from(step):
    """The callback of diffusers' documentation that switches guidance off in the middle."""

    def callback(pipe, index, timestep, inputs):  # noqa: ARG001
        if index == step - 1:
            pipe._guidance_scale = 0.0
            return {name: value.chunk(2)[-1] for name, value in inputs.items()}
        return inputs

    return callback


TEXT = {"sd": ["prompt_embeds"], "sdxl": ["prompt_embeds", "add_text_embeds", "add_time_ids"]}


def run_halved(name, pipe, step):
    inputs = {"callback": without_guidance_from(step), "callback_on_step_end_tensor_inputs": TEXT[name]}
    return run(name, pipe, **inputs)


@pytest.mark.parametrize("name", TEXT)
def test_guidance_switched_off_by_a_callback_is_followed(name):
    """Neutral until then, and after it there is nothing left to stop."""
    pipe = build(name)
    plain = run_halved(name, pipe, 3)
    with attach(pipe, GuidanceStop(3)) as attachment:
        with pytest.warns(UserWarning, match="guidance was off"):
            assert torch.equal(run_halved(name, pipe, 3), plain)
        assert attachment.trace.rows == attachment.plan.rows == ("######",)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize(
    ("methods", "path", "row"),
    [
        ((DeepCache(interval=4),), "mid_block", "#..##."),  # a full step at 3, for want of anything remembered
        ((GATE,), "mid_block.attentions.0.transformer_blocks.0.attn2", "##.#.."),
        ((GATE, DeepCache(interval=6)), "mid_block", "###" + "#.."),
    ],
)
def test_what_was_remembered_of_two_branches_is_computed_anew_for_one(name, methods, path, row):
    pipe = build(name)
    with attach(pipe, *methods) as attachment:
        run_halved(name, pipe, 3)
        assert attachment.trace.rows == attachment.plan.rows
        assert attachment.trace.row(path) == row
        assert attachment.trace.cost == attachment.plan.cost
        expected = run(name, pipe)
    with attach(pipe, *methods):
        assert torch.equal(run(name, pipe), expected)


def test_branches_that_nobody_declares_are_known_after_the_first_step():
    """PixArt's pipelines do not tell; a gate at the first step averages once the scheduler has moved."""
    gate = TGate(gate_step=1, sp_interval=1)
    for guidance in (True, False):
        pipe = build("pixart-alpha")
        with attach(pipe, gate) as attachment:
            run("pixart-alpha", pipe, guidance=guidance)
            assert attachment.trace.rows == attachment.plan.rows
            assert attachment.trace.rows == plan(pipe, gate, steps=6, guidance=guidance).rows
            # Until the branches are known the outputs of both are held.
            assert attachment.trace.held == attachment.plan.cost.bytes * (2 if guidance else 1)
            assert attachment.trace.row("") == ("#/////" if guidance else "######")


def test_a_mean_of_branches_that_nobody_declares_is_found_again():
    """Kept before the number of branches is known, recalled after."""
    freeze = CrossAttentionFreeze(1, anchor="mean")
    for guidance in (True, False):
        pipe = build("pixart-alpha")
        with attach(pipe, freeze) as attachment:
            run("pixart-alpha", pipe, guidance=guidance)
            assert attachment.trace.row("transformer_blocks.0.attn2") == "#....."


def stopped_by_hand(pipe, step):
    """From a step on the conditional row answers for both, and a call with one row is left alone."""
    network = pipe.transformer
    original = network.forward

    def forward(*args, **kwargs):
        rows = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        if (pipe.scheduler.step_index or 0) < step or len(kwargs["hidden_states"]) == 1:
            return original(*args, **kwargs)
        (output,) = original(*args, **kwargs | {name: value[1:] for name, value in rows.items()})
        return (torch.cat([output, output]),)

    network.forward = forward


def test_a_third_call_with_half_of_the_batch_is_not_mistaken_for_the_end_of_guidance():
    """Skip-layer guidance of Stable Diffusion 3.5 calls the network again, on the conditional rows."""
    extra = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    pipe = build("sd3")
    stopped_by_hand(pipe, 3)
    expected = run("sd3", pipe, **extra)
    pipe = build("sd3")
    plain = run("sd3", pipe, **extra)
    with attach(pipe, GuidanceStop(3)) as attachment:
        latents = run("sd3", pipe, **extra)
        assert attachment.plan.row("") == "######//////"
    assert (latents - expected).norm() < 1e-5 * expected.norm()
    assert not torch.equal(latents, plain)
    with attach(pipe, GuidanceStop(6)), pytest.warns(UserWarning, match="changed nothing"):
        assert torch.equal(run("sd3", pipe, **extra), plain)


def test_an_input_that_changes_its_shape_in_the_middle_is_an_error_that_says_so():
    pipe = doubling_pipeline(blocks=1)
    pipe.scheduler.set_timesteps(3)
    with attach(pipe.transformer, Every(3), scheduler=pipe.scheduler, anatomy=TOWER):
        pipe.scheduler.set_timesteps(3)
        pipe.transformer(torch.ones(1, 5, 1))
        pipe.scheduler.step(None, None, torch.ones(1, 5, 1))
        with pytest.raises(RuntimeError, match=r"step 1: blocks.0 .*\(1, 6, 1\).* since step 0 .*\(1, 5, 1\)"):
            pipe.transformer(torch.ones(1, 6, 1))


def test_an_input_that_changes_its_type_in_the_middle_is_an_error_that_says_so():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe.transformer, Every(3), scheduler=pipe.scheduler, anatomy=TOWER):
        pipe.scheduler.set_timesteps(3)
        pipe.transformer(torch.ones(1, 1))
        pipe.scheduler.step(None, None, torch.ones(1, 1))
        pipe.transformer.double()
        with pytest.raises(RuntimeError, match=r"torch.float64 .* torch.float32"):
            pipe.transformer(torch.ones(1, 1, dtype=torch.float64))


def test_rows_that_are_no_whole_number_of_branches_are_an_error_that_says_so():
    pipe = doubling_pipeline(blocks=1)
    pipe.do_classifier_free_guidance = True
    with attach(pipe, Every(2), anatomy=TOWER):
        pipe.scheduler.set_timesteps(2)
        with pytest.raises(RuntimeError, match=r"the guidance branches unconditional, conditional, .* 3 rows"):
            pipe.transformer(torch.ones(3, 1))


def test_one_branch_is_run_and_answers_for_both():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe, GuidanceStop(1), anatomy=TOWER):
        assert pipe([(1.0, 10.0), (2.0, 20.0)]) == [(2.0, 20.0), (40.0, 40.0)]


def test_a_pipeline_that_does_not_tell_its_branches_can_be_told_of():
    """DiTPipeline keeps the latents of both branches in one tensor."""
    pipe = build("dit")
    with attach(pipe, GuidanceStop(2)), pytest.warns(UserWarning, match=r"say attach\(\.\.\., guidance=True\)"):
        unchanged = run("dit", pipe)
    assert torch.equal(unchanged, run("dit", pipe))
    with attach(pipe, GuidanceStop(2), guidance=True) as attachment:
        assert not torch.equal(run("dit", pipe), unchanged)
        assert attachment.trace.row("") == "##////"


def test_a_gate_reads_the_mean_of_both_branches_and_runs_one():
    """The attention of (1, 3) is (2, 6), of mean 4; behind the gate whatever enters, 4 comes out."""
    pipe = doubling_pipeline(blocks=1)
    parts = tuple(replace(p, kind=Kind.CROSS_ATTENTION) if p.path.endswith("attn") else p for p in TOWER.parts)
    with attach(pipe, TGate(gate_step=1, sp_interval=1), anatomy=replace(TOWER, parts=parts)):
        assert pipe([(1.0, 3.0), (5.0, 7.0), (8.0, 9.0)]) == [(2.0, 6.0), (4.0, 4.0), (4.0, 4.0)]
