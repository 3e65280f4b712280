"""Block Caching's scale and shift: identity at first, what it computes, its training, its file, and what is refused."""

from dataclasses import replace
from functools import cache
from itertools import count

import pytest
import torch
from pipelines import CASES, build, run

from whenwhere import BlockCaching, Calibration, attach, calibrate, plan
from whenwhere.decisions.scaleshift import ScaleShift
from whenwhere.setting import configuration_of
from whenwhere.train.scaleshift import train_scale_shift

STEPS = 6
UNITS = {"sd": "layer", "pixart-alpha": "branch", "sd3": "block", "latte": "branch"}


@cache
def calibrated(case: str) -> Calibration:
    pipe = build(case)
    return calibrate(pipe, lambda: run(case, pipe, steps=STEPS), UNITS[case])


def cached(case: str) -> BlockCaching:
    """With a threshold of about two steps' change."""
    measured = calibrated(case)
    changes = sorted(change for row in measured.changes.values() for change in row[1:])
    return BlockCaching(measured, 2.1 * changes[len(changes) // 2])


def teach(case: str, pipe: object, method: BlockCaching, **options: object) -> ScaleShift:
    return train_scale_shift(pipe, method, lambda number: run(case, pipe, steps=STEPS, seed=number + 2), **options)


def latents(case: str, method: BlockCaching) -> torch.Tensor:
    pipe = build(case)
    with attach(pipe, method):
        return run(case, pipe, steps=STEPS, prompts=2)


@cache
def untrained(case: str) -> ScaleShift:
    return teach(case, build(case), cached(case), generations=1, learning_rate=0.0)


def random(case: str) -> ScaleShift:
    found, generator = ScaleShift(*(getattr(untrained(case), n) for n in ("widths", "timesteps", "computed"))), None
    generator = torch.Generator().manual_seed(3)
    for weight in found.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.02
    return found


@pytest.mark.parametrize("case", UNITS)
def test_it_begins_as_the_identity(case):
    method = cached(case)
    assert torch.equal(latents(case, replace(method, scale_shift=untrained(case))), latents(case, method))


def test_it_has_the_papers_number_of_parameters():
    found = untrained("pixart-alpha")
    widths = [width for parts in found.widths.values() for width in parts]
    assert sum(weight.numel() for weight in found.parameters()) == sum(2 * (256 * d + d) for d in widths)
    assert {path for path, row in found.computed.items() if "." in row} == set(found.widths)


def test_a_plan_shows_where_it_adjusts_and_costs_the_same():
    pipe, method = build("pixart-alpha"), cached("pixart-alpha")
    plain, adjusted = (
        plan(pipe, m, steps=STEPS) for m in (method, replace(method, scale_shift=untrained("pixart-alpha")))
    )
    assert [row.replace("~", ".") for row in adjusted.rows] == list(plain.rows)
    assert any("~" in row for row in adjusted.rows)
    assert adjusted.cost.macs == plain.cost.macs


@pytest.mark.parametrize("case", ["pixart-alpha", "sd"])
def test_a_naive_loop_agrees(case):
    """Every unit's forward is replaced by one that stores what it added, or adjusts what it stored, by hand."""
    found, method = random(case), replace(cached(case), scale_shift=random(case))
    pipe, step, now = build(case), count(), {}
    denoiser = getattr(pipe, CASES[case].denoiser)
    branch = UNITS[case] == "branch"

    def replacement(path, original):
        kept = {}

        def forward(x, *args, **kwargs):
            entered = 0 if branch else x
            if found.computed[path][now["s"]] == "#":
                out = original(x, *args, **kwargs)
                sample = out[0] if isinstance(out, tuple) else out
                kept["added"] = sample - entered
            else:
                linear = found.maps[f"{path}:0"]
                frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 127)
                angles = found.timesteps[now["s"]] * frequencies
                scale, shift = (linear.weight @ torch.cat([angles.sin(), angles.cos()]) / 128**0.5 + linear.bias).chunk(
                    2
                )
                if kept["added"].ndim == 4:
                    scale, shift = scale[:, None, None], shift[:, None, None]
                out = sample = entered + kept["added"] + kept["added"] * scale + shift
            return (sample,) if isinstance(out, tuple) or not branch else sample

        return forward

    denoiser.register_forward_pre_hook(lambda *_: now.update(s=next(step)))
    for path in found.computed:
        module = denoiser.get_submodule(path)
        module.forward = replacement(path, module.forward)
    expected = run(case, pipe, steps=STEPS, prompts=2)
    assert (latents(case, method) - expected).norm() / expected.norm() < 1e-6
    assert not torch.equal(expected, latents(case, cached(case)))


@pytest.mark.parametrize("case", ["pixart-alpha", "sd"])
def test_training_brings_the_student_nearer_to_the_teacher(case):
    pipe, method, errors = build(case), cached(case), []
    weights = {name: value.clone() for name, value in getattr(pipe, CASES[case].denoiser).state_dict().items()}
    plain = run(case, pipe, steps=STEPS)
    found = train_scale_shift(
        pipe,
        method,
        lambda _: run(case, pipe, steps=STEPS),  # untrained networks of several seeds have nothing in common
        generations=24,
        validate_every=12,
        learning_rate=3e-3,
        watch=lambda *told: errors.append(told),
    )
    assert [number for number, _ in errors] == [0, 12, 24]
    assert errors[2][1] < 0.9 * errors[0][1]
    assert torch.equal(run(case, pipe, steps=STEPS), plain)
    for name, value in getattr(pipe, CASES[case].denoiser).named_parameters():
        assert value.grad is None
        assert torch.equal(value, weights[name])
    adjusted = latents(case, replace(method, scale_shift=found))
    assert not torch.equal(adjusted, latents(case, method))


def test_training_unrolls_the_student():
    """What follows a step is the student's latents, not the teacher's."""
    case, seen = "pixart-alpha", []
    teach_nothing = {"generations": 2, "validate_every": 1, "learning_rate": 0.0}
    pipe, method = build(case), cached(case)
    train_scale_shift(pipe, method, lambda _: seen.append(run(case, pipe, steps=STEPS, prompts=2)), **teach_nothing)
    plain, *rolled = seen  # the first one shows timesteps and widths
    assert len(rolled) == 5
    assert not torch.equal(plain, latents(case, method))
    assert all(torch.equal(found, latents(case, method)) for found in rolled)


def test_the_optimiser_is_as_documented(monkeypatch):
    given, plain = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: given.append(plain(*a, **k)) or given[-1])
    teach("pixart-alpha", build("pixart-alpha"), cached("pixart-alpha"), generations=1)
    assert [(group["lr"], group["weight_decay"]) for group in given[0].param_groups] == [(1e-3, 0)]


def test_the_best_is_returned_and_training_ends_when_nothing_gets_better():
    pipe, method, errors = build("pixart-alpha"), cached("pixart-alpha"), []
    found = teach(
        "pixart-alpha",
        pipe,
        method,
        generations=50,
        validate_every=1,
        patience=2,
        learning_rate=1e3,
        watch=lambda *e: errors.append(e),
    )
    assert [number for number, _ in errors] == [0, 1, 2]
    assert not any(weight.any() for weight in found.parameters())  # the identity was best


def test_it_is_saved_and_loaded(tmp_path):
    file, method = tmp_path / "adjusted.safetensors", cached("sd")
    random("sd").save(file)
    assert torch.equal(
        latents("sd", replace(method, scale_shift=str(file))), latents("sd", replace(method, scale_shift=random("sd")))
    )
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"adjusted\.safetensors is no saved scale and shift"):
        replace(method, scale_shift=file)
    with pytest.raises(FileNotFoundError):
        replace(method, scale_shift=tmp_path / "missing.safetensors")


def test_other_timesteps_or_another_model_are_refused():
    method, pipe, found = cached("pixart-alpha"), build("pixart-alpha"), untrained("pixart-alpha")
    later = ScaleShift(found.widths, [t - 1 for t in found.timesteps], found.computed)
    words = r"at 6 steps was trained for the timesteps \(998.0, .*but this generation has \(999.0, .*train one for this"
    with attach(pipe, replace(method, scale_shift=later)), pytest.raises(ValueError, match=words):
        run("pixart-alpha", pipe, steps=STEPS)
    pipe.scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=words):
        plan(pipe, replace(method, scale_shift=later), steps=STEPS, scheduler=pipe.scheduler)
    sized = build("pixart-alpha-sized").transformer
    of_another = ScaleShift(found.widths, found.timesteps, found.computed, configuration_of(sized))
    with pytest.raises(ValueError, match=r"scale and shift is of a PixArtTransformer2DModel with sample_size .* 8;"):
        attach(pipe, replace(method, scale_shift=of_another))


def test_a_file_from_before_it_told_its_model_is_taken(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file, found = tmp_path / "adjusted.safetensors", untrained("pixart-alpha")
    found.save(file)
    assert ScaleShift.load(file).configuration == found.configuration == calibrated("pixart-alpha").configuration
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    del about["configuration"]
    save_file(load_file(file), file, about)
    assert ScaleShift.load(file).configuration is None


def test_another_schedule_is_refused():
    method = cached("pixart-alpha")
    with pytest.raises(ValueError, match="was trained for another schedule than these fields make; train one"):
        replace(method, threshold=method.threshold / 3, scale_shift=untrained("pixart-alpha"))
    with pytest.raises(ValueError, match="ff has a schedule of 2 steps, of 3 timesteps"):
        ScaleShift({"ff": (4,)}, (3, 2, 1), {"ff": "#."})
    with pytest.raises(ValueError, match="reuses nothing, so there is nothing to adjust; raise its threshold"):
        teach("pixart-alpha", build("pixart-alpha"), replace(method, threshold=0))
    with pytest.raises(ValueError, match=r"generate\(-1\) did not run the pipeline; it must call the one"):
        train_scale_shift(build("pixart-alpha"), method, lambda _: None)
    with pytest.raises(ValueError, match="generations must be at least 1"):
        teach("pixart-alpha", build("pixart-alpha"), method, generations=0)
