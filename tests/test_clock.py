"""The clock counts evaluations by listening to the scheduler, and is taken off without a trace."""

import copy
import inspect
import pickle
from dataclasses import dataclass
from typing import ClassVar

import diffusers
import pytest
import torch
from fakes import TOWER, Counting, Every, doubling_pipeline, own_loop
from pipelines import build, run
from tiny_models import BETAS

from whenwhere import DeepCache, TGate, attach
from whenwhere.clock import Clock, lay_out
from whenwhere.decision import Compute, Reuse, whole
from whenwhere.finding import denoiser_of
from whenwhere.site import Kind


def clock_on(scheduler):
    """A clock, and the list of what it tells."""
    told = []
    return Clock(scheduler, lambda: told.append("begin"), lambda samples, _: told.append(samples)), told


def test_the_clock_tells_layouts_and_steps_with_their_samples():
    scheduler = Counting()
    clock, told = clock_on(scheduler)
    for _ in range(2):
        scheduler.set_timesteps(2)
        assert clock.index == 0
        scheduler.step(None, None, torch.zeros(3, 1))
        scheduler.step(None, None, sample=torch.zeros(3, 1))
        assert clock.index == 2
    assert told == ["begin", 3, 3] * 2


def test_what_the_scheduler_returns_and_raises_passes_through():
    scheduler = Counting()
    clock_on(scheduler)
    output = torch.zeros(1, 1)
    assert scheduler.step(output, 0, torch.zeros(1, 1)) is output
    with pytest.raises(TypeError, match="num_inference_steps"):
        scheduler.set_timesteps()


@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "HeunDiscrete", "PNDM", "FlowMatchEulerDiscrete"])
def test_a_scheduler_is_given_back_as_it_was_found(kind):
    scheduler = getattr(diffusers, f"{kind}Scheduler")()
    before, signatures = set(vars(scheduler)), _signatures(scheduler)
    clock, _ = clock_on(scheduler)
    assert _signatures(scheduler) == signatures
    clock.stop()
    clock.stop()
    assert set(vars(scheduler)) == before
    assert "step" not in before


def _signatures(scheduler):
    return inspect.signature(scheduler.set_timesteps), inspect.signature(scheduler.step)


def test_two_clocks_on_one_scheduler_both_count_and_leave_in_reverse_order():
    scheduler = Counting()
    (first, told), (second, told_too) = clock_on(scheduler), clock_on(scheduler)
    scheduler.set_timesteps(1)
    scheduler.step(None, None, torch.zeros(1, 1))
    second.stop()
    first.stop()
    assert told == told_too == ["begin", 1]
    assert set(vars(scheduler)) == {"timesteps"}


def test_a_clock_that_leaves_out_of_turn_warns_and_hears_no_more():
    scheduler = Counting()
    (first, told), (second, told_too) = clock_on(scheduler), clock_on(scheduler)
    with pytest.warns(UserWarning, match="reverse order"):
        first.stop()
    scheduler.set_timesteps(1)
    second.stop()
    assert (told, told_too) == ([], ["begin"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copied_scheduler_is_not_listened_to(copied):
    scheduler = Counting()
    _, told = clock_on(scheduler)
    other = copied(scheduler)
    other.set_timesteps(7)
    assert told == []
    assert len(other.timesteps) == 7
    assert len(scheduler.timesteps) == 0


def test_steps_know_their_place_and_their_passes():
    steps = lay_out([9.0, 5.0], 1, 2)
    assert [(step.index, step.pass_, step.timestep, step.previous) for step in steps] == [
        (0, 0, 9.0, None),
        (0, 1, 9.0, None),
        (1, 0, 5.0, 9.0),
        (1, 1, 5.0, 9.0),
    ]
    assert [step.last for step in steps] == [False, False, True, True]


@pytest.mark.parametrize(
    ("kind", "evaluations"),
    [("DDIM", 4), ("EulerDiscrete", 4), ("HeunDiscrete", 7), ("KDPM2Discrete", 7), ("PNDM", 5)],
)
def test_every_evaluation_of_the_denoiser_is_a_step(kind, evaluations):
    pipe = build("sd")
    settings = {"skip_prk_steps": True} if kind == "PNDM" else {}
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler")(**BETAS, **settings)
    with attach(pipe, DeepCache(interval=2)) as attachment:
        run("sd", pipe, steps=4)
    assert attachment.trace.row("mid_block") == "#.#.#.#"[:evaluations]


def test_image_to_image_counts_what_it_executes_whatever_the_strength():
    pipe = build("sd-img2img")
    with attach(pipe, DeepCache(interval=2)) as attachment:
        for strength, row in ((0.5, "#.#."), (0.9, "#.#.#.#"), (0.5, "#.#.")):
            run("sd-img2img", pipe, steps=8, strength=strength)
            assert attachment.trace.row("mid_block") == row == attachment.plan.row("mid_block")


def test_timesteps_are_those_that_are_executed_be_it_the_head_or_the_tail_of_the_schedule():
    """Of 999, 799.2, 599.4, 399.6, 199.8, 0 the base of an ensemble runs the first three, a refiner the last three."""

    @dataclass(frozen=True)
    class Late(Every):
        kinds: ClassVar = frozenset({Kind.STAGE})
        reads_timestep: ClassVar = True

        def decide(self, site, step):  # noqa: ARG002
            return Reuse() if 150 < step.timestep < 600 else Compute(whole)

    for name, part, row in (("sdxl", "denoising_end", "##."), ("sdxl-img2img", "denoising_start", "#.#")):
        pipe = build(name)
        with attach(pipe, Late()) as attachment:
            run(name, pipe, **{part: 0.5})
        assert attachment.trace.row("mid_block") == row


def test_separate_guidance_calls_are_passes_of_one_step():
    pipe = build("flux-true-cfg")
    with attach(pipe, Every(2)) as attachment:
        run("flux-true-cfg", pipe, steps=3)
    assert attachment.trace.row("transformer_blocks.0") == "##..##"


def test_a_replaced_scheduler_is_an_error_that_says_so():
    pipe = build("sd")
    with attach(pipe, DeepCache()):
        pipe.scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
        with pytest.raises(RuntimeError, match=r"replaced after attaching: DDIMScheduler .* EulerDiscreteScheduler"):
            run("sd", pipe)


def test_a_scheduler_that_never_moves_is_an_error_that_says_so():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe, Every(2), anatomy=TOWER):
        pipe.scheduler.set_timesteps(3)
        for _ in range(8):
            pipe.transformer(torch.ones(1, 1))
        with pytest.raises(RuntimeError, match="8 times without a step of the scheduler"):
            pipe.transformer(torch.ones(1, 1))


def test_a_scheduler_without_timesteps_is_an_error_that_says_so():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe, Every(2), anatomy=TOWER), pytest.raises(RuntimeError, match="no timesteps: call its set"):
        pipe.transformer(torch.ones(1, 1))


def test_a_loop_of_ones_own_runs_twice_in_a_row_with_another_number_of_steps():
    pipe = build("sd")
    plain = own_loop(pipe.unet, pipe.scheduler, 4)
    with attach(pipe.unet, DeepCache(interval=2), scheduler=pipe.scheduler) as attachment:
        first = own_loop(pipe.unet, pipe.scheduler, 4)
        own_loop(pipe.unet, pipe.scheduler, 5)
        assert attachment.trace.row("mid_block") == "#.#.#"
        assert torch.equal(own_loop(pipe.unet, pipe.scheduler, 4), first)
    assert not torch.equal(first, plain)
    assert torch.equal(own_loop(pipe.unet, pipe.scheduler, 4), plain)


def test_the_signatures_of_modules_and_scheduler_stay_visible():
    pipe = build("sd")
    attention = pipe.unet.mid_block.attentions[0]
    looked_at = (pipe.unet, pipe.unet.mid_block, attention)
    before = [inspect.signature(module.forward) for module in looked_at] + [*_signatures(pipe.scheduler)]
    with attach(pipe, DeepCache()):
        after = [inspect.signature(module.forward) for module in looked_at] + [*_signatures(pipe.scheduler)]
    assert after == before


def test_no_decision_waits_for_the_device(monkeypatch):
    """Whatever reads a value of a tensor would; here it fails while the denoiser is called."""
    pipe = build("sd-deep")
    network, inside = denoiser_of(pipe), []

    def guarded(name):
        original = getattr(torch.Tensor, name)

        def read(self, *args):
            assert not inside, f"Tensor.{name} was called"
            return original(self, *args)

        return read

    network.register_forward_pre_hook(lambda *_: inside.append(1))
    network.register_forward_hook(lambda *_: inside.clear())
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, guarded(name))
    with attach(pipe, TGate(gate_step=3, sp_interval=2), DeepCache(interval=4)):
        run("sd-deep", pipe)
    inside.append(1)
    with pytest.raises(AssertionError, match=r"Tensor\.item"):
        torch.ones(()).item()
    inside.clear()
