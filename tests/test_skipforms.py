"""Our forms of Skip-Cache (offset, forecast, drift): the laws, naive loops, and that each falls back to Skip-Cache."""

import laws
import naive
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from laws import STEPS, Setting
from pipelines import CASES, build, run
from test_skip_dit import TEXT, dit, latte
from test_skipcache import ddim
from tiny_models import BETAS, VAE, randomised
from torch import Tensor

import whenwhere
from whenwhere import DeltaDiT, SkipCache, attach
from whenwhere.methods import SkipDrift, SkipForecast, SkipOffset

CASE = "hunyuan-dit"
ALWAYS = {"start_timestep": 1000, "stop_timestep": 0}
OFFSET = SkipOffset(interval=3, depth=2, **ALWAYS)
FORECAST = SkipForecast(interval=2, depth=1, **ALWAYS)
LIMIT = 0.45  # a drift that some steps of the tiny network exceed, and some do not
DRIFT = SkipDrift(threshold=float("inf"), longest=3)
OTHERS = dict.fromkeys(set(CASES) - {CASE, "skip-dit"}, "DeepCache works on U-Nets, FORA and DeltaDiT on other")

SETTINGS = (
    Setting("offset", (OFFSET,), lambda _: (SkipOffset(interval=1),), OTHERS, {}),
    Setting("forecast", (FORECAST,), lambda _: (SkipForecast(interval=1),), OTHERS, {}),
    Setting("drift", (DRIFT,), lambda _: (SkipDrift(longest=1),), OTHERS, {}),
)
LAWS = (laws.neutral_is_exact, laws.nothing_left, laws.generations_are_independent, laws.cost_is_what_was_promised)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_laws_hold(law, setting):
    law(setting, CASE)


@pytest.mark.parametrize("setting", SETTINGS[:2], ids=str)
def test_a_batch_equals_its_prompts(setting):
    laws.batch_equals_its_prompts(setting, CASE)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("case", ["sd", "dit", "sd3"])
def test_only_long_skips_are_accepted(case, setting):
    laws.accepted_or_refused(setting, case)


@pytest.mark.parametrize(
    ("method", "row"),
    [(OFFSET, "#--#--#--#--"), (FORECAST, "#.#.#.#.#.#."), (DRIFT, "#..#..#..#..")],
    ids=lambda value: type(value).__name__,
)
def test_the_plan_tells_the_truth(method, row):
    pipe = build(CASE)
    with attach(pipe, method) as attachment:
        run(CASE, pipe, steps=12)
    beforehand = whenwhere.plan(pipe, method, steps=12, scheduler=pipe.scheduler)
    assert attachment.trace.rows == attachment.plan.rows == beforehand.rows
    assert attachment.trace.held == attachment.plan.cost.bytes
    assert attachment.plan.row("blocks.3") == row


# -- what a step computes --------------------------------------------------------------------------------------------


class Loop:
    """HunyuanDiT's loop over its blocks, written down again; `full` says when, `enter` what comes before the last k."""

    def __init__(self, network: torch.nn.Module, depth: int) -> None:
        self.network, self.k, self.calls, self.partial = network, depth, 0, 0
        self.saved: list[tuple[Tensor, Tensor, float]] = []  # x before block L-k, x behind block k-1, timestep

    def full(self, first: Tensor) -> bool:  # noqa: ARG002
        return self.calls % 2 == 0

    def enter(self, now: Tensor, t: float) -> Tensor:
        raise NotImplementedError

    def __call__(self, inputs: dict) -> Tensor:
        t = float(inputs["timestep"][0])
        inputs = inputs | {"timestep": inputs["timestep"].to(inputs["hidden_states"].dtype)}
        blocks, originals = self.network.blocks, [block.forward for block in self.network.blocks]
        count = len(blocks)

        def everything(x: Tensor, **kwargs: object) -> Tensor:
            kwargs.pop("skip", None)
            skips, full, now = {}, True, x
            for i in range(count):
                if i == self.k:
                    now = x
                if i == count - self.k:
                    if full:
                        self.saved.append((x, now, t))
                    else:
                        x = self.enter(now, t)
                if not full and self.k <= i < count - self.k:
                    continue
                x = originals[i](x, skip=skips[count - 1 - i] if i > count // 2 else None, **kwargs)
                skips[i] = x
                if i == 0:
                    full = self.full(x)
                    self.partial += not full
            return x

        for i, block in enumerate(blocks):
            block.forward = everything if i == 0 else lambda x, **_: x
        try:
            output = self.network(**inputs)[0]
        finally:
            for block in blocks:
                del block.forward
        self.calls += 1
        return output


class OffsetLoop(Loop):
    def full(self, first: Tensor) -> bool:  # noqa: ARG002
        return self.calls % 3 == 0

    def enter(self, now: Tensor, t: float) -> Tensor:  # noqa: ARG002
        cached, then, _ = self.saved[-1]
        return now + (cached - then)


class ForecastLoop(Loop):
    def enter(self, now: Tensor, t: float) -> Tensor:  # noqa: ARG002
        if len(self.saved) == 1:
            return self.saved[-1][0]
        (earlier, _, when), (last, _, at) = self.saved[-2:]
        return last + (last - earlier) * (t - at) / (at - when)


class DriftLoop(Loop):
    then = None

    def full(self, first: Tensor) -> bool:
        if self.then is not None:
            moved = ((first - self.then).abs().sum((1, 2)) / first.abs().sum((1, 2))).mean()
        if self.then is None or moved > LIMIT or self.calls % 5 == 0:
            self.then = first
            return True
        return False

    def enter(self, now: Tensor, t: float) -> Tensor:  # noqa: ARG002
        return self.saved[-1][0]


@pytest.mark.parametrize(
    ("method", "loop"),
    [(OFFSET, OffsetLoop), (FORECAST, ForecastLoop), (SkipDrift(LIMIT, longest=5), DriftLoop)],
    ids=["offset", "forecast", "drift"],
)
def test_a_naive_loop_agrees(method, loop):
    pipe = build(CASE)
    start = naive.opening(CASE, pipe, steps=12, prompts=2)
    reference = loop(pipe.transformer, method.depth)
    expected = naive.plain(pipe.transformer, start, lambda _, inputs: reference(inputs))
    with attach(pipe, method) as attachment:
        latents = run(CASE, pipe, steps=12, prompts=2)
    assert 3 < reference.partial < 11
    assert (latents - expected).norm() / expected.norm() < 1e-5
    if loop is DriftLoop:
        row = attachment.trace.row("blocks.3")
        assert row.count(".") == reference.partial
        assert row != attachment.plan.row("blocks.3") == "#....#....#."
        assert f"of 9 steps drifted by more than {LIMIT}" in str(attachment.trace)
        counted = attachment.trace.cost.macs.all
        assert attachment.plan.cost.macs.all < counted < attachment.plan.cost.baseline.all


def latents_with(method: whenwhere.Method) -> Tensor:
    pipe = build(CASE)
    with attach(pipe, method):
        return run(CASE, pipe, steps=STEPS)


def test_a_forecast_without_strength_and_a_drift_without_threshold_are_skip_cache():
    expected = latents_with(SkipCache(interval=2, depth=2, **ALWAYS))
    assert torch.equal(latents_with(SkipForecast(interval=2, depth=2, strength=0, **ALWAYS)), expected)
    assert torch.equal(latents_with(SkipDrift(float("inf"), longest=2, depth=2)), expected)


def test_an_offset_at_all_timesteps_is_the_middle_mode_of_delta_dit():
    expected = latents_with(DeltaDiT(interval=2, blocks=2, mode="middle"))
    assert torch.equal(latents_with(SkipOffset(interval=2, depth=2, **ALWAYS)), expected)


def test_no_drift_is_allowed_by_a_threshold_of_zero():
    pipe = build(CASE)
    with attach(pipe, SkipDrift(threshold=0, longest=100)) as attachment:
        latents = run(CASE, pipe, steps=STEPS)
    assert torch.equal(latents, laws.plain(CASE))
    assert attachment.trace.row("blocks.2") == "#" * STEPS


# -- our own networks, refusals --------------------------------------------------------------------------------------


def skip_dit(**config: object) -> DiTPipeline:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    pipe = DiTPipeline(transformer=dit(6, **config), vae=randomised(AutoencoderKL(**VAE)), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("method", [OFFSET, FORECAST, DRIFT], ids=lambda m: type(m).__name__)
def test_skip_dit_is_served(method):
    pipe = skip_dit()

    def images() -> Tensor:
        return pipe([1, 2], num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="pt").images

    plain = images()
    with attach(pipe, method, guidance=True) as attachment:
        assert not torch.equal(images(), plain)
    assert attachment.trace.cost.macs.all < attachment.trace.cost.baseline.all
    assert torch.equal(images(), plain)


def test_an_offset_needs_one_stream():
    model = latte(TEXT, 6)
    whenwhere.plan(model, FORECAST, steps=4, scheduler=ddim(4))
    with pytest.raises(ValueError, match=r"take turns\. SkipCache and SkipForecast work"):
        whenwhere.plan(model, SkipOffset(), steps=4, scheduler=ddim(4))


@pytest.mark.parametrize("kind", [SkipCache, SkipOffset, SkipForecast, SkipDrift])
def test_more_depth_than_skips_is_refused(kind):
    pipe = skip_dit(skip_pairs=1)
    attach(pipe, kind(depth=1), guidance=True).detach()
    with pytest.raises(ValueError, match="joins only the outermost 1 pairs of blocks: depth is 1 to 1"):
        attach(pipe, kind(depth=2), guidance=True)


@pytest.mark.parametrize(
    ("kind", "fields", "error", "words"),
    [
        (SkipOffset, {"interval": 0}, ValueError, "interval must be at least 1"),
        (SkipForecast, {"strength": -1.0}, ValueError, "strength must be at least 0, got -1.0"),
        (SkipForecast, {"start_timestep": "700"}, TypeError, "start_timestep must be a number"),
        (SkipDrift, {"threshold": -0.1}, ValueError, "threshold must be at least 0, got -0.1"),
        (SkipDrift, {"threshold": "0.1"}, TypeError, "threshold must be a number"),
        (SkipDrift, {"longest": 0}, ValueError, "longest must be at least 1"),
    ],
)
def test_fields_out_of_range_are_refused(kind, fields, error, words):
    with pytest.raises(error, match=words):
        kind(**fields)
