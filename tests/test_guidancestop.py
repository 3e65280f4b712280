"""GuidanceStop and FewerSteps: the baselines do exactly what they say, and nothing more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import naive
import pytest
import torch
from naive import denoiser, distance, opening, rows_seen
from pipelines import build, run
from torch import Tensor, nn

from whenwhere import FewerSteps, GuidanceStop, attach, plan

STEPS = 6


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize("name", ["sd", "sdxl", "svd", "pixart-alpha-sized"])
def test_the_naive_loop_agrees(name, m, prompts):
    pipe = build(name)
    start = opening(name, pipe, prompts=prompts)
    expected = naive.guidance_stop(denoiser(name, pipe), start, m)
    with attach(pipe, GuidanceStop(m)):
        assert distance(run(name, pipe, prompts=prompts), expected) <= 1e-6


# Where the conditional rows are: (which, of how many)
PLACES = {
    "sd-inpaint9": (1, 2),
    "sd-controlnet": (1, 2),
    "sd-ip-adapter": (1, 2),
    "sd-pix2pix": (0, 3),
    "hunyuan-dit": (1, 2),
    "latte": (1, 2),
    "sd3": (1, 2),
    "dit": (0, 2),
}


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("name", PLACES)
def test_the_conditional_rows_answer_for_all_others(name, prompts):
    pipe = build(name)
    plain = run(name, pipe, prompts=prompts)
    with naive.one_part_from(denoiser(name, pipe), 2, *PLACES[name]):
        expected = run(name, pipe, prompts=prompts)
    with attach(pipe, GuidanceStop(2), guidance=True if name == "dit" else None):
        latents = run(name, pipe, prompts=prompts)
    assert distance(latents, expected) <= 1e-6
    assert distance(latents, plain) > 1e-4


@contextmanager
def second_calls_repeat_the_first(model: nn.Module, m: int) -> Iterator[None]:
    """From step m on, every second call returns what the call before it did."""
    original, calls = model.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        step, second = divmod(len(calls), 2)
        calls.append(calls[-1] if step >= m and second else original(*args, **kwargs))
        return calls[-1]

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def test_where_guidance_is_a_second_call_the_first_one_answers_it():
    pipe = build("flux-true-cfg")
    with second_calls_repeat_the_first(pipe.transformer, 2):
        expected = run("flux-true-cfg", pipe)
    calls = rows_seen(pipe.transformer.x_embedder)
    with attach(pipe, GuidanceStop(2)) as attachment:
        assert distance(run("flux-true-cfg", pipe), expected) <= 1e-6
    assert len(calls) == 2 * 2 + (STEPS - 2)
    assert attachment.trace.row("") == "####" + "#." * (STEPS - 2)


def test_it_equals_switching_guidance_off_by_a_callback():
    pipe, m = build("sd"), 3

    def switch_off(pipe: Any, step: int, _: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if step != m - 1:
            return inputs
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": inputs["prompt_embeds"].chunk(2)[1]}

    expected = run("sd", pipe, callback=switch_off, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with attach(pipe, GuidanceStop(m)):
        assert torch.equal(run("sd", pipe), expected)


@pytest.mark.parametrize(("step", "row"), [(3, "###/////"), (0.5, "####////"), (0.01, "#///////"), (8, "########")])
def test_a_plan_shows_where_guidance_stops(step, row):
    assert plan(build("sd"), GuidanceStop(step), steps=8).rows == (row,)


def test_nothing_is_remembered():
    made = plan(build("sd"), GuidanceStop(4), steps=8)
    assert made.cost.bytes == 0
    assert made.cost.macs.all == made.cost.baseline.all * 12 // 16


@pytest.mark.parametrize("name", ["sd", "sd-lcm", "flux"])
def test_without_guidance_there_is_nothing_to_stop_and_a_warning_says_so(name):
    pipe = build(name)
    plain = run(name, pipe, guidance=False)
    with attach(pipe, GuidanceStop(2)), pytest.warns(UserWarning, match="guidance was off"):
        assert torch.equal(run(name, pipe, guidance=False), plain)


def test_perturbed_attention_guidance_is_refused():
    pipe = build("sd-pag")
    with attach(pipe, GuidanceStop(2)), pytest.raises(ValueError, match="without pag_scale"):
        run("sd-pag", pipe)


def test_a_stop_behind_the_last_step_is_refused():
    with pytest.raises(ValueError, match="at step 9, but only 8 steps"):
        plan(build("sd"), GuidanceStop(9), steps=8)


@pytest.mark.parametrize(
    ("step", "error"), [(0, ValueError), (-1, ValueError), (1.0, ValueError), (True, TypeError), ("3", TypeError)]
)
def test_a_field_out_of_range_is_refused_by_name(step, error):
    with pytest.raises(error, match="step"):
        GuidanceStop(step)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_fewer_steps_are_at_least_one(steps, error):
    with pytest.raises(error, match="steps"):
        FewerSteps(steps)


def test_fewer_steps_is_a_row_to_compare_with_and_no_method():
    with pytest.raises(TypeError, match="is not a method"):
        attach(build("sd"), FewerSteps(4))
