"""Skip-Cache: the window of timesteps, the authors' notation, the laws, a naive loop, and the published costs."""

from functools import cache

import laws
import naive
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from laws import STEPS, Setting
from pipelines import CASES, build, run
from torch import Tensor

import whenwhere
from whenwhere import SkipCache, SkipDrift, SkipForecast, SkipOffset, attach
from whenwhere.clock import Step, lay_out

CASE = "hunyuan-dit"  # the one family of diffusers with long skips
WIDE = SkipCache(interval=2, depth=1, start_timestep=1000, stop_timestep=0)

SETTING = Setting(
    "Skip-Cache",
    (WIDE,),
    neutral=lambda _: (SkipCache(interval=1),),
    refused=dict.fromkeys(set(CASES) - {CASE, "skip-dit"}, "DeepCache works on U-Nets, FORA and DeltaDiT on other"),
    refused_later={},
)
LAWS = (
    laws.neutral_is_exact,
    laws.nothing_left,
    laws.generations_are_independent,
    laws.cost_is_what_was_promised,
    laws.batch_equals_its_prompts,
)


def ddim(steps: int) -> DDIMScheduler:
    """With 50 steps: timesteps 980, 960 ... 0."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


def full_steps(method: SkipCache, steps: int = 50) -> list[bool]:
    return [method.full(step) for step in lay_out([float(t) for t in ddim(steps).timesteps], 1, 1)]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_laws_hold(law):
    law(SETTING, CASE)


@pytest.mark.parametrize("case", CASES)
def test_only_long_skips_are_accepted(case):
    laws.accepted_or_refused(SETTING, case)


def test_the_plan_tells_the_truth():
    pipe = build(CASE)
    method = SkipCache(interval=3, depth=2, start_timestep=800, stop_timestep=100)
    with attach(pipe, method) as attachment:
        run(CASE, pipe, steps=12)
    beforehand = whenwhere.plan(pipe, method, steps=12, scheduler=pipe.scheduler)
    assert attachment.trace.rows == attachment.plan.rows == beforehand.rows
    assert attachment.trace.held == attachment.plan.cost.bytes
    assert attachment.plan.row("blocks.1") == "############"
    assert attachment.plan.row("blocks.2") == "##.#..#..#.#"  # timesteps 913, 830, 747 ... 83, 0


# -- the schedule ----------------------------------------------------------------------------------------------------


def test_the_call_pattern_of_the_published_schedule():
    full = full_steps(SkipCache.parse("N2-700-50"))
    assert full[:15] == [True] * 15
    assert [980 - 20 * s for s in range(50) if not full[s]] == [*range(680, 79, -40), 40]
    assert full.count(False) == 17
    assert full[-1]  # t = 0; t = 20 is full by the grid


def test_the_first_step_at_the_lower_end_may_be_partial_and_no_later_one():
    timesteps = [900.0, 600.0, 50.0, 40.0, 30.0, 20.0]
    steps = lay_out(timesteps, 1, 1)
    assert [SkipCache(interval=6).full(step) for step in steps] == [True, False, False, True, True, True]


def test_the_window_does_not_move_the_grid():
    full = full_steps(SkipCache(interval=4, start_timestep=700, stop_timestep=0))
    assert [s for s in range(15, 49) if full[s]] == [16, 20, 24, 28, 32, 36, 40, 44, 48]


def test_flow_matching_schedulers_give_their_timesteps_in_thousandths_of_sigma():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    full = [WIDE.full(step) for step in lay_out([float(t) for t in scheduler.timesteps], 1, 1)]
    assert full == [True, False] * 5


def test_full_steps_may_be_listed_in_place_of_a_window():
    pipe = build(CASE)
    for schedule in ([0, 3, 4], (True, False, False, True, True, False)):
        method = SkipCache(schedule=schedule)
        with attach(pipe, method) as attachment:
            latents = run(CASE, pipe, steps=6)
        assert attachment.plan.row("blocks.2") == attachment.trace.row("blocks.2") == "#..##."
        assert whenwhere.plan(pipe.transformer, method, steps=6).rows == attachment.plan.rows  # no timesteps are needed
        assert hash(method) == hash(SkipCache(schedule=tuple(schedule)))
    assert not torch.equal(run(CASE, pipe, steps=6), latents)


def test_a_list_of_what_the_grid_gives_gives_the_same():
    pipe = build(CASE)
    with attach(pipe, SkipCache(interval=3, start_timestep=1000, stop_timestep=0)):
        expected = run(CASE, pipe, steps=6)
    with attach(pipe, SkipCache(schedule=[0, 3])):
        assert torch.equal(run(CASE, pipe, steps=6), expected)


def test_with_a_list_a_solver_that_evaluates_a_timestep_twice_will_do():
    pipe = build(CASE)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with attach(pipe, SkipCache(schedule=[0, 2, 3, 6])) as attachment:
        run(CASE, pipe, steps=4)  # seven evaluations
    assert attachment.trace.row("blocks.2") == "#.##..#"


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"schedule": [1, 2]}, ValueError, "the first step of the schedule .* must be full"),
        ({"schedule": [False, True]}, ValueError, "the first step of the schedule .* must be full"),
        ({"schedule": [0, -1]}, ValueError, r"schedule\[1\] must be at least 0, got -1"),
        ({"schedule": [0, True]}, TypeError, r"schedule\[1\] must be a whole number"),
        ({"schedule": [0, 2.0]}, TypeError, r"schedule\[1\] must be a whole number"),
        ({"schedule": [0], "interval": 3}, ValueError, "either a schedule, or interval"),
        ({"schedule": [0], "stop_timestep": 0}, ValueError, "either a schedule, or interval"),
    ],
    ids=str,
)
def test_a_schedule_that_says_nothing_clear_is_refused(fields, error, words):
    with pytest.raises(error, match=words):
        SkipCache(**fields)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [([0, 6], "lists step 6, but 6 steps are executed"), ([True] * 5, "has 5 entries, but 6 steps are executed")],
)
def test_a_schedule_for_another_number_of_steps_is_refused(schedule, words):
    with pytest.raises(ValueError, match=words):
        whenwhere.plan(build(CASE), SkipCache(schedule=schedule), steps=6)


# -- the notation ----------------------------------------------------------------------------------------------------


def test_the_notation_is_read():
    assert SkipCache.parse("N2-700-50") == SkipCache(2, 1, 700, 50)
    assert SkipCache.parse("N12-1000-0", depth=4) == SkipCache(12, 4, 1000, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "three parts"),
        ("2-700-50", "'2' in the schedule"),
        ("N-700-50", "'N' in the schedule"),
        ("N0-700-50", "'N0' in the schedule"),
        ("N02-700-50", "'N02' in the schedule"),
        ("n2-700-50", "'n2' in the schedule"),
        ("N2-700", "three parts"),
        ("N2-700-50-1", "three parts"),
        ("N2--700-50", "three parts"),
        ("N2-700-x", "'x' in the schedule"),
        ("N2-7e2-50", "'7e2' in the schedule"),
        (" N2-700-50", "' N2' in the schedule"),
        ("N2-700-50\n", r"'50\\n' in the schedule"),
        ("N٢-700-50", "in the schedule"),
        ("N2-50-700", "stop_timestep must be at least 0 and below start_timestep"),
        ("N2-50-50", "stop_timestep must be at least 0 and below"),
        ("N2-1001-50", "start_timestep must be above 0 and at most 1000, got 1001"),
    ],
)
def test_anything_else_is_refused_and_the_part_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        SkipCache.parse(text)


# -- what a step computes --------------------------------------------------------------------------------------------


class Reference:
    """HunyuanDiT's loop over its blocks, written down again with Skip-Cache in it."""

    def __init__(self, network: torch.nn.Module, method: SkipCache) -> None:
        self.network, self.k = network, method.depth
        self.n, self.start, self.stop = method.interval, method.start_timestep, method.stop_timestep
        self.calls, self.cache = 0, None
        self.partial = 0

    def __call__(self, inputs: dict) -> Tensor:
        """Run with the loop over blocks replaced: the first block does all the work, the others hand on."""
        t = float(inputs["timestep"][0])
        inputs = inputs | {"timestep": inputs["timestep"].to(inputs["hidden_states"].dtype)}
        full = self.calls % self.n == 0 or self.cache is None or t >= self.start
        self.partial += not full
        blocks, originals = self.network.blocks, [block.forward for block in self.network.blocks]
        count = len(blocks)

        def everything(x: Tensor, skip: object = None, **kwargs: object) -> Tensor:
            skips = {}
            for i in range(count):
                if i == count - self.k:
                    if full:
                        self.cache = x
                    x = self.cache
                if not full and self.k <= i < count - self.k:
                    continue
                skip = skips[count - 1 - i] if i > count // 2 else None
                x = originals[i](x, skip=skip, **kwargs)
                skips[i] = x
            return x

        for i, block in enumerate(blocks):
            block.forward = everything if i == 0 else lambda x, **_: x
        try:
            output = self.network(**inputs)[0]
        finally:
            for block in blocks:
                del block.forward
        self.calls += 1
        if t <= self.stop:
            self.calls, self.cache = 0, None
        return output


@pytest.mark.parametrize(
    "method",
    [WIDE, SkipCache(interval=3, depth=2, start_timestep=800, stop_timestep=100), SkipCache.parse("N2-700-200")],
)
def test_a_naive_loop_agrees(method):
    pipe = build(CASE)
    start = naive.opening(CASE, pipe, steps=12, prompts=2)
    reference = Reference(pipe.transformer, method)
    expected = naive.plain(pipe.transformer, start, lambda _, inputs: reference(inputs))
    with attach(pipe, method):
        latents = run(CASE, pipe, steps=12, prompts=2)
    assert reference.partial > 0
    assert (latents - expected).norm() / expected.norm() < 1e-6


# -- cost ------------------------------------------------------------------------------------------------------------


@cache
def per_step() -> tuple[int, int]:
    """Multiply-adds of a full and of a partial step of HunyuanDiT with guidance, in the papers' convention."""
    scheduler = ddim(4)  # timesteps 750, 500, 250, 0
    cost = whenwhere.plan("hunyuan-dit", WIDE, steps=4, scheduler=scheduler).cost
    assert cost.bytes == 2 * 4096 * 1408 * 2  # one tensor: rows, tokens, width, bytes of a half
    full = cost.baseline.papers // 4
    return full, (cost.macs.papers - 2 * full) // 2


# Skip-DiT (https://arxiv.org/abs/2411.17616v1), the table of HunyuanDiT, whose "FLOPs" are MACs: 50 steps, 700 to 50.
@pytest.mark.parametrize(("interval", "tera"), [(2, 348.24), (3, 299.48), (4, 270.22), (5, 260.47), (6, 240.96)])
def test_hunyuan_dit_costs_what_was_published(interval, tera):
    fresh = sum(full_steps(SkipCache(interval)))
    full, partial = per_step()
    assert (fresh * full + (50 - fresh) * partial) / 1e12 == pytest.approx(tera, rel=5e-4)


# The same table for class-to-video Latte with skips: 14 pairs, one of them computed at each end, 900 to 50.
@pytest.mark.parametrize(("interval", "tera"), [(2, 180.68), (3, 145.87), (4, 125.99), (5, 121.02), (6, 111.07)])
def test_the_schedule_explains_the_published_costs_of_latte(interval, tera):
    fresh = sum(full_steps(SkipCache(interval, 1, 900, 50)))
    assert 290.05 * (fresh + (50 - fresh) * 2 / 14) / 50 == pytest.approx(tera, rel=3e-4)


@pytest.mark.parametrize(
    ("schedule", "tera"),
    [
        ("N2-700-50", 1127.83),
        ("N3-700-50", 974.80),
        ("N4-700-50", 882.98),
        ("N2-800-50", 1066.62),
        ("N3-800-50", 852.38),
        ("N4-800-50", 760.56),
    ],
)
def test_the_schedule_explains_the_published_costs_of_text_to_video(schedule, tera):
    fresh = sum(full_steps(SkipCache.parse(schedule)))
    assert 1648.13 * (fresh + (50 - fresh) * 2 / 28) / 50 == pytest.approx(tera, rel=3e-4)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"interval": 0}, ValueError, "interval must be at least 1"),
        ({"interval": 2.0}, TypeError, "interval must be a whole number"),
        ({"depth": 0}, ValueError, "depth must be at least 1"),
        ({"start_timestep": 0}, ValueError, "start_timestep must be above 0"),
        ({"start_timestep": "700"}, TypeError, "start_timestep must be a number"),
        ({"stop_timestep": -1}, ValueError, "stop_timestep must be at least 0"),
        ({"stop_timestep": float("nan")}, ValueError, "stop_timestep must be at least 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields, error, words):
    with pytest.raises(error, match=words):
        SkipCache(**fields)


def test_a_depth_without_a_skip_is_refused():
    with pytest.raises(ValueError, match="with 6 blocks, as HunyuanDiT2DModel has, depth is 1 to 2"):
        attach(build(CASE), SkipCache(depth=3))


def test_a_plan_without_timesteps_is_refused():
    with pytest.raises(ValueError, match="goes by timesteps: plan"):
        whenwhere.plan(build(CASE).transformer, SkipCache(), steps=10)


def test_a_solver_that_evaluates_a_timestep_twice_is_refused():
    pipe = build(CASE)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with attach(pipe, WIDE), pytest.raises(ValueError, match=r"evaluates timestep .* twice"):
        run(CASE, pipe, steps=STEPS)


@pytest.mark.parametrize("method", [WIDE, SkipOffset(), SkipForecast(), SkipDrift()], ids=lambda m: type(m).__name__)
def test_several_timesteps_in_one_batch_are_refused(method):
    """On a bare network. One timestep for all rows is fine, expanded or written out."""
    network, scheduler = build("skip-dit").transformer, ddim(4)
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    with torch.no_grad(), attach(network, method, scheduler=scheduler):
        for t in (torch.tensor([750]).expand(2), torch.tensor([750, 750])):
            scheduler.set_timesteps(4)
            network(latents, t, labels)
        with pytest.raises(ValueError, match=r"rows of this batch have several: 500, 750\. Sample them apart"):
            network(latents, timestep=torch.tensor([750, 500]), class_labels=labels)
    network(latents, torch.tensor([750, 500]), labels)
    assert "forward" not in vars(network)


def test_an_odd_number_of_blocks_is_refused():
    blocks = [
        whenwhere.site.Site(whenwhere.site.Kind.BLOCK, f"blocks.{i}", i, 5, depth=min(i, 4 - i), block=i, blocks=5)
        for i in range(5)
    ]
    with pytest.raises(ValueError, match="Odd has 5"):
        SkipCache().check(blocks, "Odd")


def test_a_window_that_holds_no_step_is_said():
    pipe = build(CASE)
    with attach(pipe, SkipCache()), pytest.warns(UserWarning, match="no step is partial"):
        run(CASE, pipe, steps=1)


def test_a_step_before_the_first_full_one_does_not_exist():
    assert SkipCache(start_timestep=1000).full(Step(0, 4, timestep=999.0))
