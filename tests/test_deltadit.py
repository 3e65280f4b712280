"""Δ-DiT: runs and stages, the budget rule, the laws, naive loops, and the published costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import laws
import pytest
import torch
from diffusers import HunyuanDiT2DControlNetModel
from laws import Setting
from pipelines import CASES, build, run
from torch import Tensor, nn

import whenwhere
from whenwhere import DeltaDiT, attach
from whenwhere.methods.deltadit import blocks_for_budget

UNETS = {case for case in CASES if case.startswith(("sd-", "sdxl", "svd"))} | {"sd"}
FAMILIES = ("dit", "pixart-sigma", "latte", "sd35", "flux-true-cfg")
LAWS = (
    laws.neutral_is_exact,
    laws.nothing_left,
    laws.generations_are_independent,
    laws.plan_tells_the_truth,
    laws.cost_is_what_was_promised,
    laws.batch_equals_its_prompts,
)

SETTING = Setting(
    "Δ-DiT",
    (DeltaDiT(interval=3, boundary=3),),  # the second interval would serve both stages, were it not for the full step 3
    neutral=lambda _: (DeltaDiT(interval=1),),
    refused=dict.fromkeys(UNETS, "is a U-Net. DeepCache works")
    | dict.fromkeys(("hunyuan-dit", "skip-dit"), 'Choose mode="middle"'),
    refused_later={},
)
STRADDLING = Setting(
    "Δ-DiT, both stages in one interval",
    (DeltaDiT(interval=4, blocks=2, boundary=2),),
    neutral=lambda _: (DeltaDiT(interval=1),),
    refused={},
    refused_later={},
)
MIDDLE = Setting(
    "Δ-DiT, middle",
    (DeltaDiT(interval=2, blocks=4, mode="middle"),),
    neutral=lambda _: (DeltaDiT(interval=1, mode="middle"),),
    refused={},
    refused_later={},
)
LAWFUL = [(SETTING, case) for case in FAMILIES] + [(STRADDLING, "sd35"), (STRADDLING, "latte"), (MIDDLE, "hunyuan-dit")]


@pytest.fixture(scope="module")
def pixart():
    return build("pixart-alpha")  # four blocks


def rows(pipe: object, method: DeltaDiT, steps: int) -> list[str]:
    return list(whenwhere.plan(pipe, method, steps=steps).rows[1:])


@pytest.mark.parametrize(("setting", "case"), LAWFUL, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_laws_hold(law, setting, case):
    law(setting, case)


@pytest.mark.parametrize("case", CASES)
def test_rows_of_alike_blocks_are_accepted(case):
    laws.accepted_or_refused(SETTING, case)


# -- runs and stages -------------------------------------------------------------------------------------------------


def test_the_rear_run_is_cached_early_and_the_front_run_late(pixart):
    assert rows(pixart, DeltaDiT(interval=2, blocks=3, boundary=6), steps=10) == [
        "#######+#+",
        "#+#+#+#-#-",
        "#-#-#-#-#-",
        "#-#-#-####",
    ]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("front", ["#++#+", "#--#-", "#####", "#####"]),
        ("middle", ["#####", "#++#+", "#--#-", "#####"]),
        ("rear", ["#####", "#####", "#++#+", "#--#-"]),
    ],
)
def test_one_run_may_be_cached_at_all_steps(pixart, mode, expected):
    assert rows(pixart, DeltaDiT(interval=3, blocks=2, mode=mode), steps=5) == expected


def test_a_boundary_at_either_end_leaves_one_run(pixart):
    front, rear = (DeltaDiT(blocks=2, mode=mode) for mode in ("front", "rear"))
    assert rows(pixart, DeltaDiT(blocks=2, boundary=0), 6) == rows(pixart, front, 6)
    assert rows(pixart, DeltaDiT(blocks=2, boundary=6), 6) == rows(pixart, rear, 6)


def test_an_interval_that_serves_both_stages_keeps_both_changes(pixart):
    """The rear run, blocks 1 to 3, is cached at step 1; the front run, blocks 0 to 2, at steps 2 and 3."""
    assert rows(pixart, DeltaDiT(interval=4, blocks=3, boundary=2), steps=4) == ["##++", "#+++", "#---", "#+##"]


def test_all_blocks_may_be_cached(pixart):
    assert rows(pixart, DeltaDiT(blocks=4, boundary=2), steps=4) == ["#+#+", "#-#-", "#-#-", "#-#-"]


def test_a_fraction_of_the_blocks_and_of_the_schedule_is_rounded():
    assert DeltaDiT().length(28, 20) == 21
    assert DeltaDiT(blocks=0.01).length(28, 20) == 1
    assert DeltaDiT()._boundary(20) == 12


def test_a_block_of_latte_is_a_pair():
    table = whenwhere.plan(build("latte"), DeltaDiT(blocks=2, mode="front"), steps=2)
    assert {path: table.row(path) for path in ("transformer_blocks.0", "temporal_transformer_blocks.1")} == {
        "transformer_blocks.0": "#+",
        "temporal_transformer_blocks.1": "#-",
    }
    assert table.row("transformer_blocks.2") == table.row("temporal_transformer_blocks.2") == "##"


# -- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "length", "speedup"),
    [(20, 21, 1.60), (4, 4, 1.08), (4, 6, 1.12)],  # as published: PixArt-α, and its LCM
)
def test_the_budget_rule_finds_the_published_runs(steps, length, speedup):
    budget = (10 * 28 + 10 * (28 - length)) / (20 * 28)  # the share does not depend on how many steps there are
    assert blocks_for_budget(budget, steps, 2, 28) == length
    assert 1 / budget == pytest.approx(speedup, abs=0.006)


def test_the_shortest_run_is_one_block():
    assert blocks_for_budget(1.0, 20, 2, 28) == blocks_for_budget(1.0, 20, 1, 28) == 1


@pytest.mark.parametrize(("budget", "interval", "needed"), [(0.3, 2, 4), (0.3, 1, 4), (0.01, 2, None)])
def test_a_budget_that_cannot_be_kept_names_the_interval_that_could(budget, interval, needed):
    with pytest.raises(ValueError, match=f"the smallest interval that can is {needed}"):
        blocks_for_budget(budget, 20, interval, 28)


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.5])
def test_a_generation_keeps_to_its_budget_and_spends_it(pixart, budget):
    method = DeltaDiT(interval=3, macs_budget=budget)
    symbols = "".join(rows(pixart, method, steps=12))
    spent = symbols.count("#") / len(symbols)
    one_block_less = (12 - 4) / len(symbols)
    assert budget - one_block_less < spent <= budget


@pytest.mark.parametrize(("budget", "length"), [(0.99, 2), (0.75, 4), (0.6, 6)])
def test_across_long_skips_a_budget_picks_a_run_that_is_centred(budget, length):
    """The shortest runs that keep to these budgets are 1, 3 and 5 of 6 blocks long."""
    table = rows(build("hunyuan-dit"), DeltaDiT(mode="middle", macs_budget=budget), steps=4)
    passed = [i for i, row in enumerate(table) if row != "####"]
    assert passed == list(range(3 - length // 2, 3 + length // 2))
    assert "".join(table).count("#") <= budget * 24


# -- what a ControlNet adds ------------------------------------------------------------------------------------------


@contextmanager
def controlled(network: nn.Module, residuals: Callable[[int], dict[str, list[Tensor]]]) -> Iterator[None]:
    """Hand the denoiser what a ControlNet would, step by step."""
    step = count()

    def add(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | residuals(next(step))

    handle = network.register_forward_pre_hook(add, with_kwargs=True)
    yield
    handle.remove()


def hunyuan_residuals(kept: float, cached: float) -> Callable[[int], dict[str, list[Tensor]]]:
    """For the skips of blocks 5 and 4, the latter one other at the second step."""
    ones = torch.ones(2, 16, 32)
    return lambda s: {"controlnet_block_samples": [0.1 * ones, (cached if s else kept) * ones]}


def test_residuals_that_passed_blocks_would_read_with_their_skips_are_refused():
    pipe, method = build("hunyuan-dit"), DeltaDiT(2, blocks=4, mode="middle")
    plain = run("hunyuan-dit", pipe, steps=2)
    with attach(pipe, method):
        assert not torch.equal(run("hunyuan-dit", pipe, steps=2), plain)
        with (
            controlled(pipe.transformer, hunyuan_residuals(0.1, 0.1)),
            pytest.raises(ValueError, match=r"passes blocks of HunyuanDiT2DModel .* ControlNet .* Choose blocks=2"),
        ):
            run("hunyuan-dit", pipe, steps=2)
    assert torch.equal(run("hunyuan-dit", pipe, steps=2), plain)


def test_a_pipeline_with_such_residuals_is_refused_when_attaching():
    pipe = build("hunyuan-dit")
    shape = {key: pipe.transformer.config[key] for key in ("num_attention_heads", "attention_head_dim", "hidden_size")}
    pipe.controlnet = HunyuanDiT2DControlNetModel(in_channels=4, patch_size=2, transformer_num_layers=6, **shape)
    for fields in ({"blocks": 4}, {"blocks": 0.75}, {"macs_budget": 0.9}):
        with pytest.raises(ValueError, match="a ControlNet adds to these would be ignored"):
            attach(pipe, DeltaDiT(mode="middle", **fields))
    attach(pipe, DeltaDiT(blocks=2, mode="middle")).detach()
    attach(pipe, DeltaDiT(interval=1, mode="middle")).detach()


def test_residuals_for_blocks_behind_the_run_stay_fresh():
    pipe, results = build("hunyuan-dit"), []
    with attach(pipe, DeltaDiT(2, blocks=2, mode="middle")):
        for cached in (0.1, 0.9):
            with controlled(pipe.transformer, hunyuan_residuals(0.1, cached)):
                results.append(run("hunyuan-dit", pipe, steps=2))
    assert not torch.equal(*results)


@pytest.mark.parametrize(
    ("case", "name", "number"),
    [
        ("sd3", "block_controlnet_hidden_states", 3),  # the last block of the four takes none
        ("flux", "controlnet_block_samples", 3),
        ("flux", "controlnet_single_block_samples", 3),
    ],
)
def test_residuals_between_blocks_are_added_to_the_stream_at_cached_steps_too(case, name, number):
    """With all blocks cached, those of the present step reach the last layer, one by one."""
    pipe, entering = build(case), []
    network = pipe.transformer
    samples = 1 if case == "flux" else 2
    residuals = torch.randn(number, samples, 16, 32, generator=torch.Generator().manual_seed(0))
    blocks = sum(1 for _ in network.transformer_blocks) + len(getattr(network, "single_transformer_blocks", ()))
    handle = network.norm_out.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    with attach(pipe, DeltaDiT(2, blocks=blocks, mode="front")):
        for factor in (0, 1):
            given = lambda s, factor=factor: {name: list(residuals * factor * s)}  # noqa: E731
            with controlled(network, given):
                run(case, pipe, steps=2)
    handle.remove()
    without, with_ = entering[1], entering[3]
    assert torch.equal(entering[0], entering[2])
    added = sum(residuals) if case == "flux" else sum(residuals[int(i / (4 / number))] for i in range(3))
    assert torch.allclose(with_ - without, added, atol=1e-4)


# -- what a step computes --------------------------------------------------------------------------------------------


@contextmanager
def replaced(network: nn.Module, full: Callable[[int], bool], lists: dict[str, range]) -> Iterator[None]:
    """Runs of blocks as one replaced module each: it notes the stream before and after, or adds the difference."""
    step, now = count(), {}
    blocks = {name: list(getattr(network, name)) for name in lists}

    def run_forward(originals: list[Callable], first: bool):
        change: list[Tensor | None] = []

        def forward(hidden_states: Tensor, *args: object, encoder_hidden_states: Tensor | None = None, **rest: object):
            streams = [hidden_states, encoder_hidden_states]
            if not now["full"]:
                x, text = (s if d is None else s + d for s, d in zip(streams, change, strict=True))
                return x if isinstance(now["like"], Tensor) else (text, x)
            x, text = streams
            for original in originals:
                now["like"] = output = original(x, *args, encoder_hidden_states=text, **rest)
                x, text = (output, text) if isinstance(output, Tensor) else (output[1], output[0])
            change[:] = [x - hidden_states, None if text is encoder_hidden_states else text - encoder_hidden_states]
            return now["like"]

        def hand_on(hidden_states: Tensor, *_: object, encoder_hidden_states: Tensor | None = None, **__: object):
            return hidden_states if isinstance(now["like"], Tensor) else (encoder_hidden_states, hidden_states)

        return forward if first else hand_on

    handle = network.register_forward_pre_hook(lambda *_: now.update(full=full(next(step))))
    for name, numbers in lists.items():
        row = [blocks[name][i] for i in numbers]
        originals = [block.forward for block in row]
        for i, block in enumerate(row):
            block.forward = run_forward(originals, first=i == 0)
    yield
    handle.remove()
    for name, numbers in lists.items():
        for i in numbers:
            del blocks[name][i].forward


@pytest.mark.parametrize(
    ("case", "method", "lists"),
    [
        ("pixart-alpha", DeltaDiT(interval=3, blocks=3, mode="rear"), {"transformer_blocks": range(1, 4)}),
        ("hunyuan-dit", DeltaDiT(interval=3, blocks=2, mode="middle"), {"blocks": range(2, 4)}),
        ("sd35", DeltaDiT(interval=3, blocks=2, mode="front"), {"transformer_blocks": range(2)}),
        (
            "flux",
            DeltaDiT(interval=3, blocks=4, mode="middle"),
            {"transformer_blocks": range(1, 3), "single_transformer_blocks": range(2)},
        ),
    ],
)
def test_a_naive_loop_agrees(case, method, lists):
    pipe = build(case)
    with replaced(getattr(pipe, CASES[case].denoiser), lambda s: s % 3 == 0, lists):
        expected = run(case, pipe, steps=8, prompts=2)
    with attach(pipe, method):
        latents = run(case, pipe, steps=8, prompts=2)
    assert (latents - expected).norm() / expected.norm() < 1e-6


def test_a_naive_loop_agrees_where_the_run_moves_with_the_stage():
    """Two separate executors, one per stage: the interval 4 serves both, so both changes are taken at its full step."""
    pipe, method = build("dit"), DeltaDiT(interval=4, blocks=3, boundary=6)
    network, step = pipe.transformer, count()
    blocks, changes, now = list(network.transformer_blocks), {}, {}
    originals = [block.forward for block in blocks]

    def everything(x: Tensor, **kwargs: object) -> Tensor:
        s, entered = now["s"], {}
        start = 1 if s < 6 else 0  # the rear run are blocks 1 to 3, the front run 0 to 2
        for i, original in enumerate(originals):
            entered[i] = x
            if s % 4 and i == start:
                x = x + changes[start]
            elif not (s % 4 and start < i < start + 3):
                x = original(x, **kwargs)
        if s % 4 == 0:
            changes.update({0: entered[3] - entered[0], 1: x - entered[1]})
        return x

    handle = network.register_forward_pre_hook(lambda *_: now.update(s=next(step)))
    for i, block in enumerate(blocks):
        block.forward = everything if i == 0 else lambda x, **_: x
    expected = run("dit", pipe, steps=10)
    handle.remove()
    for block in blocks:
        del block.forward
    with attach(pipe, method, guidance=True):
        latents = run("dit", pipe, steps=10)
    assert (latents - expected).norm() / expected.norm() < 1e-6


def test_what_the_network_adds_between_blocks_stays_fresh():
    """Latte adds the embedding of time between the first two blocks: it is no part of the change."""
    pipe = build("latte")
    with attach(pipe, DeltaDiT(interval=2, blocks=3, mode="front")):
        before = run("latte", pipe, steps=4)
        pipe.transformer.temp_pos_embed.mul_(2)
        assert not torch.equal(run("latte", pipe, steps=4), before)


# -- cost ------------------------------------------------------------------------------------------------------------


def test_the_headline_of_the_paper_is_the_planned_cost():
    cost = whenwhere.plan("pixart-alpha-1024", DeltaDiT(), steps=20).cost
    assert cost.ratio == pytest.approx(1.60, abs=0.005)
    assert cost.bytes == 2 * 4096 * 1152 * 2  # one tensor: rows, tokens, width, bytes of a half


@pytest.mark.parametrize(
    ("case", "size"),
    [
        ("pixart-alpha", 2 * 16 * 24 * 4),  # rows, tokens, width, bytes
        ("sd3", 2 * (6 + 16) * 32 * 4),  # text and image
        ("flux", 2 * (6 + 16) * 32 * 4),  # two lists of blocks
        ("latte", 2 * 2 * 3 * 16 * 32 * 4),  # two lists; three frames
    ],
)
def test_one_change_is_held_for_every_list_of_blocks(case, size):
    pipe = build(case)
    with attach(pipe, DeltaDiT()) as attachment:
        run(case, pipe, steps=6)
    assert attachment.trace.held == attachment.plan.cost.bytes == size


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"interval": 0}, ValueError, "interval must be at least 1"),
        ({"interval": 1.5}, TypeError, "interval must be a whole number"),
        ({"blocks": 0}, ValueError, "blocks must be at least 1"),
        ({"blocks": 1.5}, ValueError, "blocks must be a whole number of at least 1, or a fraction"),
        ({"boundary": -1}, ValueError, "boundary must be at least 0"),
        ({"mode": "outline"}, ValueError, "mode must be one of 'adaptive', 'front'"),
        ({"macs_budget": 0}, ValueError, "macs_budget must be above 0 and at most 1, got 0"),
        ({"macs_budget": 1.1}, ValueError, "macs_budget must be above 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields, error, words):
    with pytest.raises(error, match=words):
        DeltaDiT(**fields)


def test_runs_boundaries_and_budgets_that_do_not_fit_are_refused(pixart):
    with pytest.raises(ValueError, match="has only 4 blocks"):
        attach(pixart, DeltaDiT(blocks=5))
    with pytest.raises(ValueError, match="boundary at step 7; only 6"):
        whenwhere.plan(pixart, DeltaDiT(boundary=7), steps=6)
    with pytest.raises(ValueError, match="the smallest interval that can is 6"):
        whenwhere.plan(pixart, DeltaDiT(macs_budget=0.2), steps=6)


def test_a_run_that_is_not_centred_is_refused_across_long_skips():
    with pytest.raises(ValueError, match=r"3 of 6 blocks are not centred, .* HunyuanDiT2DModel; take an even number"):
        attach(build("hunyuan-dit"), DeltaDiT(blocks=3, mode="middle"))


@pytest.mark.parametrize(("boundary", "stage"), [(1, "early"), (4, "late")])
def test_a_stage_without_a_cached_step_is_doubted(pixart, boundary, stage):
    with pytest.warns(UserWarning, match=f"no step of the {stage} stage is cached; move the boundary {boundary}"):
        whenwhere.plan(pixart, DeltaDiT(boundary=boundary), steps=5)
