"""FORA: the grid of full steps, what is kept, the laws, a naive loop, and the published costs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count

import laws
import pytest
import torch
from laws import Setting
from pipelines import build, run
from torch import Tensor, nn

import whenwhere
from whenwhere import FORA, attach
from whenwhere.clock import Step
from whenwhere.pricing.cost import Macs

FAMILIES = ("dit", "pixart-alpha", "hunyuan-dit", "latte", "sd35", "flux-true-cfg", "sd")

SETTING = Setting("FORA", (FORA(2),), neutral=lambda _: (FORA(interval=1),), refused={}, refused_later={})
LAWS = (
    laws.accepted_or_refused,
    laws.neutral_is_exact,
    laws.nothing_left,
    laws.generations_are_independent,
    laws.plan_tells_the_truth,
    laws.cost_is_what_was_promised,
    laws.batch_equals_its_prompts,
)


@pytest.fixture(scope="module")
def dit():
    return build("dit")


@cache
def per_step() -> tuple[Macs, Macs]:
    """What a full and a cached step of DiT-XL/2 with guidance cost."""
    cost = whenwhere.plan("dit-xl-2-256", FORA(2, "start"), steps=4).cost
    full = cost.baseline.times(1 / 4)
    return full, (cost.macs - full - full).times(1 / 2)


def full_steps(method: FORA, steps: int) -> list[int]:
    return [s for s in range(steps) if method.full(Step(s, steps))]


def share(method: FORA, steps: int) -> float:
    """Of the multiply-adds of the plain run."""
    full, cached = (macs.all for macs in per_step())
    fresh = len(full_steps(method, steps))
    return (fresh * full + (steps - fresh) * cached) / (steps * full)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_laws_hold(law, case):
    law(SETTING, case)


# -- the schedule ----------------------------------------------------------------------------------------------------


def test_the_grid_is_anchored_at_the_last_step_as_in_the_authors_code():
    assert full_steps(FORA(interval=3), 50) == [49 - i for i in (49, *range(48, -1, -3))]


@pytest.mark.parametrize(("steps", "interval", "full"), [(50, 3, 18), (250, 3, 84), (250, 4, 64), (50, 2, 26)])
def test_as_many_steps_are_full_as_in_the_authors_code(steps, interval, full):
    assert len(full_steps(FORA(interval), steps)) == full


def test_the_plan_is_that_grid(dit):
    row = whenwhere.plan(dit, FORA(interval=3), steps=8).row("transformer_blocks.0.attn1")
    assert row == "##..#..#"


def test_the_grid_may_be_anchored_at_the_first_step():
    assert full_steps(FORA(interval=3, anchor="start"), 10) == [0, 3, 6, 9]


@pytest.mark.parametrize("anchor", ["end", "start"])
def test_outside_of_the_window_everything_is_computed(anchor):
    assert full_steps(FORA(interval=100, anchor=anchor, start_step=4, end_step=7), 200)[:5] == [0, 1, 2, 3, 7]
    assert full_steps(FORA(interval=2, start_step=10, end_step=10), 10) == list(range(10))


def test_only_the_chosen_branches_and_blocks_are_reused():
    table = whenwhere.plan(build("pixart-alpha"), FORA(2, branches=("cross-attention", "mlp"), blocks=(1, 3)), steps=6)
    assert {site.kind for site in table.sites} == {"model", "cross-attention", "mlp"}
    assert {site.path.split(".")[1] for site in table.sites if site.path} == {"1", "3"}


def test_a_block_of_latte_is_one_over_space_and_one_over_time():
    table = whenwhere.plan(build("latte"), FORA(2, blocks=(1,)), steps=6)
    blocks = {site.path.rsplit(".", 1)[0] for site in table.sites if site.path}
    assert blocks == {"transformer_blocks.1", "temporal_transformer_blocks.1"}


# -- what a step computes --------------------------------------------------------------------------------------------


@contextmanager
def naive(network: nn.Module, full: list[int]) -> Iterator[None]:
    """Blocks of DiT written down as in the paper: outputs are stored before the gates, the gates are always fresh."""
    step = count()
    now = {}

    def block_forward(block: nn.Module):
        stored: dict[str, Tensor] = {}

        def forward(x: Tensor, *, timestep: Tensor, class_labels: Tensor, **_: object) -> Tensor:
            modulated, gate_a, shift, scale, gate_m = block.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
            if now["full"]:
                stored["a"] = block.attn1(modulated)
            x = x + gate_a.unsqueeze(1) * stored["a"]
            if now["full"]:
                stored["m"] = block.ff(block.norm3(x) * (1 + scale[:, None]) + shift[:, None])
            return x + gate_m.unsqueeze(1) * stored["m"]

        return forward

    handle = network.register_forward_pre_hook(lambda *_: now.update(full=next(step) in full))
    for block in network.transformer_blocks:
        block.forward = block_forward(block)
    yield
    handle.remove()
    for block in network.transformer_blocks:
        del block.forward


@pytest.mark.parametrize(
    ("method", "full"),
    [
        (FORA(interval=3), [0, 1, 4, 7]),
        (FORA(interval=3, anchor="start"), [0, 3, 6]),
        (FORA(interval=4, start_step=3), [0, 1, 2, 3, 7]),
    ],
)
def test_a_naive_loop_agrees(method, full):
    pipe = build("dit")
    with naive(pipe.transformer, full):
        expected = run("dit", pipe, steps=8, prompts=2)
    with attach(pipe, method, guidance=True):
        latents = run("dit", pipe, steps=8, prompts=2)
    assert (latents - expected).norm() / expected.norm() < 1e-6


@contextmanager
def naive_flux(network: nn.Module, full: list[int]) -> Iterator[None]:
    """Parts of double blocks, and the one branch of single blocks, are stored as they come out of their modules."""
    step = count()
    now = {}

    def stored(module: nn.Module):
        own, kept = module.forward, {}

        def forward(*args: object, **kwargs: object) -> object:
            if now["full"]:
                kept["output"] = own(*args, **kwargs)
            return kept["output"]

        return forward

    def single(block: nn.Module):
        kept = {}

        def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb, **_: object):
            x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            modulated, gate = block.norm(x, emb=temb)
            if now["full"]:
                a = block.attn(hidden_states=modulated, image_rotary_emb=image_rotary_emb)
                m = torch.nn.functional.gelu(block.proj_mlp(modulated), approximate="tanh")
                kept["branch"] = block.proj_out(torch.cat([a, m], dim=2))
            x = x + gate.unsqueeze(1) * kept["branch"]
            return x.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)

        return forward

    handle = network.register_forward_pre_hook(lambda *_: now.update(full=next(step) in full))
    parts = [part for block in network.transformer_blocks for part in (block.attn, block.ff, block.ff_context)]
    for part in parts:
        part.forward = stored(part)
    for block in network.single_transformer_blocks:
        block.forward = single(block)
    yield
    handle.remove()
    for module in (*parts, *network.single_transformer_blocks):
        del module.forward


def test_a_naive_loop_agrees_where_attention_and_mlp_share_a_branch():
    pipe = build("flux")
    with naive_flux(pipe.transformer, [0, 1, 4, 7]):
        expected = run("flux", pipe, steps=8, prompts=2)
    with attach(pipe, FORA(interval=3)) as attachment:
        latents = run("flux", pipe, steps=8, prompts=2)
    assert (latents - expected).norm() / expected.norm() < 1e-6
    assert attachment.trace.row("single_transformer_blocks.0.proj_out") == "##..#..#"


def test_a_shared_branch_is_reused_only_where_both_its_parts_are():
    table = whenwhere.plan(build("flux"), FORA(2, branches=("joint-attention",)), steps=6)
    assert {site.kind for site in table.sites} == {"model", "joint-attention"}


def test_modules_run_at_full_steps_only():
    pipe, calls = build("pixart-sigma"), []
    for block in pipe.transformer.transformer_blocks:
        for module in (block.attn1.to_q, block.attn2.to_q, block.ff.net[0]):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    with attach(pipe, FORA(interval=3)):
        run("pixart-sigma", pipe, steps=9)
    assert len(calls) == 4 * 3 * 4  # steps 0, 2, 5, 8; three branches in four blocks


# -- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "interval", "tera_flops", "speedup"), [(50, 3, 8.57, 2.77), (250, 3, 40.0, 2.97), (250, 4, 30.5, 3.89)]
)
def test_dit_costs_what_two_flops_per_multiply_add_say(steps, interval, tera_flops, speedup):
    spent = share(FORA(interval), steps)
    assert 2 * spent * steps * per_step()[0].all / 1e12 == pytest.approx(tera_flops, rel=4e-3)
    assert 1 / spent == pytest.approx(speedup, abs=0.015)


# SmoothCache (https://arxiv.org/abs/2411.10510), Table 1: TMACs of FORA on DiT-XL/2 with 30, 50 and 70 DDIM steps. Only
# the ratios can be compared; they are those of the grid anchored at the end.
@pytest.mark.parametrize(
    ("steps", "interval", "published"),
    [
        (30, 2, 117.08 / 219.36),
        (50, 2, 190.25 / 365.59),
        (50, 3, 131.81 / 365.59),
        (70, 2, 263.43 / 511.83),
        (70, 3, 175.77 / 511.83),
    ],
)
def test_the_ratios_of_smoothcaches_table_are_those_of_the_end_anchor(steps, interval, published):
    assert share(FORA(interval), steps) == pytest.approx(published, abs=2e-3)
    anchors = [full_steps(FORA(interval, anchor), steps) for anchor in ("end", "start")]
    if len(anchors[0]) != len(anchors[1]):
        assert abs(share(FORA(interval, "start"), steps) - published) > 0.01


def test_memory_holds_two_tensors_per_block_and_a_third_where_there_is_text():
    rows, tokens, width, half = 2, 256, 1152, 2
    assert whenwhere.plan("dit-xl-2-256", FORA(), steps=50).cost.bytes == 2 * 28 * rows * tokens * width * half
    assert whenwhere.plan("pixart-alpha-1024", FORA(), steps=20).cost.bytes == 3 * 28 * rows * 4096 * width * half


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"interval": 0}, ValueError, "interval must be at least 1, got 0"),
        ({"interval": 2.5}, TypeError, "interval must be a whole number"),
        ({"interval": "0.95"}, TypeError, "interval must be a whole number"),
        ({"anchor": "middle"}, ValueError, "anchor must be one of 'end', 'start'; got 'middle'"),
        ({"branches": ("boost_infer",)}, ValueError, "branches must be one of"),
        ({"branches": ()}, ValueError, "at least one kind"),
        ({"blocks": (-1,)}, ValueError, r"blocks\[0\] must be at least 0"),
        ({"start_step": -1}, ValueError, "start_step must be at least 0"),
        ({"start_step": 5, "end_step": 4}, ValueError, "end_step must be at least 5"),
    ],
)
def test_fields_out_of_range_are_refused(fields, error, words):
    with pytest.raises(error, match=words):
        FORA(**fields)


def test_blocks_branches_and_windows_that_do_not_exist_are_refused(dit):
    with pytest.raises(ValueError, match="has the blocks 0 to 3"):
        attach(dit, FORA(blocks=(4,)))
    with pytest.raises(ValueError, match="has none of these"):
        attach(dit, FORA(branches=("cross-attention",)))
    with pytest.raises(ValueError, match="ends its window at step 60; only 50"):
        whenwhere.plan(dit, FORA(end_step=60), steps=50)
    with pytest.raises(ValueError, match="begins its window at step 60; only 50 are executed"):
        whenwhere.plan(dit, FORA(start_step=60), steps=50)
    assert set(whenwhere.plan(dit, FORA(start_step=50), steps=50).row("transformer_blocks.0.ff")) == {"#"}


def test_less_than_two_intervals_are_doubted(dit):
    with pytest.warns(UserWarning, match="5 steps are less than two intervals"):
        whenwhere.plan(dit, FORA(interval=3), steps=5)


def test_a_batch_that_changes_in_the_middle_starts_anew():
    """A callback that drops guidance halves the batch: what was kept of both halves is not used for one."""
    pipe = build("sd3")

    def drop_guidance(pipe, step, _, inputs):
        if step == 2:
            pipe._guidance_scale = 1.0
            inputs = {name: value.chunk(2)[-1] for name, value in inputs.items() if "embeds" in name}
        return inputs

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    with attach(pipe, FORA(interval=8, anchor="start")) as attachment, pytest.warns(UserWarning, match="two intervals"):
        run("sd3", pipe, steps=6, callback=drop_guidance, callback_on_step_end_tensor_inputs=names)
    assert attachment.trace.row("transformer_blocks.0.attn") == "#..#.."
    assert torch.isfinite(run("sd3", pipe)).all()
