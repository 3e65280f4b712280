"""Block Caching: what is measured, the schedule, the laws, a naive loop, and what is refused."""

import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import count, pairwise

import laws
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from laws import STEPS, Setting
from pipelines import CASES, build, run
from torch import Tensor

import whenwhere
from whenwhere import BlockCaching, Calibration, attach, calibrate
from whenwhere.decisions.measuring import METRICS, change
from whenwhere.methods.blockcaching import schedule

UNITS = {
    "sd": "layer",
    "dit": "branch",
    "latte": "block",
    "sd3": "block",
    "flux-true-cfg": "branch",
}
LAWS = (
    laws.accepted_or_refused,
    laws.neutral_is_exact,
    laws.nothing_left,
    laws.plan_tells_the_truth,
    laws.cost_is_what_was_promised,
    laws.batch_equals_its_prompts,
)


@cache
def calibrated(case: str, granularity: str = "branch", steps: int = STEPS, metric: str = "l1rel") -> Calibration:
    pipe = build(case)
    options = {"guidance": True} if case == "dit" else {}
    return calibrate(pipe, lambda: run(case, pipe, steps=steps, prompts=2), granularity, metric, **options)


@cache
def setting(case: str) -> Setting:
    """With a threshold of about two steps' change."""
    measured = calibrated(case, UNITS[case])
    changes = sorted(change for row in measured.changes.values() for change in row[1:])
    threshold = 1.9 * changes[len(changes) // 2]
    return Setting(
        "Block Caching",
        (BlockCaching(measured, threshold),),
        neutral=lambda _: (BlockCaching(measured, 0),),
        refused={},
        refused_later={},
    )


@pytest.mark.parametrize("case", UNITS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_laws_hold(law, case):
    law(setting(case), case)


def test_generations_are_independent():
    pipe = build("dit")
    (method,) = setting("dit").methods
    with attach(pipe, method, guidance=True):
        first = run("dit", pipe, steps=STEPS)
        run("dit", pipe, steps=STEPS, prompts=3, seed=5)
        assert torch.equal(run("dit", pipe, steps=STEPS), first)


# -- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", UNITS)
def test_measuring_changes_nothing(case):
    pipe, seen = build(case), []
    options = {"guidance": True} if case == "dit" else {}
    calibrate(pipe, lambda: seen.append(run(case, pipe, steps=STEPS)), UNITS[case], **options)
    assert torch.equal(seen[0], laws.plain(case))
    assert torch.equal(run(case, pipe, steps=STEPS), laws.plain(case))


def outputs_of(case: str, path: str, **request: object) -> list[Tensor]:
    """What a module puts out in a plain run."""
    pipe, seen = build(case), []
    module = getattr(pipe, CASES[case].denoiser).get_submodule(path)
    module.register_forward_hook(lambda *call: seen.append(call[-1]))
    run(case, pipe, **request)
    return seen


@pytest.mark.parametrize(
    ("metric", "distance"),
    [
        ("l1rel", lambda a, b: (b - a).abs().sum() / b.abs().sum()),
        ("l2rel", lambda a, b: ((b - a).pow(2).sum() / b.pow(2).sum()).sqrt()),
        ("cosine", lambda a, b: 1 - (a * b).sum() / (a.norm() * b.norm())),
    ],
)
def test_changes_are_the_papers_metric_averaged_over_rows(metric, distance):
    path = "transformer_blocks.2.attn1"
    outputs = outputs_of("pixart-alpha", path, steps=STEPS, prompts=2)
    expected = [
        sum(float(distance(a, b)) for a, b in zip(before, now, strict=True)) / len(now)
        for before, now in pairwise(outputs)
    ]
    measured = calibrated("pixart-alpha", metric=metric)
    assert measured.changes[path] == pytest.approx([0, *expected], rel=1e-4, abs=1e-6)


def test_a_batch_of_prompts_measures_as_the_prompts_one_by_one():
    pipe = build("pixart-alpha")
    apart = calibrate(pipe, lambda: [run("pixart-alpha", pipe, steps=STEPS, seed=i) for i in range(2)])
    together = calibrated("pixart-alpha")
    assert (apart.runs, together.runs) == (2, 1)
    for path, row in together.changes.items():
        assert apart.changes[path] == pytest.approx(row, rel=1e-3)


def test_units_are_what_was_asked_for():
    assert set(calibrated("sd", "layer").changes) == {
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    }
    assert all(path.endswith((".attn1", ".attn2", ".ff")) for path in calibrated("sd").changes)
    assert not any("resnets" in path for path in calibrated("sd", "block").changes)
    with pytest.raises(ValueError, match="DiTTransformer2DModel has no units of granularity 'layer'"):
        calibrated("dit", "layer")


def test_a_calibration_says_what_it_was_measured_on():
    found = calibrated("sd", "layer").setting
    assert (found.steps, found.scheduler, found.guidance, found.size) == (STEPS, "DDIMScheduler", 3.0, (4, 16, 16))


def test_runs_of_different_settings_or_none_are_refused():
    pipe = build("dit")
    with pytest.raises(ValueError, match="runs of one setting; found steps 4 and 5"):
        calibrate(pipe, lambda: [run("dit", pipe, steps=steps) for steps in (4, 5)], guidance=True)
    with pytest.raises(ValueError, match="runs of one setting; found none"):
        calibrate(pipe, lambda: None)
    with pytest.raises(ValueError, match="at least two steps"):
        calibrate(pipe, lambda: run("dit", pipe, steps=1), guidance=True)
    with pytest.raises(ValueError, match="metric must be one of"):
        calibrate(pipe, lambda: None, metric="psnr")


def test_an_interrupted_run_is_refused():
    pipe = build("sd")

    def abort(pipe, step, *_):
        pipe._interrupt = step == 2
        return {}

    with pytest.raises(ValueError, match="not interrupted"):
        calibrate(pipe, lambda: [run("sd", pipe, steps=4), run("sd", pipe, steps=4, callback=abort)])


def test_units_that_add_nothing_are_doubted_and_infinite_ones_refused():
    pipe = build("dit")
    block = pipe.transformer.transformer_blocks[1]
    block.attn1.to_out[0].weight.data.zero_()
    block.attn1.to_out[0].bias.data.zero_()
    with pytest.warns(UserWarning, match=r"1 units add nothing, .* transformer_blocks\.1\.attn1"):
        found = calibrate(pipe, lambda: run("dit", pipe, steps=3), guidance=True)
    assert found.changes["transformer_blocks.1.attn1"] == (0, 0, 0)
    block.ff.net[2].bias.data.fill_(math.inf)
    with pytest.raises(ValueError, match=r"step 1: the output of transformer_blocks\.0\.attn1 is not finite"):
        calibrate(pipe, lambda: run("dit", pipe, steps=3), guidance=True)


@pytest.mark.parametrize("metric", METRICS)
def test_a_unit_that_adds_nothing_does_not_change(metric):
    nothing, something = torch.zeros(2, 3, 4), torch.tensor([0.0, 1.0]).reshape(2, 1, 1).expand(2, 3, 4)
    assert change(nothing, nothing, metric)[0].tolist() == [0, 0]
    assert change(something, something, metric)[0].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert change(nothing, something, metric)[0].tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-0.1, r"-0\.1")])
def test_changes_that_are_no_distances_are_refused(value, word, tmp_path):
    found, path = calibrated("dit"), tmp_path / "dit.json"
    unit, row = next(iter(found.changes.items()))
    words = rf"changes must be finite and at least 0, got {word} for {re.escape(unit)} at step 2; calibrate anew"
    with pytest.raises(ValueError, match=words):
        replace(found, changes={**found.changes, unit: (*row[:2], value, *row[3:])})
    found.save(path)
    path.write_text(path.read_text().replace(repr(row[2]), {"nan": "NaN", "inf": "Infinity"}.get(word, "-0.1"), 1))
    with pytest.raises(ValueError, match=rf"dit\.json is no saved calibration: .*{words}"):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"changes": {}}, "changes of at least one unit, got none"),
        ({"changes": {"ff": (0.0, 1.0)}}, "ff has 2 changes, but the runs had 6 steps"),
        ({"metric": "psnr"}, "metric must be one of 'l1rel'"),
        ({"granularity": "stage"}, "granularity must be one of"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
    ],
)
def test_what_cannot_have_been_measured_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        replace(calibrated("dit"), **fields)


def test_a_calibration_is_saved_and_loaded(tmp_path):
    path, found = tmp_path / "dit.json", calibrated("dit")
    found.save(path)
    assert Calibration.load(path) == found
    method = BlockCaching(str(path), threshold=0.3)
    assert whenwhere.plan(build("dit"), method, steps=STEPS).rows == (
        whenwhere.plan(build("dit"), BlockCaching(found, threshold=0.3), steps=STEPS).rows
    )
    fields = "threshold=0.3, strict=False, max_age=None, scale_shift=None, units=None"
    assert repr(method) == f"BlockCaching(calibration={str(path)!r}, {fields})"
    path.write_text('{"whenwhere": 1, "model": "DiT"}')
    with pytest.raises(ValueError, match="is no saved calibration"):
        Calibration.load(path)
    path.write_text(path.read_text().replace("1,", "2,"))
    with pytest.raises(ValueError, match="another version"):
        Calibration.load(path)


# -- the schedule ----------------------------------------------------------------------------------------------------


def drawn(*fields: object, changes: tuple[float, ...] = (0, 4, 1, 1, 1, 2, 2, 0, 5)) -> str:
    return "".join("#" if full else "." for full in schedule(changes, *fields))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((3,), "##...#..#"),  # 4 | 1 1 1 | 2: 5 > 3 | 2 0 | 5
        ((2,), "##..#.#.#"),
        ((0.5,), "#######.#"),
        ((0,), "#########"),
        ((math.inf,), "#........"),
        ((4,), "#.#...#.#"),
        ((3, True), "##..##.##"),
        ((math.inf, False, 1), "#.#.#.#.#"),
        ((3, False, 2), "##..#.#.#"),
        ((0, True, 3), "#########"),
        ((3, False, None, 4), "##..#.#.#"),  # another denoiser begins at step 4
    ],
)
def test_a_unit_is_computed_when_it_has_changed_too_much(fields, expected):
    assert drawn(*fields) == expected


def test_nothing_is_reused_beyond_the_threshold():
    changes = tuple(torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist())
    full, drift = schedule(changes, 1.0), 0.0
    for s in range(1, 40):
        drift += changes[s]
        assert full[s] == (drift > 1)
        drift = 0.0 if full[s] else drift


def test_strict_computes_no_later():
    changes = tuple(torch.rand(40, generator=torch.Generator().manual_seed(1)).tolist())
    loose, strict = ([s for s, f in enumerate(schedule(changes, 1.0, flag)) if f] for flag in (False, True))
    assert len(strict) >= len(loose)
    assert all(s <= t for s, t in zip(strict, loose, strict=False))


def test_the_plan_is_the_schedule_of_every_unit():
    measured, pipe = calibrated("pixart-alpha"), build("pixart-alpha")
    table = whenwhere.plan(pipe, BlockCaching(measured, 0.4), steps=STEPS)
    for path, changes in measured.changes.items():
        assert table.row(path) == drawn(0.4, changes=changes)


def test_a_calibration_of_image_to_image_is_planned_like_any_other():
    """A plan made beforehand cannot know that the scheduler lays out two steps more than are executed."""
    pipe = build("sd-img2img")
    method = BlockCaching(calibrated("sd-img2img", "layer"), math.inf)
    assert method.measured.setting.skipped == 2
    planned = whenwhere.plan(pipe, method, steps=4)
    with attach(pipe, method) as attached:
        run("sd-img2img", pipe, steps=STEPS)
    assert attached.trace.rows == planned.rows


def test_the_published_threshold_is_the_default():
    changes = (0.0, 0.3, 0.19, 0.02, 0.4, 0.11)
    measured = replace(calibrated("dit"), changes=dict.fromkeys(calibrated("dit").changes, changes))
    assert set(BlockCaching(measured).table().values()) == {"#..#.#"}


def test_an_infinite_threshold_computes_the_first_step_only():
    pipe = build("dit")
    with attach(pipe, BlockCaching(calibrated("dit"), math.inf), guidance=True) as attachment:
        run("dit", pipe, steps=STEPS)
    assert set(attachment.trace.rows[1:]) == {"#....."}


def test_a_threshold_is_found_for_a_speedup():
    measured, pipe = calibrated("dit", steps=12), build("dit")
    method = BlockCaching.for_speedup(pipe, measured, 1.7, max_age=4)
    assert method.max_age == 4
    assert 1.7 <= whenwhere.plan(pipe, method, steps=12).cost.ratio < 1.9
    for speedup in (1, 50):
        with pytest.raises(ValueError, match=f"speedup must be above 1 and at most .*, got {speedup}"):
            BlockCaching.for_speedup(pipe, measured, speedup)


# -- what a step computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "granularity"), [("pixart-alpha", "branch"), ("pixart-alpha", "block")])
def test_a_naive_loop_agrees(case, granularity):
    """Every unit's forward is replaced by one that stores or returns what it added, at steps chosen by hand."""
    measured = calibrated(case, granularity, steps=8)
    pipe, step, now = build(case), count(), {}
    full = {path: {0} for path in measured.changes}
    for path, changes in measured.changes.items():
        drift = 0.0
        for s in range(1, 8):
            drift += changes[s]
            if drift > 0.7:
                full[path].add(s)
                drift = 0.0
    assert 0 < sum(map(len, full.values())) < 8 * len(full)

    def replacement(path, original):
        kept = {}

        def forward(x, *args, **kwargs):
            entered = x if granularity == "block" else 0
            if now["s"] in full[path]:
                kept["added"] = original(x, *args, **kwargs) - entered
            return entered + kept["added"]

        return forward

    pipe.transformer.register_forward_pre_hook(lambda *_: now.update(s=next(step)))
    for path in full:
        module = pipe.transformer.get_submodule(path)
        module.forward = replacement(path, module.forward)
    expected = run(case, pipe, steps=8, prompts=2)
    pipe = build(case)
    with attach(pipe, BlockCaching(measured, 0.7)):
        latents = run(case, pipe, steps=8, prompts=2)
    assert (latents - expected).norm() / expected.norm() < 1e-6


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"threshold": -0.1}, ValueError, "threshold must be at least 0, got -0.1"),
        ({"threshold": math.nan}, ValueError, "threshold must be at least 0, got nan"),
        ({"threshold": "0.5"}, TypeError, "threshold must be a number"),
        ({"max_age": 0}, ValueError, "max_age must be at least 1"),
        ({"calibration": None}, TypeError, "calibration must be a Calibration or the path of one"),
        ({"calibration": "missing.json"}, FileNotFoundError, "missing.json"),
    ],
)
def test_fields_out_of_range_are_refused(fields, error, words):
    with pytest.raises(error, match=words):
        BlockCaching(**{"calibration": calibrated("dit"), **fields})


def test_another_model_is_refused():
    with pytest.raises(
        ValueError, match="calibration is of DiTTransformer2DModel with 8 units, this SD3Transformer2DModel has 11"
    ):
        attach(build("sd3"), BlockCaching(calibrated("dit")))
    untold = {case: replace(calibrated(case), configuration=None) for case in ("sd", "sd-deep")}
    with pytest.raises(ValueError, match=r"with 33 units, this UNet2DConditionModel has 12"):
        attach(build("sd"), BlockCaching(untold["sd-deep"]))
    with pytest.raises(ValueError, match=r"with 12 units, this UNet2DConditionModel has 33"):
        attach(build("sd-deep"), BlockCaching(untold["sd"]))


def test_a_model_of_the_same_units_that_was_made_otherwise_is_refused(tmp_path):
    path, other = tmp_path / "pixart.json", build("pixart-alpha-sized")
    calibrated("pixart-alpha").save(path)
    words = "calibration is of a PixArtTransformer2DModel with sample_size 8, but this one has .*; make one for this"
    with pytest.raises(ValueError, match=words):
        whenwhere.plan(other, BlockCaching(path), steps=STEPS)
    with pytest.raises(ValueError, match=words):
        attach(other, BlockCaching(path))


def test_a_calibration_from_before_it_told_so_much_is_taken(tmp_path):
    path, found = tmp_path / "pixart.json", calibrated("pixart-alpha")
    found.save(path)
    data = json.loads(path.read_text())
    del data["configuration"]
    for name in ("branches", "configuration", "timesteps", "handover"):
        assert data["setting"].pop(name) is not None
    path.write_text(json.dumps(data))
    old = Calibration.load(path)
    assert (old.changes, old.setting.steps, old.configuration) == (found.changes, STEPS, None)
    with attach(build("pixart-alpha-sized"), BlockCaching(old)):
        pass


def test_another_setting_is_refused():
    pipe, method = build("sd"), BlockCaching(calibrated("sd", "layer"))
    with attach(pipe, method):
        with pytest.raises(ValueError, match="calibrated with steps 6, but this generation has 7"):
            run("sd", pipe, steps=7)
        with pytest.raises(ValueError, match=r"calibrated with guidance 3.0, but this generation has 1.0"):
            run("sd", pipe, steps=STEPS, guidance=False)
        with pytest.raises(ValueError, match=r"calibrated with size \(4, 16, 16\), but .* \(4, 24, 24\)"):
            run("sd", pipe, steps=STEPS, size=24)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with attach(pipe, method), pytest.raises(ValueError, match="calibrated with scheduler 'DDIMScheduler', but"):
        run("sd", pipe, steps=STEPS)
    with pytest.raises(ValueError, match="calibrated with steps 6"):
        whenwhere.plan(pipe, method, steps=9)


def test_the_same_solver_made_otherwise_is_refused():
    pipe, method = build("sd"), BlockCaching(calibrated("sd", "layer"))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    words = "calibrated with timestep_spacing the default, but this generation has 'trailing'"
    with attach(pipe, method), pytest.raises(ValueError, match=words):
        run("sd", pipe, steps=STEPS)
    pipe.scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=words):
        whenwhere.plan(pipe, method, steps=STEPS, scheduler=pipe.scheduler)


def test_the_same_scheduler_with_timesteps_of_ones_own_is_refused_where_they_are_known():
    pipe, method = build("sd"), BlockCaching(calibrated("sd", "layer"))
    pipe.scheduler.set_timesteps(STEPS)
    assert whenwhere.plan(pipe, method, steps=STEPS, scheduler=pipe.scheduler)
    pipe.scheduler.timesteps = pipe.scheduler.timesteps - 1
    with pytest.raises(ValueError, match=r"calibrated with timesteps \(8.*, but this generation has \(8"):
        whenwhere.plan(pipe, method, steps=STEPS, scheduler=pipe.scheduler)


@pytest.mark.parametrize("told", [True, False])
def test_another_guidance_is_refused_where_the_pipeline_keeps_it_to_itself(told):
    """PixArt tells neither scale nor branches: unless they are declared, the first step of the scheduler does."""
    pipe = build("pixart-alpha")
    guided, unguided = (
        calibrate(pipe, lambda on=on: run("pixart-alpha", pipe, steps=3, guidance=on), guidance=on if told else None)
        for on in (True, False)
    )
    assert (guided.setting.branches, unguided.setting.branches) == (2, 1)
    assert guided.setting.guidance is None
    for measured, on, words in ((guided, False, "2, but .* has 1"), (unguided, True, "1, but .* has 2")):
        with attach(pipe, BlockCaching(measured)), pytest.raises(ValueError, match=f"with branches {words}"):
            run("pixart-alpha", pipe, steps=3, guidance=on)
        with attach(pipe, BlockCaching(measured)) as attached:
            run("pixart-alpha", pipe, steps=3, guidance=not on)
        assert len(attached.trace.rows[0]) == 3


def test_another_guidance_is_refused_where_it_is_declared():
    pipe = build("dit")
    words = "calibrated with branches 2, but this generation has 1"
    with attach(pipe, BlockCaching(calibrated("dit")), guidance=False), pytest.raises(ValueError, match=words):
        run("dit", pipe, steps=STEPS, guidance=False)


# -- two denoisers, and some of the units ----------------------------------------------------------------------------


def test_two_denoisers_are_measured_each_by_itself():
    pipe = build("wan-two")
    measured = calibrate(pipe, lambda: run("wan-two", pipe, steps=STEPS))
    assert measured.setting.handover == 2
    assert all(row[0] == row[2] == 0 < min(row[1], *row[3:]) for row in measured.changes.values())
    method = BlockCaching(measured, math.inf)
    with attach(pipe, method) as attached:
        run("wan-two", pipe, steps=STEPS)
    assert set(attached.trace.rows[1:]) == {"##..##......"}  # two calls a step
    assert set(method.table().values()) == {"#.#..."}
    pipe = build("wan")
    with attach(pipe, method), pytest.raises(ValueError, match="calibrated with handover 2, but this generation has 6"):
        run("wan", pipe, steps=STEPS)


def test_only_the_units_that_are_named_are_reused():
    pipe, measured = build("sd"), calibrated("sd", "layer")
    method = BlockCaching(measured, math.inf, units=("mid_block", "up_blocks.1.attentions.0"))
    chosen = ["mid_block.attentions.0", "up_blocks.1.attentions.0"]
    assert method.table() == dict.fromkeys(chosen, "#.....")
    with attach(pipe, method) as attached:
        run("sd", pipe, steps=STEPS)
    assert [site.path for site in attached.sites] == ["", *chosen]
    assert attached.trace.rows[1:] == ("#+++++", "#+++++")


@pytest.mark.parametrize(
    ("units", "error", "words"),
    [
        (
            ("down_blocks.0.resnets.0",),
            ValueError,
            "got down_blocks.0.resnets.0. Residual networks of a U-Net are never",
        ),
        (("mid_block", "up_blocks.1.attentions"), None, ""),
        (
            ("mid_block", "up_blocks.1.att"),
            ValueError,
            "got up_blocks.1.att. .* There are: down_blocks.0.attentions.0, ",
        ),
        ((), ValueError, "must name modules that were measured; got none"),
        ("mid_block", TypeError, "units must be a tuple of paths, got 'mid_block'"),
        ((1,), TypeError, r"units must be a tuple of paths, got \(1,\)"),
    ],
)
def test_units_that_were_not_measured_are_refused(units, error, words):
    with pytest.raises(error, match=words) if error else nullcontext():
        BlockCaching(calibrated("sd", "layer"), units=units)
