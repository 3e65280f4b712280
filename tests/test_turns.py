"""One generation at a time, moved by one scheduler: what would mix generations up is refused."""

import copy

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from fakes import own_loop
from pipelines import build, run
from tiny_models import BETAS

from whenwhere import DeepCache, attach
from whenwhere.turns import place


def test_a_timestep_is_found_by_where_it_lies():
    laid = torch.tensor([9.0, 5.0, 5.0, 1.0])
    assert [place(laid, t) for t in laid] == [0, 1, 2, 3]
    assert [place(laid, t.expand(7)) for t in laid[1:]] == [1, 2, 3]
    assert place(laid[1:], laid[2]) == 1
    for copied in (laid.clone()[1], torch.tensor(5.0), 5.0, 5, None, laid.to("meta")[1]):
        assert place(laid, copied) is None


def test_two_generations_in_turns_are_refused():
    """Off its full steps each would decode the other's features."""
    pipe = build("sd")
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 6, 16)

    def step(t):
        pipe.scheduler.step(pipe.unet(sample, t, text).sample, t, sample)

    with attach(pipe, DeepCache(3), guidance=False), torch.no_grad():
        pipe.scheduler.set_timesteps(4)
        step(pipe.scheduler.timesteps[0])
        with pytest.raises(RuntimeError, match="two generations take turns, or one was begun anew"):
            step(pipe.scheduler.timesteps[0])


def test_a_generation_within_another_is_refused_when_the_other_goes_on():
    pipe = build("sd")
    inner = []

    def callback(_, step, *__):
        if step == 2 and not inner:
            inner.append(run("sd", pipe, steps=4))
        return {}

    expected = run("sd", build("sd"), steps=4)
    with attach(pipe, DeepCache(1)):
        with pytest.raises(RuntimeError, match="two generations take turns"), pytest.warns(match="changed nothing"):
            run("sd", pipe, steps=6, callback=callback)
        assert torch.equal(inner[0], expected)
        assert torch.equal(run("sd", pipe, steps=4), expected)


def test_a_loop_that_lays_out_its_steps_once_may_run_twice():
    pipe = build("sd")
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 6, 16)
    with attach(pipe, DeepCache(3), guidance=False) as attached, torch.no_grad():
        pipe.scheduler.set_timesteps(4)
        for _ in range(2):
            for t in pipe.scheduler.timesteps:
                pipe.scheduler.step(pipe.unet(sample, t, text).sample, t, sample)
            assert attached.trace.row("mid_block") == "#..#"


def test_another_pipeline_on_the_same_network_with_a_scheduler_of_its_own_is_refused():
    """Its steps would all be passes of the first step, and nothing would be skipped."""
    pipe = build("sd")
    other = copy.copy(pipe)
    other.scheduler = EulerDiscreteScheduler(**BETAS)
    expected = run("sd", pipe, steps=4)
    with attach(pipe, DeepCache(1)):
        with pytest.raises(RuntimeError, match=r"at another timestep before DDIMScheduler.step, so another scheduler"):
            run("sd", other, steps=4)
        with pytest.warns(match="changed nothing"):
            assert torch.equal(run("sd", pipe, steps=4), expected)


def test_a_loop_of_ones_own_does_not_take_over_the_number_of_steps_of_an_earlier_call():
    pipe = build("sd")
    run("sd", pipe, steps=6)
    with attach(pipe, DeepCache(4), guidance=False) as attached:
        own_loop(pipe.unet, pipe.scheduler, 10)
    assert attached.trace.row("mid_block") == "#...#...#."
