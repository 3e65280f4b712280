"""Caches of diffusers attached like any method: what they did is traced, and nothing of them stays."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, HookRegistry, MagCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import ModelHook, TaylorSeerCacheConfig
from interruptions import INTERRUPTIONS
from laws import attributes
from naive import denoiser
from pipelines import build, run

from whenwhere import GuidanceStop, TGate, Upstream, attach, plan
from whenwhere.expression import parse, write
from whenwhere.pricing.cost import count

FIRST = FirstBlockCacheConfig(threshold=0.8)
BROADCAST = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3)
TAYLOR = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1)
MAGNITUDE = MagCacheConfig(num_inference_steps=6, mag_ratios=torch.ones(6))
LITE = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, use_lite_mode=True)

FITTING = [
    *[(FIRST, name) for name in ("pixart-sigma", "dit", "flux", "flux-true-cfg")],
    *[(BROADCAST, name) for name in ("sd", "pixart-sigma", "dit", "hunyuan-dit", "latte", "sd3", "flux")],
    *[(TAYLOR, name) for name in ("sd3", "flux", "flux-true-cfg")],
    *[(MAGNITUDE, name) for name in ("pixart-sigma", "dit", "sd3", "flux")],
]


def label(value):
    return value if isinstance(value, str) else type(value).__name__


def attached(name, pipe, *methods):
    return attach(pipe, *methods, guidance=True if name == "dit" else None)


@pytest.mark.parametrize(("config", "name"), FITTING, ids=label)
def test_the_trace_shows_what_ran_and_nothing_stays(config, name):
    pipe = build(name)
    plain = run(name, pipe)
    before = attributes(pipe)
    with attached(name, pipe, Upstream(config)) as attachment:
        latents, counted = count(lambda: run(name, pipe), denoiser(name, pipe))
        again = run(name, pipe)
        trace = attachment.trace
    assert not torch.equal(latents, plain)
    assert torch.equal(latents, again)
    assert "." in "".join(trace.rows)
    assert trace.cost.macs == counted
    assert trace.cost.macs.all < trace.cost.baseline.all
    assert attributes(pipe) == before
    assert torch.equal(run(name, pipe), plain)


@pytest.mark.parametrize("name", ["flux", "pixart-sigma"])
def test_a_threshold_of_zero_is_the_plain_run_and_says_so(name):
    pipe = build(name)
    plain = run(name, pipe)
    with attach(pipe, Upstream(FirstBlockCacheConfig(threshold=0.0))), pytest.warns(UserWarning, match="changed noth"):
        assert torch.equal(run(name, pipe), plain)


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_a_generation_after_an_interrupted_one_is_clean(interruption):
    """diffusers alone leaves the state of a generation that was cut short to the next one."""
    pipe = build("flux")
    with attach(pipe, Upstream(FIRST)):
        expected = run("flux", pipe)
        INTERRUPTIONS[interruption]("flux", pipe)
        assert torch.equal(run("flux", pipe), expected)


def test_a_batch_that_shrinks_makes_it_forget():
    pipe = build("pixart-sigma")
    with attach(pipe, Upstream(FIRST), GuidanceStop(3)) as attachment:
        assert run("pixart-sigma", pipe, prompts=2).isfinite().all()
        assert attachment.trace.row("transformer_blocks.1")[3] == "#"


def test_t_gate_finds_all_cross_attention_computed_at_its_gate():
    pipe = build("pixart-sigma")
    with attach(pipe, TGate(4, sp_interval=1), Upstream(FirstBlockCacheConfig(threshold=9.0))) as attachment:
        run("pixart-sigma", pipe)
        assert attachment.trace.row("transformer_blocks.3") == "#..##."


# Silent upstream, or refused: (configuration, pipeline, what is said)
REFUSED = [
    (TAYLOR, "sd", "attaches nothing to UNet2DConditionModel, and diffusers says nothing"),
    (TAYLOR, "pixart-sigma", "attaches nothing to PixArtTransformer2DModel"),
    (TAYLOR, "dit", "attaches nothing to DiTTransformer2DModel"),
    (TAYLOR, "hunyuan-dit", "attaches nothing to HunyuanDiT2DModel"),
    (TAYLOR, "latte", "attaches nothing to LatteTransformer3DModel"),
    (MAGNITUDE, "sd", "attaches nothing to UNet2DConditionModel"),
    (FIRST, "sd", "does not fit UNet2DConditionModel, says diffusers"),
    (FIRST, "sd3", "FirstBlockCacheConfig fails on SD3Transformer2DModel in diffusers: its last block"),
    (FIRST, "latte", "FirstBlockCacheConfig fails on LatteTransformer3DModel .* take turns"),
    (MAGNITUDE, "latte", "MagCacheConfig fails on LatteTransformer3DModel .* take turns"),
    (FIRST, "hunyuan-dit", "does not fit HunyuanDiT2DModel, says diffusers"),
]


@pytest.mark.parametrize(("config", "name", "message"), REFUSED, ids=label)
def test_what_attaches_nothing_is_refused_and_leaves_nothing(config, name, message):
    pipe = build(name)
    before = attributes(pipe)
    with pytest.raises(ValueError, match=message):
        attach(pipe, Upstream(config))
    assert attributes(pipe) == before


def test_hooks_of_others_stay():
    class Doubling(ModelHook):
        def post_forward(self, module, output):  # noqa: ARG002
            return 2 * output

    pipe = build("pixart-sigma")
    block = pipe.transformer.transformer_blocks[1].attn1
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Doubling(), "doubling")
    doubled = run("pixart-sigma", pipe)
    with attach(pipe, Upstream(BROADCAST)):
        run("pixart-sigma", pipe)
    assert list(block._diffusers_hook.hooks) == ["doubling"]
    assert torch.equal(run("pixart-sigma", pipe), doubled)


def test_a_plan_says_that_it_cannot_know():
    made = plan(build("flux"), Upstream(FIRST), steps=6, guidance=False)
    assert set("".join(made.rows)) == {"#"}
    assert made.remarks == (
        "Upstream: FirstBlockCacheConfig decides while it runs; drawn is the most that is computed",
    )


def test_steps_that_were_told_must_be_those_that_are_executed():
    pipe = build("flux")
    with (
        attach(pipe, Upstream(MAGNITUDE)),
        pytest.raises(ValueError, match="num_inference_steps=6, but 7 are executed"),
    ):
        run("flux", pipe, steps=7)


def test_it_is_written_in_an_expression():
    (method,) = parse("upstream(FirstBlockCacheConfig(threshold=0.2))")
    assert method == Upstream(FirstBlockCacheConfig(threshold=0.2))
    assert parse(write((method,))) == (method,)
    assert parse("upstream(firstblockcache(threshold=0.2))") == (method,)


def test_something_else_is_refused():
    with pytest.raises(TypeError, match=r"config must be one of diffusers' FirstBlockCacheConfig, .*; got float"):
        Upstream(0.2)
