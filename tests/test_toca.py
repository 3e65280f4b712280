"""ToCa: its schedules, its choice of tokens against a naive loop, its cost, what it refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count as counter
from math import floor

import pytest
import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from pipelines import build, run
from test_tokens import attention_map
from torch import Tensor, nn

import whenwhere
from whenwhere import FORA, ToCa, attach
from whenwhere.methods.toca import SCHEDULES, Schedule
from whenwhere.pricing.cost import Macs, count

PIXART = {"fresh_ratio": 0.3, "score": "cross_attention", "schedule": "pixart"}


def distance(latents: Tensor, reference: Tensor) -> float:
    return float((latents - reference).norm() / reference.norm())


# -- which steps are full ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps", "interval", "full"),
    [("dit-ddim", 50, 3, 18), ("dit-ddim", 50, 4, 14), ("dit-ddim", 50, 5, 11), ("dit-ddpm", 250, 4, 72)],
)
def test_as_many_steps_are_full_as_in_the_authors_code(schedule, steps, interval, full):
    assert len(ToCa(interval, schedule=schedule).full_steps(steps)) == full


def test_the_full_steps_of_pixart_are_those_of_the_authors_code():
    assert ToCa(3, **PIXART).full_steps(20) == (0, 6, 9, 12, 15, 18)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 250])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_step_is_full_and_where_steps_count_down_also_the_last(schedule, steps):
    full = ToCa(4, schedule=schedule).full_steps(steps)
    assert full[0] == 0
    assert full[-1] == steps - 1 or not SCHEDULES[schedule].counts_down


def test_the_printed_plan_is_the_published_schedule():
    table = str(whenwhere.plan("dit-xl-2-256", ToCa(), steps=50)).split("\n\n")[0]
    assert (
        table
        == """\
model               ##################################################
self-attention x28  #....#...#...#.....#..#..#..#..#.#.#.#.#.#.#.#.#.#
mlp x28             #....#...#..o#ooooo#oo#oo#oo#oo#o#o#o#o#o#o#o#o#o#"""
    )


# -- how much is refreshed --------------------------------------------------------------------------------------------


# The factors of the published settings: over the run at s / T, over the depth at l / 27, and of the module.
FACTORS = {
    "dit-ddim": (lambda p: 3 - 4 * p, lambda q: 0.8 + 0.4 * q, 0.0, 2.5),
    "dit-ddpm": (lambda p: 1.4 - 0.8 * p, lambda q: 1.8 - 1.6 * q, 0.0, 2.5),
    "pixart": (lambda p: 1.9 - 1.8 * p, lambda q: 1.6 - 1.2 * q, 0.6, 1.6),
}


@pytest.mark.parametrize("name", FACTORS)
def test_shares_are_the_products_of_the_published_factors(name):
    over_run, over_depth, cross, mlp = FACTORS[name]
    method = ToCa(3, 0.2, schedule=name)
    architecture = "pixart-alpha-1024" if name == "pixart" else "dit-xl-2-256"
    sites = [site for site in whenwhere.plan(architecture, method, steps=40).sites if site.path]
    for site in sites:
        factor = {"cross-attention": cross, "mlp": mlp}.get(site.kind, 0.0)
        for index in (0, 7, 20, 39):
            s = index if name == "pixart" else 39 - index
            expected = 0.2 * over_run(s / 40) * over_depth(site.block / 27) * factor
            share = method.share(site, whenwhere.clock.Step(index, 40))
            assert share == pytest.approx(min(max(expected, 0), 1), abs=1e-12)


def test_without_fresh_tokens_it_is_fora_bit_for_bit():
    for name, schedule, anchor in (("dit", "dit-ddim", "end"), ("pixart-alpha", "pixart", "start")):
        pipe = build(name)
        with attach(pipe, FORA(3, anchor), guidance=True) as fora:
            expected = run(name, pipe, steps=8)
        with attach(pipe, ToCa(3, 0.0, schedule=schedule), guidance=True) as toca:
            assert torch.equal(run(name, pipe, steps=8), expected)
        assert toca.trace.rows == fora.trace.rows
        assert toca.trace.cost == fora.trace.cost


@pytest.mark.parametrize(("name", "fields"), [("dit", {}), ("pixart-sigma", PIXART)])
def test_an_interval_of_one_is_the_plain_run_bit_for_bit(name, fields):
    pipe = build(name)
    plain = run(name, pipe, steps=7)
    with attach(pipe, ToCa(1, **fields), guidance=True), pytest.warns(UserWarning, match="every step is a full one"):
        assert torch.equal(run(name, pipe, steps=7), plain)
    assert torch.equal(run(name, pipe, steps=7), plain)


def test_all_tokens_refreshed_everywhere_leave_only_attention_stale():
    """With every token of the MLP computed anew, only attention outputs are reused."""
    everything = Schedule(False, 0.0, 0.0, 0.0, 1.0, 0.0, (), 0.6, 2, shared=False)
    pipe = build("dit")
    with attach(pipe, FORA(3, "start", branches=("self-attention",)), guidance=True):
        expected = run("dit", pipe, steps=7)
    with attach(pipe, ToCa(3, 1.0, schedule=everything), guidance=True):
        assert distance(run("dit", pipe, steps=7), expected) < 1e-6


# -- a naive loop -----------------------------------------------------------------------------------------------------


class Naive:
    """The refreshing of one module of one block, counters and all, as the paper has it."""

    def __init__(self, method: ToCa, bonus: float, cell: int) -> None:
        self.method, self.bonus, self.cell = method, bonus, cell

    def full(self, output: Tensor) -> Tensor:
        self.cached, self.c = output.clone(), torch.zeros(output.shape[:2])
        return output

    def partial(self, x: Tensor, base: Tensor, ratio: float, module) -> Tensor:
        rows, n, _ = x.shape
        k, side = floor(ratio * n), int(n**0.5)
        scores = base + self.method.frequency_weight * self.c / self.method.interval
        for row in scores:
            for top in range(0, side, self.cell):
                for left in range(0, side, self.cell):
                    cell = [i * side + j for i in range(top, top + self.cell) for j in range(left, left + self.cell)]
                    row[max(cell, key=lambda i: row[i])] *= 1 + self.bonus
        self.c += 1
        if k:
            chosen = [sorted(range(n), key=lambda i: -scores[r, i])[:k] for r in range(rows)]
            fresh = module(torch.stack([x[r, chosen[r]] for r in range(rows)]))
            for r in range(rows):
                self.cached[r, chosen[r]] = fresh[r]
                self.c[r, chosen[r]] = 0
        return self.cached.clone()


@contextmanager
def naive_dit(network: nn.Module, method: ToCa, steps: int) -> Iterator[None]:
    """Blocks of DiT written down, with s1, s3 and s4."""
    step, now, full = counter(), {}, method.full_steps(steps)
    last = len(network.transformer_blocks) - 1

    def forward_of(block: nn.Module, number: int):
        state, mlp = {}, Naive(method, 0.6, 2)

        def forward(x: Tensor, *, timestep: Tensor, class_labels: Tensor, **_: object) -> Tensor:
            modulated, gate_a, shift, scale, gate_m = block.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
            i, s = now["i"], steps - 1 - now["i"]
            if i in full:
                state["a"], attn = block.attn1(modulated), block.attn1
                columns = attention_map(attn.to_q(modulated), attn.to_k(modulated), attn.heads).sum(1)
                state["s1"] = columns / columns.norm(dim=1, keepdim=True)
            x = x + gate_a[:, None] * state["a"]
            modulated = block.norm3(x) * (1 + scale[:, None]) + shift[:, None]
            if i in full:
                m = mlp.full(block.ff(modulated))
            else:
                ratio = method.fresh_ratio * (3 - 4 * s / steps) * (0.8 + 0.4 * number / last) * 2.5
                m = mlp.partial(modulated, state["s1"], min(max(ratio, 0), 1), block.ff)
            return x + gate_m[:, None] * m

        return forward

    with rewritten(network, forward_of, step, now):
        yield


@contextmanager
def naive_pixart(network: nn.Module, method: ToCa, steps: int) -> Iterator[None]:
    """Blocks of PixArt written down, with s2 averaged over the halves, s3 and s4."""
    step, now, full = counter(), {}, method.full_steps(steps)
    last = len(network.transformer_blocks) - 1

    def forward_of(block: nn.Module, number: int):
        state, mlp, cross = {}, Naive(method, 0.4, 4), Naive(method, 0.4, 4)

        def forward(x, *, encoder_hidden_states, encoder_attention_mask, timestep, **_):
            text, mask = encoder_hidden_states, encoder_attention_mask
            parts = (block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)).chunk(6, 1)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
            i = now["i"]
            ratio = method.fresh_ratio * (1.9 - 1.8 * i / steps) * (1.6 - 1.2 * number / last)
            if i in full:
                state["a"], attn = block.attn1(block.norm1(x) * (1 + scale_a) + shift_a), block.attn2
            x = x + gate_a * state["a"]
            if i in full:
                added = cross.full(attn(x, encoder_hidden_states=text, attention_mask=mask))
                p = attention_map(attn.to_q(x), attn.to_k(text), attn.heads, mask)
                p = sum(p.chunk(2)) / 2
                entropy = 1 - (p * (p + 1e-7).log()).sum(-1)
                state["s2"] = torch.cat([entropy / entropy.norm(dim=1, keepdim=True)] * 2)
            else:
                run = lambda tokens: block.attn2(tokens, encoder_hidden_states=text, attention_mask=mask)  # noqa: E731
                added = cross.partial(x, state["s2"], min(ratio * 0.6, 1), run)
            x = x + added
            modulated = block.norm2(x) * (1 + scale_m) + shift_m
            if i in full:
                m = mlp.full(block.ff(modulated))
            else:
                m = mlp.partial(modulated, state["s2"], min(ratio * 1.6, 1), block.ff)
            return x + gate_m * m

        return forward

    with rewritten(network, forward_of, step, now):
        yield


@contextmanager
def rewritten(network: nn.Module, forward_of, step: Iterator[int], now: dict[str, int]) -> Iterator[None]:
    handle = network.register_forward_pre_hook(lambda *_: now.update(i=next(step)))
    for number, block in enumerate(network.transformer_blocks):
        block.forward = forward_of(block, number)
    yield
    handle.remove()
    for block in network.transformer_blocks:
        del block.forward


NAIVE = {"dit": (naive_dit, {"fresh_ratio": 0.15}), "pixart-alpha": (naive_pixart, PIXART)}


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("interval", [2, 3, 4])
@pytest.mark.parametrize("name", NAIVE)
def test_a_naive_loop_agrees(name, interval, prompts):
    naive, fields = NAIVE[name]
    pipe, method = build(name), ToCa(interval, **fields)
    with naive(pipe.transformer, method, 9):
        expected = run(name, pipe, steps=9, prompts=prompts)
    with attach(pipe, method, guidance=True) as attachment:
        latents = run(name, pipe, steps=9, prompts=prompts)
    assert distance(latents, expected) < 1e-6
    assert "o" in attachment.trace.row("transformer_blocks.3.ff")


def test_each_token_counts_on_its_own_in_the_dit_schedule_and_together_in_that_of_pixart(monkeypatch):
    """Guidance branches choose different tokens or the same."""
    chosen = []
    original = whenwhere.decisions.refresh.highest
    monkeypatch.setattr(
        whenwhere.decisions.refresh, "highest", lambda *given: chosen.append(original(*given)) or chosen[-1]
    )
    for name, fields, together in (("dit", {"fresh_ratio": 0.2}, False), ("pixart-alpha", PIXART, True)):
        pipe = build(name)
        with attach(pipe, ToCa(3, **fields), guidance=True):
            run(name, pipe, steps=9)
        halves = [index.chunk(2) for index in chosen]
        assert all(torch.equal(*half) for half in halves) == together
        chosen.clear()


# -- the laws ---------------------------------------------------------------------------------------------------------


COMBINATIONS = [
    ("dit", {"score": score, "schedule": schedule, "fresh_ratio": 0.2})
    for score, schedule in [
        ("attention", "dit-ddim"),
        ("key_norm", "dit-ddpm"),
        ("value_norm", "dit-ddim"),
        ("norm", "dit-ddim"),
        ("random", "dit-ddpm"),
    ]
]
COMBINATIONS += [("pixart-alpha", PIXART), ("pixart-sigma", PIXART | {"score": "attention"})]
COMBINATIONS += [("pixart-alpha-sized", PIXART | {"score": "key_norm"})]


@pytest.mark.parametrize(("name", "fields"), COMBINATIONS, ids=str)
def test_cost_memory_and_plan_are_what_was_promised(name, fields):
    pipe, method = build(name), ToCa(3, **fields)
    _, whole = count(lambda: run(name, pipe, steps=9, prompts=2))
    with attach(pipe, method, guidance=True) as attachment:
        _, counted = count(lambda: run(name, pipe, steps=9, prompts=2))
        made, trace = attachment.plan, attachment.trace
    assert counted - made.cost.macs == whole - made.cost.baseline
    assert trace.held == made.cost.bytes
    assert trace.rows == made.rows == whenwhere.plan(pipe, method, steps=9).rows


@pytest.mark.parametrize(("name", "fields"), COMBINATIONS, ids=str)
def test_a_batch_equals_its_prompts_and_repeats_itself(name, fields):
    pipe = build(name)
    with attach(pipe, ToCa(3, **fields), guidance=True):
        alone = [run(name, pipe, steps=9, seed=seed) for seed in (0, 1, 2)]
        together = run(name, pipe, steps=9, prompts=3)
        assert distance(together, torch.cat(alone)) < 1e-5
        assert torch.equal(run(name, pipe, steps=9, prompts=3), together)


@pytest.mark.parametrize(("name", "fields"), [("dit", {}), ("pixart-alpha", PIXART)])
def test_nothing_is_left_behind(name, fields):
    pipe = build(name)
    plain = run(name, pipe)
    before = {path: sorted(vars(module)) for path, module in pipe.transformer.named_modules()}
    with attach(pipe, ToCa(2, **fields), guidance=True):
        run(name, pipe)
    assert {path: sorted(vars(module)) for path, module in pipe.transformer.named_modules()} == before
    assert not any(module._forward_hooks for module in pipe.transformer.modules())
    assert torch.equal(run(name, pipe), plain)


def test_without_guidance_scores_are_those_of_the_one_branch():
    pipe = build("pixart-alpha")
    with attach(pipe, ToCa(3, **PIXART), guidance=False) as attachment:
        run("pixart-alpha", pipe, steps=6, guidance=False)
    assert attachment.trace.held == attachment.trace.cost.bytes


# -- cost -------------------------------------------------------------------------------------------------------------


# Tera-operations with guidance at two per multiply-add. The shares round tokens down to whole ones, and the authors'
# code lets one block compute in a few steps that are not full here: hence half a per cent.
@pytest.mark.parametrize(
    ("schedule", "steps", "interval", "operations"),
    [("dit-ddim", 50, 3, 10.24), ("dit-ddim", 50, 4, 8.74), ("dit-ddpm", 250, 4, 43.5)],
)
def test_dit_costs_what_follows_from_the_schedules(schedule, steps, interval, operations):
    cost = whenwhere.plan("dit-xl-2-256", ToCa(interval, score="norm", schedule=schedule), steps=steps).cost
    assert 2 * cost.macs.all / 1e12 == pytest.approx(operations, rel=5e-3)


def test_scores_from_attention_cost_its_query_key_product_at_full_steps_and_two_numbers_a_token():
    plain = whenwhere.plan("dit-xl-2-256", ToCa(score="norm"), steps=50).cost
    scored = whenwhere.plan("dit-xl-2-256", ToCa(score="attention"), steps=50).cost
    read = 17  # full steps that some other step looks back to; the last one is not
    blocks, rows, tokens, width = 28, 2, 256, 1152
    assert scored.macs - plain.macs == Macs(read * blocks * rows * tokens * tokens * width, 0)
    assert scored.bytes - plain.bytes == blocks * rows * tokens * 4
    features = 2 * blocks * rows * tokens * width * 2
    assert scored.bytes == features + 2 * blocks * rows * tokens * 4


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"interval": 0}, ValueError, "interval must be at least 1"),
        ({"interval": 2.5}, TypeError, "interval must be a whole number"),
        ({"fresh_ratio": 1.1}, ValueError, r"fresh_ratio must be a share in \[0, 1\]"),
        ({"fresh_ratio": -0.1}, ValueError, "fresh_ratio must be a share"),
        ({"fresh_ratio": float("nan")}, ValueError, "fresh_ratio must be a share"),
        ({"score": "kv"}, ValueError, "score must be one of 'attention'"),
        ({"schedule": "ToCa"}, ValueError, "schedule must be one of 'dit-ddim'"),
        ({"frequency_weight": -1}, ValueError, "frequency_weight must be at least 0"),
        ({"grid": (4,)}, ValueError, r"grid must be \(height, width\)"),
        ({"grid": (0, 4)}, ValueError, r"grid\[0\] must be at least 1"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused(fields, error, words):
    with pytest.raises(error, match=words):
        ToCa(**fields)


@pytest.mark.parametrize("name", ["sd", "svd", "hunyuan-dit", "latte", "sd3", "sd35", "flux"])
def test_other_families_are_told_what_fits(name):
    with pytest.raises(ValueError, match=r"stacks of plain blocks, .* FORA works"):
        attach(build(name), ToCa())


def test_scores_that_a_model_cannot_tell_are_refused():
    with pytest.raises(ValueError, match="has none: score='attention' works"):
        attach(build("dit"), ToCa(score="cross_attention"))


def test_a_grid_that_does_not_fit_is_refused_at_the_first_step():
    pipe = build("dit")
    plain = run("dit", pipe)
    with attach(pipe, ToCa(grid=(3, 5)), guidance=True), pytest.raises(ValueError, match="16 tokens make no grid"):
        run("dit", pipe)
    with attach(pipe, ToCa(fresh_ratio=1.0, schedule="pixart"), guidance=True):
        run("dit", pipe, size=16)
    with (
        attach(pipe, ToCa(fresh_ratio=1.0, schedule="pixart"), guidance=True),
        pytest.raises(ValueError, match="cells of 4 x 4 do not fill a grid of 6 x 6"),
    ):
        run("dit", pipe, size=12)
    assert torch.equal(run("dit", pipe), plain)


def test_a_picture_that_is_not_square_must_name_its_grid():
    pipe = build("pixart-alpha")
    kwargs = {"steps": 6, "height": 32, "width": 8}  # 16 x 4 tokens
    fields = {"fresh_ratio": 0.3, "score": "attention"}
    with attach(pipe, ToCa(**fields)), pytest.raises(ValueError, match=r"not square; name its tokens by grid="):
        run("pixart-alpha", pipe, **kwargs)
    with attach(pipe, ToCa(**fields, grid=(16, 4))):
        assert torch.isfinite(run("pixart-alpha", pipe, **kwargs)).all()


def test_entropy_needs_to_know_whether_there_is_guidance():
    pipe = build("pixart-alpha")
    with attach(pipe, ToCa(**PIXART)), pytest.raises(RuntimeError, match="guidance=True"):
        run("pixart-alpha", pipe)


def test_fused_projections_are_named():
    pipe = build("dit")
    for block in pipe.transformer.transformer_blocks:
        block.attn1.fuse_projections()
        block.attn1.set_processor(FusedAttnProcessor2_0())
    with attach(pipe, ToCa(), guidance=True), pytest.raises(RuntimeError, match="did not run to_q, to_k"):
        run("dit", pipe)
    with attach(pipe, ToCa(score="norm"), guidance=True):
        assert torch.isfinite(run("dit", pipe)).all()
