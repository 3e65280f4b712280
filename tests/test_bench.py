"""The bench: turns, prices, baselines at equal cost, rows that survive."""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from saved import make, tiny_pipeline
from tiny_models import dit

from whenwhere import DeepCache, FewerSteps, GuidanceStop, TGate, ToCa, zoo
from whenwhere.bench.baselines import baselines
from whenwhere.bench.comparison import compare, most_runs
from whenwhere.bench.drawing import attached, draw
from whenwhere.bench.environment import Environment
from whenwhere.bench.model import Model, digest, open_model
from whenwhere.bench.price import price
from whenwhere.bench.rowfile import Content, Listing, RowFile
from whenwhere.bench.run import measure
from whenwhere.bench.schedulers import SHORT_NAMES, evaluations, make_scheduler
from whenwhere.bench.stopwatch import Stopwatch
from whenwhere.bench.summary import summarise
from whenwhere.bench.variant import PLAIN, Task, Variant

HERE = Environment.here(torch.device("cpu"))


@pytest.fixture
def task():
    return Task(Model("tiny", make(), "0", 6, 3.0), ["red"], [0, 1], runs=2, steps=6, guidance=3.0)


@pytest.fixture(scope="module")
def prices():
    """Plain and two methods, with their prices."""
    task = Task(Model("tiny", make(), "0", 6, 3.0), ["red"], [0, 1], runs=2, steps=6, guidance=3.0)
    variants = [PLAIN, Variant((DeepCache(interval=2),)), Variant((TGate(gate_step=3),))]
    return {variant: price(task, variant) for variant in variants}


@pytest.fixture(scope="module")
def measured(prices):
    """The same, four runs each."""
    task = Task(Model("tiny", make(), "0", 6, 3.0), ["red"], [0, 1], runs=2, steps=6, guidance=3.0)
    return list(measure(task, prices))


# -- prices and baselines


@pytest.mark.parametrize(
    "text", ["", "tgate(3)", "deepcache(2)", "tgate(3, sp_interval=1)+deepcache(2)", "fewersteps(2)"]
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_counted_work_and_held_bytes_are_the_planned_ones(task, text, guidance):
    variant = Variant.of(text) if text else PLAIN
    found = price(replace(task, guidance=guidance), variant)
    assert found.counted == found.planned
    assert found.held_bytes == found.planned_bytes
    assert (found.held_bytes > 0) == bool(variant.methods)
    assert found.evaluations == variant.steps(task.steps)
    assert found.branches == (2 if guidance > 1 else 1)


def test_an_uncounted_price_is_the_same(task):
    variant = Variant((TGate(gate_step=3),))
    assert price(task, variant, counting=False) == replace(price(task, variant), counted=None)


def test_fewer_steps_match_the_cost_of_the_method(task, prices):
    method = prices[Variant((DeepCache(interval=2),))]
    (fewer, _) = baselines(task, Variant((DeepCache(interval=2),)), prices)
    each = prices[PLAIN].planned.all / 6
    distances = {steps: abs(steps * each - method.planned.all) for steps in range(1, 7)}
    assert fewer.items == (FewerSteps(min(distances, key=distances.__getitem__)),)


def test_second_order_solvers_count_their_evaluations(task):
    task.model.pipeline.scheduler = make_scheduler("heun", task.model.pipeline.scheduler)
    prices = {v: price(task, v) for v in (PLAIN, Variant((TGate(gate_step=0.5),)))}
    assert prices[PLAIN].evaluations == 11
    fewer, stop = baselines(task, Variant((TGate(gate_step=0.5),)), prices)
    assert fewer.items == (FewerSteps(4),)  # 7 evaluations; the gate leaves 6 + 5 / 2 of 11, less some attention
    assert stop.items == (GuidanceStop(6),)


def test_guidance_stops_at_the_gate_of_tgate_and_elsewhere_at_the_nearest_cost(task):
    gated, cached = Variant((DeepCache(interval=2), TGate(gate_step=2))), Variant((DeepCache(interval=2),))
    prices = {variant: price(task, variant) for variant in (PLAIN, gated, cached)}
    assert baselines(task, gated, prices)[-1].items == (GuidanceStop(2),)
    ratio = prices[cached].planned.all / prices[PLAIN].planned.all
    stop = min(range(1, 7), key=lambda m: abs((m + (6 - m) / 2) / 6 - ratio))
    assert baselines(task, cached, prices)[-1].items == (GuidanceStop(stop),)


def test_without_guidance_there_is_nothing_to_stop(task):
    task = replace(task, guidance=1.0)
    variant = Variant((DeepCache(interval=2),))
    found = baselines(task, variant, {v: price(task, v) for v in (PLAIN, variant)})
    assert [type(baseline.items[0]) for baseline in found] == [FewerSteps]


def test_a_baseline_is_no_baseline_of_itself(task):
    asked = [Variant((FewerSteps(3),)), Variant((GuidanceStop(3),))]
    prices = {variant: price(task, variant) for variant in (PLAIN, *asked)}
    for variant in asked:
        assert variant not in baselines(task, variant, prices)


def test_a_method_without_effect_has_no_baselines(task):
    with pytest.warns(UserWarning, match="changed nothing"):
        found = price(task, Variant((DeepCache(interval=1),)))
    prices = {PLAIN: price(task, PLAIN), Variant((DeepCache(interval=1),)): found}
    assert baselines(task, Variant((DeepCache(interval=1),)), prices) == []


# -- running


def test_variants_take_turns(measured):
    assert [m.variant.label.partition("(")[0] for m in measured] == ["plain", "DeepCache", "TGate"] * 4
    assert [(m.row.job.seed, m.row.job.run) for m in measured[::3]] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_every_variant_is_warm_before_the_first_measurement(task, prices):
    told = []
    next(measure(task, prices, watch=told.append))
    assert told == [*(f"warming up {variant.label}" for variant in prices), "plain, seed 0"]


def test_a_repetition_gives_the_same_picture(measured):
    by_case = {}
    for m in measured:
        by_case.setdefault((m.variant, m.row.job.seed), []).append(m.picture)
    for first, second in by_case.values():
        assert torch.equal(first, second)


def test_only_methods_are_compared_with_the_plain_picture(measured):
    for m in measured:
        assert (m.row.psnr is None) == (m.variant == PLAIN)
        if m.row.psnr is not None:
            assert 0 < m.row.psnr < math.inf
            assert -1 <= m.row.ssim <= 1


def test_seconds_are_those_of_the_whole_and_of_the_steps(measured):
    for m in measured:
        assert 0 < m.row.denoising < m.row.seconds
        assert m.row.evaluations == 6
        assert m.row.peak_memory is None
        assert m.row.resident is None or m.row.resident >= 0


def test_a_stopwatch_leaves_the_scheduler_as_it_was(task):
    pipe = task.model.pipeline
    before = dict(vars(pipe.scheduler))
    with pytest.raises(ZeroDivisionError), Stopwatch(pipe, torch.device("cpu")):
        _ = 1 / 0
    assert vars(pipe.scheduler) == before


def test_a_picture_depends_on_its_own_prompt_and_seed(task):
    pipe = task.model.pipeline
    both = draw(pipe, ["red", "blue"], [0, 5], 2, 3.0)
    alone = draw(pipe, ["blue"], [5], 2, 3.0)
    assert both.shape == (2, 3, 16, 16)
    assert torch.allclose(both[1], alone[0], atol=1e-5)
    assert not torch.allclose(both[1], draw(pipe, ["blue"], [5], 2, 3.0, negative="red")[0])
    assert draw(pipe, ["red"], [0], 1, 1.0, size=(16, 24)).shape == (1, 3, 16, 24)


def test_a_model_of_classes_takes_numbers_and_labels():
    pipe = dit()
    pipe.set_progress_bar_config(disable=True)
    picture = draw(pipe, ["207"], [0], 2, 3.0)
    assert picture.shape[:2] == (1, 3)
    with pytest.raises(ValueError, match="class numbers; got 'dog'"):
        draw(pipe, ["dog"], [0], 2, 3.0)
    pipe.labels = {"golden retriever": 207, "tabby": 281}
    assert torch.equal(draw(pipe, ["golden retriever"], [0], 2, 3.0), picture)
    with pytest.raises(ValueError, match="numbers, or labels; the nearest is 'tabby'; got 'tab'"):
        draw(pipe, ["tab"], [0], 2, 3.0)
    with pytest.raises(ValueError, match="takes no negative prompts"):
        draw(pipe, ["207"], [0], 2, 3.0, negative="8")


def test_pictures_that_are_no_numbers_are_refused(task):
    task.model.pipeline.unet.conv_out.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        draw(task.model.pipeline, ["red"], [0], 1, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["red", " "]}, "none that is empty"),
        ({"seeds": []}, "at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"guidance": math.nan}, "guidance must be at least 0"),
    ],
)
def test_a_task_without_work_is_refused(task, change, message):
    with pytest.raises(ValueError, match=message):
        replace(task, **change)


def test_what_decides_while_it_runs_is_charged_for_what_it_decided(task):
    early, late = (Variant.of(f"adaptivetgate(threshold={t},min_step=2,max_step=5)") for t in ("1e9", "0"))
    fixed = [Variant.of(f"tgate(gate_step={m},sp_interval=1)") for m in (2, 5)]
    task = replace(task, runs=1, seeds=[0])
    prices = {variant: price(task, variant, counting=False) for variant in (PLAIN, early, late, *fixed)}
    macs = {m.variant: m.row.macs for m in measure(task, prices)}
    assert prices[early].planned == prices[late].planned  # a plan draws the latest gate
    assert macs[early] < macs[late]
    for adaptive, gate in ((early, fixed[0]), (late, fixed[1])):
        assert macs[adaptive] == pytest.approx(macs[gate], rel=1e-2)  # but for what measuring costs
        assert macs[adaptive] >= macs[gate]


# -- comparisons and summaries


def test_a_comparison_runs_methods_and_their_baselines(task):
    told = []
    task = replace(task, runs=1)
    asked = [Variant((TGate(gate_step=3),)), Variant((DeepCache(interval=2),))]
    comparison = compare(task, asked, told.append)
    assert list(comparison.groups) == asked
    variants = list(comparison.summaries())
    assert variants[:3] == [PLAIN, *asked]
    assert set(variants[3:]) == {b for found in comparison.groups.values() for b in found}
    assert len(comparison.rows) == len(variants) * 2
    assert set(comparison.pictures) == {(variant, "red", seed) for variant in variants for seed in (0, 1)}
    assert len(told) <= most_runs(task, asked)


def test_what_does_not_fit_is_refused_before_anything_runs(task):
    told = []
    with pytest.raises(ValueError, match="only 6 steps are executed"):
        compare(task, [Variant((TGate(gate_step=3),)), Variant((TGate(gate_step=7),))], told.append)
    with pytest.raises(ValueError, match="branches 0 to"):
        compare(task, [Variant((DeepCache(branch=99),))], told.append)
    assert told == []


def test_a_summary_is_made_of_medians(measured):
    rows = [replace(m.row, seconds=float(i + 1), denoising=0.5) for i, m in enumerate(measured)]
    plain, cached, _ = summarise(rows)
    assert (plain.seconds.median, plain.seconds.low, plain.seconds.high, plain.seconds.runs) == (5.5, 1.0, 10.0, 4)
    assert cached.speed_up == 5.5 / 6.5
    assert cached.denoising_speed_up == 1.0
    assert cached.macs_ratio == plain.macs / cached.macs
    assert plain.psnr is None


def test_what_cannot_stand_side_by_side_is_refused(measured):
    rows = [m.row for m in measured]
    with pytest.raises(ValueError, match="no row of the plain run"):
        summarise(rows[1:3])
    with pytest.raises(ValueError, match="2 models or settings are mixed"):
        summarise([*rows, replace(rows[0], job=replace(rows[0].job, steps=7))])


# -- rows


def test_rows_read_back_as_they_were_written(measured, tmp_path):
    file = RowFile(tmp_path / "rows.jsonl", HERE)
    rows = [measured[0].row, replace(measured[1].row, psnr=math.inf, counted=None)]
    for row in rows:
        file.append(row)
    content = Content.read(tmp_path / "rows.jsonl")
    assert (content.environment, content.rows) == (HERE, tuple(rows))
    assert all(json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())


def test_a_resumed_run_skips_what_is_finished_and_gives_the_same_rows(task, prices, measured, tmp_path):
    path = tmp_path / "rows.jsonl"
    file = RowFile(path, HERE)
    for m in measured[:5]:
        file.append(m.row)
    with path.open("a") as torn:
        torn.write(measured[5].row.to_json()[:40])  # killed while writing
    resumed = RowFile(path, replace(HERE, date="later"))
    assert resumed.rows == [m.row for m in measured[:5]]
    assert resumed.environment == HERE
    for m in measure(task, prices, resumed.finished):
        resumed.append(m.row)
    again = [row.reproducible() for row in Content.read(path).rows]
    assert again == [m.row.reproducible() for m in measured]


def test_a_finished_run_runs_nothing(task, prices, measured):
    told = []
    assert list(measure(task, prices, [m.row.job for m in measured], told.append)) == []
    assert told == []


def test_rows_of_two_machines_are_not_mixed(tmp_path):
    RowFile(tmp_path / "rows.jsonl", HERE)
    with pytest.raises(ValueError, match=r"threads \d+ and 99"):
        RowFile(tmp_path / "rows.jsonl", replace(HERE, threads=99))


def test_a_file_torn_in_its_first_line_begins_anew(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"whenwh')
    RowFile(tmp_path / "rows.jsonl", HERE)
    assert Content.read(tmp_path / "rows.jsonl") == Content(HERE, (), (), ())


def test_a_file_of_something_else_is_never_written_to(tmp_path):
    for text in ("a prompt without a line break", "two\nlines\n"):
        (tmp_path / "prompts.txt").write_text(text)
        with pytest.raises(ValueError, match=r"prompts\.txt"):
            RowFile(tmp_path / "prompts.txt", HERE)
        assert (tmp_path / "prompts.txt").read_text() == text


def test_rows_of_two_settings_or_with_other_scores_are_not_mixed(measured, tmp_path):
    row, path = measured[0].row, tmp_path / "rows.jsonl"
    RowFile(path, HERE, ["agreement"]).append(row)
    RowFile(path, HERE, ["agreement"], row.job.setting)
    with pytest.raises(ValueError, match=r"steps 6 and 7.*must not be mixed. Write to another file"):
        RowFile(path, HERE, ["agreement"], replace(row.job.setting, steps=7))
    with pytest.raises(ValueError, match="scores agreement and none"):
        RowFile(path, HERE)


def test_variants_are_listed_once(tmp_path):
    listing = Listing("DeepCache(interval=2, branch=0)", "DeepCache(interval=2)", ("FewerSteps(steps=4)",))
    for _ in range(2):
        RowFile(tmp_path / "rows.jsonl", HERE).list(listing)
    assert Content.read(tmp_path / "rows.jsonl").listings == (listing,)


def test_a_wrong_line_is_named(measured, tmp_path):
    path = tmp_path / "rows.jsonl"
    file = RowFile(path, HERE)
    file.append(measured[0].row)
    good = path.read_text()
    for wrong, message in (
        ("{}\n", "line 3: no row .fields"),
        ("red\n", "line 3: no row"),
        (measured[0].row.to_json().replace('"psnr": null', '"psnr": NaN') + "\n", "psnr is nan, not a number"),
        (measured[0].row.to_json().replace('"ssim": null', '"ssim": Infinity') + "\n", "ssim is inf, not a number"),
        (measured[0].row.to_json().replace('"seed": 0', '"seed": "red"') + "\n", "seed is 'red'"),
    ):
        path.write_text(good + wrong)
        with pytest.raises(ValueError, match=message):
            Content.read(path)
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1: no header"):
        Content.read(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        Content.read(path)


def test_a_row_never_holds_what_is_no_number(measured):
    with pytest.raises(ValueError, match="must not hold"):
        replace(measured[0].row, seconds=math.nan).to_json()


# -- models and schedulers


def test_a_directory_is_a_model():
    model = open_model(str(tiny_pipeline()))
    assert model.dtype == "float32"
    assert (model.steps, model.guidance) == (25, 7.5)  # the pipeline's own default
    assert model.revision == digest(tiny_pipeline())


def test_a_revision_follows_the_content(tmp_path):
    (tmp_path / "a.json").write_text("1")
    first = digest(tmp_path)
    (tmp_path / "notes.md").write_text("no part of the model")
    assert digest(tmp_path) == first
    (tmp_path / "a.json").write_text("2")
    assert digest(tmp_path) != first


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_every_scheduler_runs_as_often_as_it_says(task, name):
    pipe = task.model.pipeline
    pipe.scheduler = make_scheduler(name, pipe.scheduler)
    assert type(pipe.scheduler).__name__ == SHORT_NAMES[name]
    assert pipe.scheduler.config.beta_end == 0.012
    assert price(task, PLAIN, counting=False).evaluations == evaluations(pipe.scheduler, 6)


def test_a_scheduler_that_does_not_fit_is_refused(task):
    own = task.model.pipeline.scheduler
    assert type(make_scheduler("DEISMultistepScheduler", own)).__name__ == "DEISMultistepScheduler"
    with pytest.raises(ValueError, match="did you mean 'euler'"):
        make_scheduler("eulr", own)
    with pytest.raises(ValueError, match=r"no scheduler is called .AutoencoderKL.\. Short names: ddim"):
        make_scheduler("AutoencoderKL", own)
    with pytest.raises(ValueError, match="does not fit a model that was trained for DDIMScheduler"):
        make_scheduler("FlowMatchEulerDiscreteScheduler", own)
    with pytest.raises(ValueError, match="does not fit"):
        make_scheduler("ddim", FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pipeline_that_does_not_say_whether_it_guides_is_told(guidance):
    pipe = zoo.load("emoji-pixart")
    methods = [ToCa(3, 0.3, score="cross_attention", schedule="pixart")]
    with attached(pipe, methods, guidance) as attachment:
        draw(pipe, ["sun"], [0], 4, guidance)
    assert attachment.trace.row("transformer_blocks.0.attn2") == "#ooo"
