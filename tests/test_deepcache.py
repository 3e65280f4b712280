"""DeepCache: its schedules, its rim against a naive executor, and the known defects of public code turned around."""

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from math import ceil
from typing import Any

import naive
import pytest
import torch
from diffusers import DiffusionPipeline
from naive import Gate, Ladder, Opening, denoiser, distance, opening, rows_seen
from pipelines import build, run
from schedulers import SCHEDULERS, with_scheduler
from tiny_models import UNET, sd, tiny
from torch import Tensor

from whenwhere import DeepCache, GuidanceStop, TGate, attach, plan
from whenwhere.methods.deepcache import nonuniform

STEPS = 6
RESIDUALS = {"sd": 4, "sd-deep": 9, "sdxl": 6, "svd": 4, "hunyuan-dit": 2}
BRANCHES = [(name, b) for name in ("sd", "sd-deep", "sdxl") for b in range(RESIDUALS[name])]


@cache
def opened(name: str, prompts: int = 1, guidance: bool = True) -> Opening:
    return opening(name, build(name), prompts=prompts, guidance=guidance)


def every(interval: int) -> Callable[[int], bool]:
    return lambda s: s % interval == 0


def assert_naive_agrees(name: str, interval: int, branch: int, prompts: int = 1, guidance: bool = True) -> None:
    pipe = build(name)
    ladder = Ladder(pipe.unet, branch, every(interval))
    expected = naive.plain(pipe.unet, opened(name, prompts, guidance), ladder)
    with attach(pipe, DeepCache(interval, branch)) as attachment:
        latents = run(name, pipe, prompts=prompts, guidance=guidance)
    assert distance(latents, expected) <= 1e-6
    assert attachment.trace.held == attachment.trace.cost.bytes == ladder.feature.nbytes


# The schedule


DRAWN = """\
model                                                     ########
down_blocks.0 ... down_blocks.1                           ########
down_blocks.2 ... up_blocks.0                             #..#..#.
up_blocks.1 ... up_blocks.2                               ########
down_blocks.0.resnets.0 ... down_blocks.1.attentions.0    ########
down_blocks.1.resnets.1 ... down_blocks.1.downsamplers.0  #..#..#.
down_blocks.2.resnets.0 ... up_blocks.0.upsamplers.0      #  #  #\x20
up_blocks.1.resnets.0 ... up_blocks.1.attentions.0        #..#..#.
up_blocks.1.resnets.1 ... up_blocks.2.attentions.2        ########"""


def test_a_plan_skips_what_is_deeper_than_the_branch():
    drawn = str(plan(build("sd-deep"), DeepCache(interval=3, branch=4), steps=8)).split("\n\n")[0]
    assert drawn == DRAWN


NONUNIFORM = {
    (50, 10, 15, 1.4): "0 5 9 13 17 21 26 31 37 43",
    (50, 10, 10, 1.5): "0 4 7 10 14 19 24 30 36 43",
    (50, 17, 15, 1.3): "0 3 6 8 11 13 15 17 20 23 26 29 32 35 39 42 46",
    (250, 13, 120, 1.2): "0 22 42 62 80 98 116 132 149 168 187 207 228",
}


@pytest.mark.parametrize("setting", NONUNIFORM)
def test_the_nonuniform_schedule_is_the_one_of_the_published_results(setting):
    steps, full, center, power = setting
    listed = [int(step) for step in NONUNIFORM[setting].split()]
    assert list(nonuniform(*setting)) == listed
    interval = ceil(steps / full)
    assert DeepCache(interval, center=center, pow=power).schedule(steps) == set(listed)


# Table 11 and the two sets of Table 13: (steps, intervals, centers, powers)
PUBLISHED = [
    (250, (2, 3, 5, 10, 20), (120, 120, 110, 110, 120), (1.2, 1.2, 1.4, 1.2, 1.4)),
    (50, (2, 3, 4, 5, 6, 7, 8), (15, 15, 15, 10, 15, 15, 10), (1.5, 1.3, 1.4, 1.5, 1.3, 1.4, 1.4)),
    (50, (2, 3, 4, 5, 6, 7, 8), (20, 20, 20, 15, 15, 15, 20), (1.3, 1.4, 1.4, 1.3, 1.5, 1.5, 1.3)),
]


@pytest.mark.parametrize(
    ("steps", "interval", "center", "power"),
    [(steps, *setting) for steps, *settings in PUBLISHED for setting in zip(*settings, strict=True)],
)
def test_a_nonuniform_schedule_has_as_many_full_steps_as_the_uniform_one(steps, interval, center, power):
    chosen = sorted(DeepCache(interval, center=center, pow=power).schedule(steps))
    assert len(chosen) == ceil(steps / interval)
    assert chosen[0] == 0
    assert chosen[-1] < steps


@pytest.mark.parametrize("power", [1.0, 1.1, 1.4, 2.0])
def test_an_interval_of_one_makes_every_step_full_whatever_the_power(power):
    for steps, center in ((50, 15), (6, 0), (6, 15)):
        assert DeepCache(1, center=center, pow=power).schedule(steps) == set(range(steps))


def test_an_explicit_list_of_full_steps_is_followed():
    pipe = build("sd")
    ladder = Ladder(pipe.unet, 1, (0, 1, 4).__contains__)
    expected = naive.plain(pipe.unet, opened("sd"), ladder)
    with attach(pipe, DeepCache(branch=1, full_steps=[0, 1, 4])) as attachment:
        assert distance(run("sd", pipe), expected) <= 1e-6
    assert attachment.trace.row("mid_block") == "##..#."


# The arithmetic


@pytest.mark.parametrize(("name", "branch"), BRANCHES)
def test_the_naive_executor_agrees_on_every_branch(name, branch):
    assert_naive_agrees(name, 3, branch, prompts=1 + branch % 2)


@pytest.mark.parametrize(("interval", "guidance"), [*product((2, 5), (True, False))])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_naive_executor_agrees_at_every_interval(name, interval, guidance):
    assert_naive_agrees(name, interval, 1, 2, guidance)


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "prompts", "guidance"), [*product((2, 3, 5), (1, 2), (True, False))])
@pytest.mark.parametrize(("name", "branch"), BRANCHES)
def test_the_naive_executor_agrees_everywhere(name, branch, interval, prompts, guidance):
    assert_naive_agrees(name, interval, branch, prompts, guidance)


def test_an_interval_of_one_agrees_with_the_plain_run_bit_for_bit_and_says_so():
    pipe = build("sd")
    plain = run("sd", pipe)
    for branch in range(RESIDUALS["sd"]):
        with attach(pipe, DeepCache(1, branch)), pytest.warns(UserWarning, match="every executed step is a full one"):
            assert torch.equal(run("sd", pipe), plain)


# The module whose output enters the rim of each branch.
FRONTIERS = {
    "sd": ("up_blocks.1.attentions.0", "up_blocks.0.upsamplers.0", "up_blocks.0.resnets.0", "mid_block"),
    "sd-adapter": ("up_blocks.1.attentions.0", "up_blocks.0.upsamplers.0", "up_blocks.0.resnets.0", "mid_block"),
    "svd": ("up_blocks.1.attentions.0", "up_blocks.0.upsamplers.0", "up_blocks.0.resnets.0", "mid_block"),
    "hunyuan-dit": ("blocks.4", "blocks.3"),
}


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(
    ("name", "branch", "frontier"), [(name, b, path) for name in FRONTIERS for b, path in enumerate(FRONTIERS[name])]
)
def test_skipping_equals_computing_everything_with_one_output_frozen(name, branch, frontier, prompts):
    pipe = build(name)
    plain = run(name, pipe, prompts=prompts)
    model = denoiser(name, pipe)
    with naive.frozen_between(model.get_submodule(frontier), model, every(3)):
        expected = run(name, pipe, prompts=prompts)
    with attach(pipe, DeepCache(3, branch)):
        latents = run(name, pipe, prompts=prompts)
    assert distance(latents, expected) <= 1e-6
    assert distance(latents, plain) > 1e-5


def without_middle() -> DiffusionPipeline:
    """As in distilled U-Nets."""
    return sd(config=UNET | {"mid_block_type": None})


@pytest.mark.parametrize(("branch", "frontier"), [*enumerate(FRONTIERS["sd"][:3])])
def test_a_network_without_a_middle_has_one_branch_less(branch, frontier):
    pipe = without_middle()
    with naive.frozen_between(pipe.unet.get_submodule(frontier), pipe.unet, every(3)):
        expected = run("sd", pipe)
    with attach(pipe, DeepCache(3, branch)) as attachment:
        assert distance(run("sd", pipe), expected) <= 1e-6
    assert attachment.trace.cost.macs.all < attachment.trace.cost.baseline.all
    with pytest.raises(ValueError, match="has the branches 0 to 2"):
        attach(pipe, DeepCache(3, 3))


# ControlNet


def controlled(pipe: DiffusionPipeline, start: Opening, branch: int, full: Callable[[int], bool]) -> Tensor:
    """The naive loop with a ControlNet that runs at the full evaluations only; its residuals stay until the next."""
    ladder, latest = Ladder(pipe.unet, branch, full), {}

    def evaluate(s: int, inputs: dict[str, Any]) -> Tensor:
        if full(s):
            now = {key: inputs[key] for key in ("sample", "timestep")}
            down, middle = pipe.controlnet(**start.control | now)
            latest.update(down_block_additional_residuals=down, mid_block_additional_residual=middle)
        return ladder(s, inputs | latest)

    return naive.plain(pipe.unet, start, evaluate)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("name", ["sd-controlnet", "sdxl-controlnet"])
@pytest.mark.parametrize("branch", [0, 2])
def test_a_controlnet_runs_at_full_steps_and_its_residuals_stay_in_the_rim(name, branch, prompts):
    pipe = build(name)
    start = opened(name, prompts)
    expected = controlled(pipe, start, branch, every(3))
    runs = rows_seen(pipe.controlnet.conv_in)
    with attach(pipe, DeepCache(3, branch)) as attachment:
        latents = run(name, pipe, prompts=prompts)
    assert distance(latents, expected) <= 1e-6
    assert runs == [2 * prompts] * 2
    rim = start.inputs["down_block_additional_residuals"][: branch + 1]
    feature = naive_feature(name, branch, prompts)
    assert attachment.trace.held == feature + sum(residual.nbytes for residual in rim)


@cache
def naive_feature(name: str, branch: int, prompts: int) -> int:
    """Bytes of the one tensor that a naive executor keeps."""
    pipe = build(name)
    ladder = Ladder(pipe.unet, branch, every(3))
    naive.plain(pipe.unet, opened(name, prompts), ladder)
    return ladder.feature.nbytes


# Together with others


def full_of(gate: Gate, interval: int, guided: bool) -> Callable[[int], bool]:
    """DeepCache's full steps, the gate step, and the first step of the smaller batch."""
    forced = ([gate.m - 1] if gate.m < STEPS else []) + ([gate.m] if guided else [])
    return lambda s: s % interval == 0 or s in forced


@pytest.mark.parametrize("m", [1, 2, 4, 5])
@pytest.mark.parametrize(
    ("name", "branch", "interval", "prompts", "guidance"),
    [
        ("sd", 0, 3, 1, True),
        ("sd", 1, 3, 2, False),
        ("sd-deep", 4, 2, 1, True),
        ("sd-deep", 4, 2, 2, False),
        ("sdxl", 1, 3, 2, True),
    ],
)
def test_with_tgate_the_naive_loop_agrees_in_either_order(name, branch, interval, m, prompts, guidance):
    pipe = build(name)
    start, gate = opened(name, prompts, guidance), Gate(m)
    ladder = Ladder(pipe.unet, branch, full_of(gate, interval, guidance))
    expected = naive.tgate(pipe.unet, start, gate, run=ladder)
    methods = [TGate(m, sp_interval=1), DeepCache(interval, branch)]
    for ordered in (methods, methods[::-1]):
        with attach(pipe, *ordered):
            assert distance(run(name, pipe, prompts=prompts, guidance=guidance), expected) <= 1e-6


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(("name", "branch"), [("sd", 1), ("sd-deep", 4)])
def test_where_guidance_stops_the_step_is_full_in_either_order(name, branch, prompts):
    pipe = build(name)
    ladder = Ladder(pipe.unet, branch, (0, 3, 4).__contains__)
    expected = naive.guidance_stop(pipe.unet, opened(name, prompts), 4, ladder)
    for ordered in ([GuidanceStop(4), DeepCache(3, branch)], [DeepCache(3, branch), GuidanceStop(4)]):
        with attach(pipe, *ordered):
            assert distance(run(name, pipe, prompts=prompts), expected) <= 1e-6


def test_with_tgate_the_gate_step_and_the_next_are_full():
    made = plan(build("sd"), TGate(5, sp_interval=1), DeepCache(interval=3), steps=10)
    assert made.row("") == "#####/////"
    assert made.row("mid_block") == "#..####..#"
    unguided = plan(build("sd"), TGate(5, sp_interval=1), DeepCache(interval=3), steps=10, guidance=False)
    assert unguided.row("mid_block") == "#..##.#..#"


# What is refused


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"interval": 0}, ValueError),
        ({"interval": -2}, ValueError),
        ({"interval": 2.5}, TypeError),
        ({"interval": True}, TypeError),
        ({"branch": -1}, ValueError),
        ({"branch": "mid"}, TypeError),
        ({"center": -1}, ValueError),
        ({"pow": 0.9}, ValueError),
        ({"pow": float("nan")}, ValueError),
        ({"full_steps": [1, 3]}, ValueError),
        ({"full_steps": [0, 3, 2]}, ValueError),
        ({"full_steps": [0, 3, 3]}, ValueError),
        ({"full_steps": [0, 1.5]}, TypeError),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused_by_name(fields, error):
    with pytest.raises(error, match=next(iter(fields))):
        DeepCache(**fields)


@pytest.mark.parametrize("method", [DeepCache(full_steps=[0, 6]), DeepCache(center=6, pow=1.4)], ids=repr)
def test_a_schedule_beyond_the_last_step_is_refused_and_the_pipeline_stays_usable(method):
    pipe = build("sd")
    plain = run("sd", pipe)
    with attach(pipe, method), pytest.raises(ValueError, match="executed"):
        run("sd", pipe)
    assert torch.equal(run("sd", pipe), plain)


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_branch_that_does_not_exist_is_refused_with_those_that_do(name):
    residuals = RESIDUALS[name]
    with pytest.raises(ValueError, match=f"has the branches 0 to {residuals - 1}"):
        attach(build(name), DeepCache(branch=residuals))


@pytest.mark.parametrize("name", ["pixart-alpha", "dit", "latte", "sd3", "flux"])
def test_a_model_without_skip_connections_is_told_what_fits(name):
    with pytest.raises(ValueError, match=r"joined by skip connections; \w+ has none. TGate .* GuidanceStop"):
        attach(build(name), DeepCache())


def test_attaching_twice_is_refused_and_detaching_twice_is_not():
    pipe = build("sd")
    plain = run("sd", pipe)
    attachment = attach(pipe, DeepCache())
    with pytest.raises(ValueError, match="attached already"):
        attach(pipe, DeepCache())
    attachment.detach()
    attachment.detach()
    assert torch.equal(run("sd", pipe), plain)


# Defects of public code, turned around


@pytest.mark.parametrize("interval", [2, 5])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_has_a_full_evaluation_every_interval(kind, interval):
    pipe = with_scheduler(kind)
    start = opening("sd", pipe)
    ladder = Ladder(pipe.unet, 1, every(interval))
    expected = naive.plain(pipe.unet, start, ladder)
    deep = rows_seen(pipe.unet.mid_block.resnets[0].conv1)
    with attach(pipe, DeepCache(interval, 1)):
        latents = run("sd", pipe)
    assert distance(latents, expected) <= 1e-6
    assert len(deep) == ladder.evaluations == ceil(len(start.timesteps) / interval)


def test_image_to_image_begins_anew_with_every_strength_size_and_batch():
    requests = [{"strength": 0.5}, {"strength": 0.9}, {"size": 24}, {"prompts": 2}, {"strength": 0.5, "seed": 3}]
    pipe = build("sd-img2img")
    with attach(pipe, DeepCache()):
        in_turn = [run("sd-img2img", pipe, steps=10, **request) for request in requests]
    for latents, request in zip(in_turn, requests, strict=True):
        other = build("sd-img2img")
        with attach(other, DeepCache()):
            assert torch.equal(run("sd-img2img", other, steps=10, **request), latents)


def own_loop(scheduler: Any, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """A loop of one's own, without a pipeline and without guidance."""
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 16, generator=generator)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(call(x, t, text), t, x, return_dict=False)[0]
    return x


CALLS: dict[str, Callable[..., Any]] = {
    "positional tensor": lambda unet, x, t, text: unet(x, t, text)[0],
    "number": lambda unet, x, t, text: unet(x, int(t), text)[0],
    "keyword": lambda unet, x, t, text: unet(timestep=t, encoder_hidden_states=text, sample=x).sample,
    "no dictionary": lambda unet, x, t, text: unet(x, timestep=t, encoder_hidden_states=text, return_dict=False)[0],
}


def test_a_loop_of_ones_own_may_pass_the_timestep_in_any_way():
    pipe = build("sd")
    with attach(pipe.unet, DeepCache(), scheduler=pipe.scheduler) as attachment:
        latents = {name: own_loop(pipe.scheduler, partial(call, pipe.unet)) for name, call in CALLS.items()}
    assert attachment.trace.row("mid_block") == "#..#.."
    assert all(torch.equal(other, latents["keyword"]) for other in latents.values())


def test_a_resolution_that_changes_in_the_middle_is_an_error():
    pipe = build("sd")
    sizes = iter([8, 8, 16])

    def call(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        size = next(sizes)
        pipe.unet(x.new_zeros(1, 4, size, size), t, text)
        return x

    attached = attach(pipe.unet, DeepCache(interval=5), scheduler=pipe.scheduler)
    with attached, pytest.raises(RuntimeError, match="must not change within a generation"):
        own_loop(pipe.scheduler, call)


def test_guidance_that_is_switched_off_in_the_middle_makes_the_next_step_full():
    pipe = build("sd")
    deep = rows_seen(pipe.unet.mid_block.resnets[0].conv1)

    def switch_off(pipe: Any, step: int, _: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if step != 3:
            return inputs
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": inputs["prompt_embeds"].chunk(2)[1]}

    with attach(pipe, DeepCache(interval=3)):
        run("sd", pipe, steps=8, callback=switch_off, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert deep == [2, 2, 1, 1]  # at steps 0, 3, 4 and 6


def test_a_plan_needs_no_weights_and_no_pipeline():
    made = plan(tiny("UNet2DConditionModel", UNET).to("meta"), DeepCache(), steps=4)
    assert made.row("mid_block") == "#..#"
