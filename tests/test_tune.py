"""`whenwhere tune`: exact schedules, a search that reaches its goal, a choice that is judged on what it never saw."""

import itertools
import json
import random
import sys
from dataclasses import replace

import pytest
from saved import tiny_pipeline
from tiny_models import dit
from typer.testing import CliRunner

import whenwhere
from whenwhere import attach, calibrate, load_choice
from whenwhere.bench.choice import Choice, Rival
from whenwhere.bench.drawing import draw
from whenwhere.bench.drift import drift, least_drift
from whenwhere.bench.forms import Form, Whole, forms
from whenwhere.bench.intervals import Interval
from whenwhere.bench.model import Model, open_model
from whenwhere.bench.studio import IDENTICAL, Studio
from whenwhere.bench.trial import verdicts
from whenwhere.bench.tune import open_forms, tune
from whenwhere.bench.tune_search import Goal, nearest, search
from whenwhere.bench.variant import Task
from whenwhere.cli import app
from whenwhere.expression import parse

pytest.importorskip("optuna", reason="the extra `tune` is not installed")

STEPS = 8


@pytest.fixture(scope="module")
def task():
    return Task(open_model(str(tiny_pipeline()), "cpu"), ["a fox", "a cat"], [0], 1, STEPS, 3.0, size=(16, 16))


def test_the_drift_of_a_schedule_adds_up_what_changed_since_each_full_step():
    # Steps 1 and 2 reuse step 0: 1, then 1 + 2; step 4 reuses step 3: 4.
    assert drift((0.0, 1.0, 2.0, 8.0, 4.0), (0, 3)) == 1 + 3 + 4


def test_the_schedule_of_least_drift_is_that_of_trying_all():
    numbers = random.Random(0)
    for steps in (1, 4, 7):
        changes = [0.0, *(numbers.random() for _ in range(steps - 1))]
        for count in range(1, steps + 1):
            every = ((0, *rest) for rest in itertools.combinations(range(1, steps), count - 1))
            least = min(drift(changes, full) for full in every)
            found = least_drift(changes, count)
            assert len(found) == count
            assert drift(changes, found) == pytest.approx(least)


def test_full_steps_stand_where_changes_are_large():
    assert least_drift((0.0, 0.1, 0.1, 9.0, 0.1, 0.1), 2) == (0, 3)
    assert least_drift((0.0, 1.0, 1.0, 1.0), 4) == (0, 1, 2, 3)


def test_no_schedule_has_more_full_steps_than_steps():
    with pytest.raises(ValueError, match=r"of 3 steps 1 to 3 can be full ones, got 4"):
        least_drift((0.0, 1.0, 1.0), 4)
    with pytest.raises(ValueError, match=r"changes must be at least 0, got -1"):
        least_drift((0.0, -1.0), 1)


def test_every_form_writes_methods_that_are_read_back():
    for form in forms(12, rungs=3, blocks=4, schedules={n: tuple(range(n)) for n in range(1, 13)}, calibration=""):
        for value in form.settings():
            assert parse(form.write({**form.lows(), **form.start, form.cost: value})), form.name


def test_a_default_is_found_at_the_cost_that_is_nearest(task):
    studio = Studio(task)
    form = Form("DeepCache", "deepcache(interval={n})", (Whole("n", 2, 6),), {}, "n")
    ratios = {n: studio.ratio(f"deepcache(interval={n})") for n in range(2, 7)}
    for n, ratio in ratios.items():
        found = nearest(studio, form, ratio)
        assert found is not None
        assert ratios[found["n"]] == pytest.approx(ratio), n
    assert nearest(studio, form, 50.0) is None


def test_what_does_not_fit_has_no_ratio_and_identical_pictures_have_a_finite_quality(task):
    studio = Studio(task)
    assert studio.ratio("deltadit(interval=2)") is None
    assert studio.quality("deepcache(interval=1)") == IDENTICAL
    assert studio.quality("deepcache(interval=4)") < IDENTICAL
    assert studio.drawn == 2


def test_a_search_keeps_to_the_cost_and_to_its_trials(task, tmp_path):
    studio = Studio(task)
    known = open_forms(studio, tmp_path / "measured.json")
    assert "DeepCache, least drift" in {form.name for form in known}
    found = search(studio, known, Goal("macs", 2.0), 2.0, 5, lambda _: None)
    assert len(found) == studio.drawn == 5
    assert all(2.0 <= candidate.ratio <= 2.5 for candidate in found)
    assert [c.quality for c in found] == sorted((c.quality for c in found), reverse=True)


def test_a_floor_of_quality_is_kept_on_the_tuning_prompts(task, tmp_path):
    studio = Studio(task)
    known = open_forms(studio, tmp_path / "measured.json")
    qualities = sorted(studio.quality(f"deepcache(interval={n})") for n in (2, 4))
    floor = sum(qualities) / 2
    found = search(studio, known, Goal("psnr", floor), 1.0, 5, lambda _: None)
    assert all(candidate.quality >= floor for candidate in found)
    assert [c.ratio for c in found] == sorted((c.ratio for c in found), reverse=True)


def test_a_choice_is_judged_on_what_was_held_out_and_its_file_attaches(task, tmp_path):
    other = replace(task, prompts=["a dog"], seeds=[5, 6])
    choice = tune(task, other, Goal("macs", 1.8), 4, tmp_path / "measured.json")
    assert choice.own.macs_ratio >= 1.8
    assert any(rival.label.startswith("FewerSteps") for rival in choice.rivals)
    assert choice.said
    choice.save(tmp_path / "choice.json")
    loaded = load_choice(tmp_path / "choice.json")
    assert (loaded.own, loaded.rivals, loaded.said) == (choice.own, choice.rivals, choice.said)
    names = {name: getattr(whenwhere, name) for name in whenwhere.__all__}
    pipe = task.model.pipeline
    names["pipe"] = pipe
    exec(choice.python.replace("; attach", "; attached = attach"), names)  # the line that is printed runs as it is
    attached = names["attached"]
    assert "forward" in vars(pipe.unet)
    attached.detach()
    with attach(pipe, *loaded.methods) as attachment:
        assert [type(m) for m in attachment.methods] == [type(m) for m in loaded.methods]


def test_a_transformer_is_tuned_too(tmp_path):
    pipe = dit()
    task = Task(Model("dit", pipe, "", STEPS, 3.0), ["1"], [0], 1, STEPS, 3.0)
    studio = Studio(task)
    known = open_forms(studio, tmp_path / "measured.json")
    assert "FORA" in {form.name for form in known}
    blocks = next(form for form in known if form.name == "Block Caching")
    assert studio.ratio(blocks.write({"threshold": 20.0})) > 1.5
    assert studio.quality("fora(interval=2)") < IDENTICAL


def test_measured_changes_travel_beside_the_choice(tmp_path):
    (tmp_path / "a").mkdir()
    measured = tmp_path / "a" / "changes.json"
    pipe = dit()
    calibrate(pipe, lambda: draw(pipe, ["1"], [0], 4, 3.0), guidance=True).save(measured)
    text = f"BlockCaching(calibration={str(measured)!r}, threshold=2.0)"
    choice = a_choice(expression=text, calibration=str(measured))
    choice.save(tmp_path / "a" / "choice.json")
    (tmp_path / "a").rename(tmp_path / "b")
    (method,) = load_choice(tmp_path / "b" / "choice.json").methods
    assert method.measured.setting.steps == 4
    (tmp_path / "b" / "changes.json").unlink()
    with pytest.raises(FileNotFoundError, match="names measured changes that are not there"):
        load_choice(tmp_path / "b" / "choice.json")


def test_a_file_that_is_no_choice_is_refused(tmp_path):
    path = tmp_path / "choice.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"is no saved choice.*`whenwhere tune` writes one"):
        load_choice(path)
    a_choice(expression="FewerSteps(steps=3)").save(path)
    with pytest.raises(ValueError, match="it names no method"):
        load_choice(path)


def test_a_verdict_needs_an_interval_on_one_side_of_zero():
    own = rival(0.0, 0.0, 0.0)
    beaten, shared, ahead = rival(2.0, 1.0, 3.0), rival(1.0, -1.0, 3.0), rival(-2.0, -3.0, -1.0)
    assert [r.verdict for r in (beaten, shared, ahead, rival(1.0, None, None))] == [
        "beaten",
        "not shown",
        "ahead",
        "not shown",
    ]
    said = verdicts(own, [beaten, shared, ahead, replace(beaten, macs_ratio=4.0)])
    assert [sentence.split(",")[0].split(":")[0] for sentence in said] == [
        "It beats DeepCache(interval=3).",
        "It is not shown to beat",
        "It does NOT beat",
        "Not at equal cost",
    ]
    assert "nothing to compare with" in verdicts(own, [])[0]


def test_tuning_and_judging_on_the_same_pictures_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match="2 pairs of prompt and seed are both tuned on and held out"):
        tune(task, task, Goal("macs", 2.0), 1, tmp_path / "measured.json")


def test_what_cannot_be_reached_is_said(task, tmp_path):
    other = replace(task, seeds=[1])
    with pytest.raises(ValueError, match="nothing reaches macs 90"):
        tune(task, other, Goal("macs", 90.0), 1, tmp_path / "measured.json")


def test_the_command_writes_a_choice_and_says_how_it_stands(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\na cat\na dog\na hen\n")
    out = tmp_path / "choice.json"
    base = ["tune", str(tiny_pipeline()), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "8", "--device", "cpu"]
    result = CliRunner().invoke(app, [*base, "--guidance", "3", "--macs", "1.7", "--trials", "3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "the choice" in result.stdout
    assert "attach(pipe, " in result.stdout
    assert json.loads(out.read_text())["goal"] == "macs 1.7"
    result = CliRunner().invoke(app, base)
    assert result.exit_code == 2
    assert "give one of --speedup, --macs and --psnr" in result.stderr
    result = CliRunner().invoke(app, [*base, "--speedup", "0.5"])
    assert "speedup must be above 1, got 0.5" in result.stderr


@pytest.mark.parametrize(
    ("package", "extra"), [("optuna", "whenwhere[tune]"), ("torchmetrics.functional.image", "whenwhere[metrics]")]
)
def test_what_is_missing_is_named_before_anything_runs(package, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "choice.json"
    result = CliRunner().invoke(app, ["tune", "emoji-unet", "--macs", "2", "--out", str(out)])
    assert result.exit_code == 2
    assert f"pip install '{extra}'" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "prompts.txt holds no prompts"),
        (b"\xff\xfe", "prompts.txt is no text in UTF-8"),
        (b"red\n", "tuning needs at least two prompts: one to tune on and one to judge on"),
    ],
)
def test_prompts_that_cannot_be_tuned_on_are_refused(content, message, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    asked = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "choice.json")]
    result = CliRunner().invoke(app, ["tune", str(tiny_pipeline()), "--macs", "2", *asked])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "choice.json").exists()


def rival(value: float, low: float | None, high: float | None) -> Rival:
    some = Interval(1.0, None, None)
    return Rival("DeepCache", "DeepCache(interval=3)", 2.0, some, some, some, Interval(value, low, high))


def a_choice(**fields) -> Choice:
    common = {
        "model": "m",
        "revision": "r",
        "scheduler": "DDIMScheduler",
        "steps": 4,
        "guidance": 3.0,
        "goal": "macs 2",
        "expression": "",
        "calibration": "",
        "own": rival(0.0, 0.0, 0.0),
        "rivals": (),
        "said": (),
        "environment": {},
    }
    return Choice(**common | fields)
