"""T-GATE: its schedule, its arithmetic against a naive loop, and the known defects of public code turned around."""

from functools import cache
from itertools import product
from typing import Any

import naive
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor
from naive import Gate, Opening, denoiser, distance, opening, rows_seen
from pipelines import build, run
from schedulers import SCHEDULERS, with_scheduler
from torch import Tensor

from whenwhere import TGate, attach, plan

STEPS = 6
PLAIN_LOOP = ("sd", "sd-deep", "sdxl", "svd", "pixart-alpha-sized", "pixart-sigma")  # loops that naive.py restates
GRID = [Gate(*setting) for setting in product((1, 2, 4, 5, 6), (1, 3), (1, 3), (0, 2, 6))]
# One of every kind: gate first, in the middle, last; self-attention reused before it, after it, never.
CORNERS = [Gate(1), Gate(4, k=3, w=0), Gate(5, k=3, f=3, w=2), Gate(6, k=3, w=0)]


@cache
def opened(name: str, prompts: int, guidance: bool = True) -> Opening:
    return opening(name, build(name), prompts=prompts, guidance=guidance)


def method_of(gate: Gate, **fields: Any) -> TGate:
    return TGate(gate.m, gate.k, gate.f, gate.w, **fields)


def idle(gate: Gate, guidance: bool = True) -> bool:
    """Whether this setting computes everything: nothing to compare, and the library says so by a warning."""
    reused_before = any("reuse" in gate.actions(s) for s in range(gate.m))
    return gate.m >= STEPS and not reused_before and guidance


def assert_naive_agrees(name: str, gate: Gate, prompts: int, guidance: bool = True, anchor: str = "mean") -> Tensor:
    pipe = build(name)
    expected = naive.tgate(denoiser(name, pipe), opened(name, prompts, guidance), gate, anchor)
    with attach(pipe, method_of(gate, anchor=anchor)):
        latents = run(name, pipe, prompts=prompts, guidance=guidance)
    assert distance(latents, expected) <= 1e-6
    return latents


def label(gate: Gate) -> str:
    return f"m{gate.m}-k{gate.k}-f{gate.f}-w{gate.w}"


def settings(gates: list[Gate]) -> list[Any]:
    chosen = [gate for gate in gates if not idle(gate)]
    return [pytest.param(gate, id=label(gate)) for gate in chosen]


def alternating(gates: list[Gate]) -> list[Any]:
    """Every setting with one or two prompts in turn, so that each of its fields meets both."""
    chosen = [gate for gate in gates if not idle(gate)]
    return [pytest.param(gate, 1 + i % 2, id=f"{label(gate)}-{1 + i % 2}") for i, gate in enumerate(chosen)]


# The schedule


@pytest.mark.parametrize(
    ("m", "k", "computed"),
    [
        (10, 3, [0, 1, 2, 3, 6, 9]),
        (10, 5, [0, 1, 2, 5, 9]),
        (15, 3, [0, 1, 2, 3, 6, 9, 12, 14]),
        (15, 5, [0, 1, 2, 5, 10, 14]),
    ],
)
def test_self_attention_before_the_gate_is_computed_at_the_published_steps(m, k, computed):
    made = plan(build("sd"), TGate(gate_step=m, sp_interval=k, warm_up=2), steps=25)
    row = dict(made.groups)["self-attention x4"]
    assert [s for s in range(m) if row[s] == "#"] == computed
    assert row[m:] == "#" * (25 - m)


DRAWN = {
    TGate(gate_step=4, sp_interval=3, warm_up=1): ("####////", "##.#####", "####...."),
    TGate(gate_step=4, sp_interval=1): ("####////", "########", "####...."),
    TGate(gate_step=8, sp_interval=3, warm_up=1): ("########", "##.#..##", "########"),
    TGate(gate_step=6, sp_interval=4, warm_up=0): ("######//", "#...####", "######.."),
    TGate(gate_step=3, sp_interval=2, warm_up=5): ("###/////", "########", "###....."),
    TGate(gate_step=3, fi_interval=3): ("###/////", "####..#.", "###....."),
    TGate(gate_step=2, fi_interval=3): ("##//////", "##.#..#.", "##......"),
    TGate(gate_step=1): ("#///////", "########", "#......."),
    TGate(gate_step=0.5, sp_interval=1): ("####////", "########", "####...."),
}


@pytest.mark.parametrize("method", DRAWN, ids=repr)
def test_a_plan_is_the_table_of_the_paper(method):
    model, own, cross = DRAWN[method]
    drawn = str(plan(build("sd"), method, steps=8)).split("\n\n")[0]
    assert drawn == f"model               {model}\nself-attention x4   {own}\ncross-attention x4  {cross}"


@pytest.mark.parametrize("method", DRAWN, ids=repr)
def test_without_guidance_no_branch_is_dropped_and_all_else_is_the_same(method):
    _, own, cross = DRAWN[method]
    groups = dict(plan(build("sd"), method, steps=8, guidance=False).groups)
    assert groups == {"model": "########", "self-attention x4": own, "cross-attention x4": cross}


@pytest.mark.parametrize(("fraction", "steps", "gate"), [(0.4, 25, 10), (0.6, 25, 15), (0.6, 6, 4), (0.01, 25, 1)])
def test_a_gate_may_be_a_fraction_of_the_schedule(fraction, steps, gate):
    assert plan(build("sd"), TGate(fraction), steps=steps).rows == plan(build("sd"), TGate(gate), steps=steps).rows


@pytest.mark.parametrize(("steps", "interval"), [(25, 5), (50, 10), (6, 1), (2, 1)])
def test_an_interval_may_be_a_fraction_of_the_schedule(steps, interval):
    made = plan(build("sd"), TGate(0.6, sp_interval=0.2), steps=steps)
    assert made.rows == plan(build("sd"), TGate(0.6, sp_interval=interval), steps=steps).rows
    assert f"TGate: sp_interval=0.2 is {interval} of {steps} steps" in made.remarks[0]


def test_intervals_count_from_the_first_executed_step():
    pipe = build("sd-img2img")
    with attach(pipe, TGate(gate_step=6, sp_interval=3, warm_up=0)) as attachment:
        run("sd-img2img", pipe, steps=10)  # strength 0.7 executes the last seven
    assert dict(attachment.trace.groups)["self-attention x4"] == "#..#.##"
    assert attachment.trace.rows == attachment.plan.rows


# What is refused


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"gate_step": 0}, ValueError),
        ({"gate_step": -1}, ValueError),
        ({"gate_step": 1.0}, ValueError),
        ({"gate_step": 2.5}, ValueError),
        ({"gate_step": float("nan")}, ValueError),
        ({"gate_step": True}, TypeError),
        ({"gate_step": "5"}, TypeError),
        ({"sp_interval": 0}, ValueError),
        ({"sp_interval": 2.0}, ValueError),
        ({"sp_interval": "5"}, TypeError),
        ({"fi_interval": -1}, ValueError),
        ({"fi_interval": False}, TypeError),
        ({"warm_up": -1}, ValueError),
        ({"warm_up": 0.5}, TypeError),
        ({"anchor": "text"}, ValueError),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused_by_name(fields, error):
    with pytest.raises(error, match=next(iter(fields))):
        TGate(**fields)


def test_a_gate_behind_the_last_step_is_refused_and_the_pipeline_stays_usable():
    pipe = build("sd")
    plain = run("sd", pipe)
    with pytest.raises(ValueError, match="gate at step 10, but only 6 steps"):
        plan(pipe, TGate(10), steps=STEPS)
    with attach(pipe, TGate(10)), pytest.raises(ValueError, match="gate at step 10, but only 6 steps"):
        run("sd", pipe)
    assert torch.equal(run("sd", pipe), plain)


@pytest.mark.parametrize("name", ["dit", "sd3", "sd35", "flux"])
def test_a_model_without_cross_attention_is_told_what_fits(name):
    pipe = build(name)
    with pytest.raises(ValueError, match=r"needs cross-attention; \w+ has none. GuidanceStop works"):
        attach(pipe, TGate(2))


@pytest.mark.parametrize("name", ["sd-pix2pix", "sd-pag"])
def test_a_third_guidance_branch_is_refused_and_the_pipeline_stays_usable(name):
    pipe = build(name)
    plain = run(name, pipe)
    with attach(pipe, TGate(2)), pytest.raises(ValueError, match=r"averages two guidance branches; .* has 3\."):
        run(name, pipe)
    assert torch.equal(run(name, pipe), plain)


def test_attaching_twice_is_refused():
    pipe = build("sd")
    with attach(pipe, TGate(2)), pytest.raises(ValueError, match="attached already"):
        attach(pipe, TGate(2))


# The arithmetic


@pytest.mark.parametrize(("gate", "prompts"), alternating(GRID))
def test_the_naive_loop_agrees_on_the_whole_grid(gate, prompts):
    assert_naive_agrees("sd", gate, prompts)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("gate", settings(CORNERS))
@pytest.mark.parametrize("name", PLAIN_LOOP[1:])
def test_the_naive_loop_agrees_in_every_family(name, gate, prompts):
    assert_naive_agrees(name, gate, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("gate", settings(GRID))
@pytest.mark.parametrize("name", PLAIN_LOOP)
def test_the_naive_loop_agrees_on_the_whole_grid_in_every_family(name, gate, prompts):
    assert_naive_agrees(name, gate, prompts)


@pytest.mark.parametrize("prompts", [1, 2, 4])
@pytest.mark.parametrize("gate", settings([Gate(4, k=3, f=3, w=0)]))
@pytest.mark.parametrize(("name", "guidance"), [("sd-lcm", True), *((name, False) for name in PLAIN_LOOP)])
def test_without_guidance_the_naive_loop_agrees_for_any_batch(name, guidance, gate, prompts):
    assert_naive_agrees(name, gate, prompts, guidance)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-alpha"])
def test_the_anchor_is_the_mean_or_one_branch(name):
    latents = [assert_naive_agrees(name, Gate(2), 1, anchor=anchor) for anchor in ("mean", "cond", "uncond")]
    assert min(distance(latents[i], latents[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4


# Loops that naive.py does not restate; there the naive gate is put inside the pipeline.
OTHER_LOOPS = (
    "sd-img2img",
    "sd-inpaint",
    "sd-inpaint9",
    "sd-controlnet",
    "sd-adapter",
    "sd-ip-adapter",
    "sdxl-img2img",
    "sdxl-inpaint",
    "sdxl-controlnet",
    "hunyuan-dit",
    "latte",
)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("gate", settings([Gate(1), Gate(3, k=2, f=2, w=0)]))
@pytest.mark.parametrize("name", OTHER_LOOPS)
def test_the_naive_gate_inside_the_pipeline_agrees(name, gate, prompts):
    pipe = build(name)
    plain = run(name, pipe, prompts=prompts)
    with naive.gated_in_place(denoiser(name, pipe), gate):
        expected = run(name, pipe, prompts=prompts)
    with attach(pipe, method_of(gate)):
        latents = run(name, pipe, prompts=prompts)
    assert distance(latents, expected) <= 1e-6
    assert distance(latents, plain) > 1e-4


def test_rescaled_guidance_is_rescaled_up_to_the_gate_and_identity_after_it():
    pipe = build("sd")
    with naive.gated_in_place(pipe.unet, Gate(3)):
        expected = run("sd", pipe, guidance_rescale=0.7)
    with attach(pipe, method_of(Gate(3))):
        latents, unscaled = run("sd", pipe, guidance_rescale=0.7), run("sd", pipe)
    assert distance(latents, expected) <= 1e-6
    assert distance(latents, unscaled) > 1e-3


# What is remembered


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("name", ["sd", "sdxl", "svd"])
def test_from_the_gate_on_cross_attention_puts_out_its_mean_over_the_branches(name, prompts):
    pipe = build(name)
    seen: dict[str, list[Tensor]] = {}
    for path, module in denoiser(name, pipe).named_modules():
        if path.endswith(".attn2"):
            kept = seen[path] = []
            module.register_forward_hook(lambda *call, kept=kept: kept.append(call[-1]))
    with attach(pipe, TGate(gate_step=3, sp_interval=1)):
        run(name, pipe, prompts=prompts)
    assert seen
    for outputs in seen.values():
        u, c = outputs[2].chunk(2)
        assert all(torch.equal(output, (u + c) / 2) for output in outputs[3:])


@pytest.mark.parametrize("prompts", [1, 3])
def test_one_row_per_image_of_cross_attention_is_held_and_two_of_self_attention(prompts):
    pipe = build("sd")
    numbers = sum(16 * 16 * 8 for _ in range(3)) + 8 * 8 * 16  # tokens x features of three outer modules and the middle
    for interval, rows in ((1, 1), (3, 1 + 2)):
        with attach(pipe, TGate(gate_step=4, sp_interval=interval, warm_up=0)) as attachment:
            run("sd", pipe, prompts=prompts)
        assert attachment.trace.held == attachment.trace.cost.bytes == 4 * rows * prompts * numbers


def test_a_prompt_changed_behind_the_gate_is_not_read():
    pipe, changed = build("sd"), []

    def forget_the_prompt(_: Any, step: int, __: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if step < 2:
            return inputs
        changed.append(step)
        return {"prompt_embeds": torch.zeros_like(inputs["prompt_embeds"])}

    change = {"callback": forget_the_prompt, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    plain = run("sd", pipe)
    assert distance(run("sd", pipe, **change), plain) > 1e-4
    with attach(pipe, TGate(gate_step=3, sp_interval=1)):
        assert torch.equal(run("sd", pipe, **change), run("sd", pipe))
    assert changed


# Defects of public code, turned around


@pytest.mark.parametrize("prompts", [1, 2])
def test_nothing_of_a_generation_reaches_the_next(prompts):
    pipe = build("sd")
    plain = run("sd", pipe, prompts=prompts)
    with attach(pipe, TGate(gate_step=2, sp_interval=2)):
        first = run("sd", pipe, prompts=prompts)
        run("sd", pipe, prompts=3 - prompts, seed=5)
        run("sd", pipe, prompts=prompts, guidance=False)
        assert torch.equal(run("sd", pipe, prompts=prompts), first)
    assert torch.equal(run("sd", pipe, prompts=prompts), plain)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_is_gated_at_the_same_evaluation(kind):
    pipe = with_scheduler(kind)
    start = opening("sd", pipe)
    evaluations = len(start.timesteps)
    expected = naive.tgate(pipe.unet, start, Gate(4, k=2, w=0))
    branches = rows_seen(pipe.unet.conv_in)
    crossed = rows_seen(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q)
    with attach(pipe, TGate(gate_step=4, sp_interval=2, warm_up=0)):
        latents = run("sd", pipe)
    assert distance(latents, expected) <= 1e-6
    assert branches == [2] * 4 + [1] * (evaluations - 4)
    assert crossed == [2] * 4


@pytest.mark.parametrize("kind", ["HeunDiscrete", "KDPM2Discrete", "PNDM"])
def test_a_gate_as_a_fraction_counts_evaluations_and_not_intervals(kind):
    pipe = with_scheduler(kind)
    branches = rows_seen(pipe.unet.conv_in)
    with attach(pipe, TGate(gate_step=0.5, sp_interval=1)):
        run("sd", pipe)
    assert branches.count(2) == round(len(branches) / 2)
    assert len(branches) > STEPS


class Doubled(AttnProcessor):
    """A user's processor: twice what the plain one gives."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        Doubled.calls += 1
        return 2 * super().__call__(*args, **kwargs)


class RenamedAttention(Attention):
    """An attention class of another name."""


def with_processor() -> DiffusionPipeline:
    pipe = build("sd")
    pipe.unet.set_attn_processor(Doubled())
    return pipe


def with_renamed_attention() -> DiffusionPipeline:
    pipe = build("sd")
    for module in pipe.unet.modules():
        if type(module) is Attention:
            module.__class__ = RenamedAttention
    return pipe


def with_fused_projections() -> DiffusionPipeline:
    pipe = build("sd")
    pipe.fuse_qkv_projections()
    return pipe


@pytest.mark.parametrize("changed", [with_processor, with_renamed_attention, with_fused_projections])
def test_attention_that_a_user_changed_is_the_one_that_runs(changed):
    pipe = changed()
    start = opening("sd", pipe)
    expected = naive.tgate(pipe.unet, start, Gate(3))
    with attach(pipe, TGate(gate_step=3, sp_interval=1)):
        assert distance(run("sd", pipe), expected) <= 1e-6


def test_a_users_attention_processor_runs_wherever_attention_is_computed():
    pipe = with_processor()
    with attach(pipe, TGate(gate_step=2, sp_interval=1)):
        before = Doubled.calls
        run("sd", pipe)
    assert Doubled.calls - before == 4 * STEPS + 4 * 2  # self-attention at every step, cross-attention at two
    assert distance(run("sd", pipe), run("sd", build("sd"))) > 1e-4
