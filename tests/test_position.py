"""Positions in a schedule: thresholds are settled from its timesteps and noise levels, exactly."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from pipelines import build, run

from whenwhere import GuidanceStop, Sigma, TGate, Timestep, attach, plan
from whenwhere.clock import Step
from whenwhere.expression import parse, write, write_full
from whenwhere.position import settle
from whenwhere.schedule import noise_levels


def of(*timesteps, sigmas=()):
    return Step(0, len(timesteps), timesteps=timesteps, sigmas=sigmas)


@pytest.mark.parametrize(
    ("value", "step"),
    [
        (Timestep(500), 3),  # 500 itself is not below
        (Timestep(501), 2),
        (Timestep(700), 2),
        (Timestep(700.5), 1),
        (Timestep(2000), 1),  # all lie below: the first step is computed anyway
        (Timestep(0), 4),  # none does: nothing begins
        (Timestep(100.5), 3),
        (Sigma(1.0), 3),
        (0.5, 2),
        (0.01, 1),
        (7, 7),
    ],
)
def test_a_position_is_settled_in_the_schedule(value, step):
    schedule = of(900.0, 700.0, 500.0, 100.0, sigmas=(9.0, 3.0, 1.0, 0.5))
    assert settle(value, schedule, "it") == step


@pytest.mark.parametrize("wrong", [Timestep, Sigma])
def test_a_threshold_must_be_a_number_of_at_least_zero(wrong):
    with pytest.raises(ValueError, match="must be at least 0 and finite, got -1"):
        wrong(-1)
    with pytest.raises(TypeError, match="must be a number, got 'late'"):
        wrong("late")
    with pytest.raises(TypeError, match="must be a number, got True"):
        wrong(True)


@pytest.mark.parametrize("method", [TGate(Timestep(600)), GuidanceStop(Sigma(2.0))])
def test_without_timesteps_a_threshold_is_refused_in_words_that_help(method):
    with pytest.raises(ValueError, match=r"goes by .* none are known: plan\(\.\.\., scheduler="):
        plan(build("sd"), method, steps=6)


def test_a_scheduler_without_noise_levels_is_named():
    class Bare:
        timesteps = torch.tensor([5, 3, 1])

    assert noise_levels(Bare(), [5.0, 3.0, 1.0]) == [None] * 3
    with pytest.raises(ValueError, match="goes by noise levels, and none are known"):
        settle(Sigma(1.0), of(5.0, 3.0, 1.0, sigmas=(None, None, None)), "it")


@pytest.mark.parametrize("make", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_noise_levels_are_those_of_the_training_schedule(make):
    """Between trained timesteps they are interpolated."""
    scheduler = make()
    scheduler.set_timesteps(7)
    timesteps = [float(t) for t in scheduler.timesteps]
    trained = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    for level, timestep in zip(noise_levels(scheduler, timesteps), timesteps, strict=True):
        low, high = trained[int(timestep)], trained[min(int(timestep) + 1, 999)]
        assert float(low) * 0.999 <= level <= float(high) * 1.001


def test_in_flow_matching_the_noise_level_is_the_share_of_noise():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    timesteps = [float(t) for t in scheduler.timesteps]
    assert noise_levels(scheduler, timesteps) == pytest.approx([t / 1000 for t in timesteps])


@pytest.mark.parametrize("threshold", [Timestep(600), Timestep(10), Timestep(999)], ids=repr)
def test_a_gate_at_a_timestep_is_the_gate_at_that_step_bit_for_bit(threshold):
    pipe = build("sd")
    with attach(pipe, TGate(threshold, sp_interval=1)) as attachment:
        latents = run("sd", pipe)
        trace = attachment.trace
        timesteps = [float(t) for t in pipe.scheduler.timesteps]
    gate = max(1, next(i for i, t in enumerate(timesteps) if t < threshold.value))
    fixed = build("sd")
    with attach(fixed, TGate(gate, sp_interval=1)) as attachment:
        assert torch.equal(latents, run("sd", fixed))
        assert trace.rows == attachment.trace.rows
    assert trace.remarks == (f"TGate: gate_step={threshold} is step {gate} of 6",)
    assert trace.remarks[0] in str(trace)


def test_a_plan_for_a_scheduler_names_the_step():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(25)  # 960, 920, ... 0
    made = plan("sd15", GuidanceStop(Timestep(600)), steps=25, scheduler=scheduler)
    assert dict(made.groups)["model"] == "#" * 10 + "/" * 15
    assert made.remarks == ("GuidanceStop: step=Timestep(600) is step 10 of 25",)


def test_image_to_image_settles_among_the_timesteps_that_are_executed():
    pipe = build("sd-img2img")
    with attach(pipe, GuidanceStop(Timestep(400))) as attachment:
        run("sd-img2img", pipe)
        executed = [float(t) for t in pipe.scheduler.timesteps][-4:]
    stop = next(i for i, t in enumerate(executed) if t < 400)
    assert dict(attachment.trace.groups)["model"] == "#" * stop + "/" * (4 - stop)


def test_a_threshold_is_written_in_an_expression():
    items = (TGate(Timestep(600)), GuidanceStop(Sigma(1.5)))
    assert parse("tgate(gate_step=timestep(600))+guidancestop(sigma(1.5))") == items
    assert parse(write(items)) == parse(write_full(items)) == items
