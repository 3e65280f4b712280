"""The laws every method obeys on every pipeline it accepts, as functions of a setting and a case.

A new method adds one `Setting`, here or beside its own tests; what it refuses is written there by hand. A test in
`test_laws_of_all.py` fails until it has one.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from interruptions import INTERRUPTIONS, STEPS
from pipelines import build, run
from torch import Tensor, nn

import whenwhere
from whenwhere import Attachment, Method, attach
from whenwhere.pricing.cost import Cost, Macs, count

IDLE = "changed nothing"
COARSE = "less than two intervals"
UNTOLD = ("dit", "skip-dit")  # whose pipelines do not say that they guide

# Cases that run something besides the denoiser: VAEs, image encoders, ControlNets that no method asks about.
_COMPANY = "img2img inpaint controlnet sd-adapter pix2pix svd dit"


@dataclass(frozen=True, eq=False)
class Setting:
    """A combination of methods, and what becomes of it on every case.

    Attributes:
        name: of the row.
        methods: a setting that changes something in six steps, and in the four of image-to-image.
        neutral: the same methods, set to change nothing in as many steps.
        refused: cases that attach refuses, and a word that its message must contain.
        refused_later: cases that are refused at the first step, when the guidance branches are known.
        idle: cases that are accepted although there is nothing to do, so that a warning says so.
        guided: whether the pipelines are run with guidance.
        told: cases that attach must be told of whether they guide.
    """

    name: str
    methods: tuple[Method, ...]
    neutral: Callable[[int], tuple[Method, ...]]
    refused: Mapping[str, str]
    refused_later: Mapping[str, str]
    idle: frozenset[str] = frozenset()
    guided: bool = True
    told: tuple[str, ...] = UNTOLD

    def accepts(self, case: str) -> bool:
        return case not in self.refused and case not in self.refused_later

    def __str__(self) -> str:
        return self.name


def steps_of(case: str) -> int:
    """Image-to-image runs the last 0.7 of the six steps; SDXL's inpainting has a strength of 0.9999."""
    return {"sd-img2img": 4, "sdxl-img2img": 4, "sdxl-inpaint": 5}.get(case, STEPS)


def attached(pipe: DiffusionPipeline, setting: Setting, case: str, methods: tuple[Method, ...] = ()) -> Attachment:
    """Attach the setting, or other methods as it would be."""
    return attach(pipe, *methods or setting.methods, guidance=setting.guided if case in setting.told else None)


def generate(setting: Setting, case: str, pipe: DiffusionPipeline, **request: Any) -> Tensor:
    """The latents of a run."""
    return run(case, pipe, **{"steps": STEPS, "guidance": setting.guided} | request)


@contextmanager
def idleness(expected: bool) -> Iterator[None]:
    """A generation that warns of an idle method if that is expected; otherwise any warning fails."""
    if expected:
        with pytest.warns(UserWarning, match=IDLE):
            yield
    else:
        yield


@contextmanager
def silent() -> Iterator[None]:
    """A generation in which methods may find nothing to do, or few steps to do it in."""
    with warnings.catch_warnings():
        for word in (IDLE, COARSE):
            warnings.filterwarnings("ignore", f".*{word}", UserWarning)
        yield


@cache
def plain(case: str, guided: bool = True) -> Tensor:
    """The latents of a run without any method."""
    return run(case, build(case), steps=STEPS, guidance=guided)


@cache
def treated(setting: Setting, case: str, steps: int = STEPS) -> Tensor:
    """The latents of a run with the setting on a fresh pipeline."""
    pipe = build(case)
    with attached(pipe, setting, case), silent():
        return generate(setting, case, pipe, steps=steps)


def networks(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def attributes(pipe: DiffusionPipeline) -> dict[str, frozenset[str]]:
    """The names of the instance attributes of every module and of the scheduler."""
    modules = {
        f"{name}.{path}": frozenset(vars(module))
        for name, network in networks(pipe).items()
        for path, module in network.named_modules()
    }
    return modules | {"scheduler": frozenset(vars(pipe.scheduler))}


# -- accepted or refused ---------------------------------------------------------------------------------------------


def accepted_or_refused(setting: Setting, case: str) -> None:
    """A case outside the written table changes the latents; one inside is refused in words that help."""
    pipe = build(case)
    if case in setting.refused:
        before = attributes(pipe)
        with pytest.raises(ValueError, match=setting.refused[case]):
            attached(pipe, setting, case)
        assert attributes(pipe) == before
    elif case in setting.refused_later:
        with attached(pipe, setting, case), pytest.raises(ValueError, match=setting.refused_later[case]):
            generate(setting, case, pipe)
        assert torch.equal(generate(setting, case, pipe), plain(case, setting.guided))
    else:
        with attached(pipe, setting, case), idleness(case in setting.idle):
            latents = generate(setting, case, pipe)
        assert torch.equal(latents, plain(case, setting.guided)) == (case in setting.idle)


# -- neutral is exact ------------------------------------------------------------------------------------------------


def neutral_is_exact(setting: Setting, case: str) -> None:
    pipe = build(case)
    with attached(pipe, setting, case, setting.neutral(steps_of(case))), idleness(True):
        assert torch.equal(generate(setting, case, pipe), plain(case, setting.guided))


# -- nothing left ----------------------------------------------------------------------------------------------------


def nothing_left(setting: Setting, case: str) -> None:
    """After a complete generation."""
    pipe = build(case)
    assert torch.equal(generate(setting, case, pipe), plain(case, setting.guided))
    before = attributes(pipe)
    with attached(pipe, setting, case), silent():
        generate(setting, case, pipe)
    assert attributes(pipe) == before
    assert not any("forward" in names for names in attributes(pipe).values())
    assert torch.equal(generate(setting, case, pipe), plain(case, setting.guided))


def nothing_left_after(interruption: str, setting: Setting, case: str) -> None:
    """After a generation that ended early: the next one is clean, attached and detached."""
    pipe = build(case)
    generate(setting, case, pipe)
    before = attributes(pipe)
    with attached(pipe, setting, case), silent():
        INTERRUPTIONS[interruption](case, pipe, setting.guided)
        assert torch.equal(generate(setting, case, pipe, steps=STEPS + 2), treated(setting, case, STEPS + 2))
        INTERRUPTIONS[interruption](case, pipe, setting.guided)
    assert attributes(pipe) == before
    assert torch.equal(generate(setting, case, pipe), plain(case, setting.guided))


# -- generations are independent -------------------------------------------------------------------------------------


def generations_are_independent(setting: Setting, case: str) -> None:
    """Neither the same generation before, nor one with everything different, changes a generation."""
    pipe = build(case)
    with attached(pipe, setting, case), silent():
        assert torch.equal(generate(setting, case, pipe), treated(setting, case))
        assert torch.equal(generate(setting, case, pipe), treated(setting, case))
        generate(setting, case, pipe, steps=STEPS + 2, prompts=2, size=24, seed=5)
        assert torch.equal(generate(setting, case, pipe), treated(setting, case))
        if case not in setting.told and setting.guided:  # whose guidance is declared once and for all
            generate(setting, case, pipe, steps=STEPS - 1, guidance=False, embeds_seed=9)
            assert torch.equal(generate(setting, case, pipe), treated(setting, case))


# -- the plan tells the truth ----------------------------------------------------------------------------------------


def plan_tells_the_truth(setting: Setting, case: str) -> None:
    """What was planned before anything ran, the plan in force, and what was done: the same rows."""
    pipe, guided = build(case), setting.guided and case != "flux"
    with attached(pipe, setting, case) as attachment, silent():
        generate(setting, case, pipe)
        plan, trace = attachment.plan, attachment.trace
    reads = any(method.reads_timestep for method in setting.methods)
    whole = len(pipe.scheduler.timesteps) == steps_of(case)  # image to image executes the last of its timesteps alone
    timed = {"scheduler": pipe.scheduler} if reads and whole else {}
    beforehand = whenwhere.plan(build(case), *setting.methods, steps=steps_of(case), guidance=guided, **timed)
    assert trace.rows == plan.rows
    assert trace.sites == plan.sites == beforehand.sites
    assert plan.rows == beforehand.rows
    assert trace.cost == plan.cost


# -- the cost is what was promised -----------------------------------------------------------------------------------


def cost_is_what_was_promised(setting: Setting, case: str) -> None:
    """Counted multiply-adds and held bytes equal the planned ones, exactly, for two prompts."""
    pipe = build(case)
    with attached(pipe, setting, case) as attachment, silent():
        _, counted = count(lambda: generate(setting, case, pipe, prompts=2))
        cost, trace = attachment.plan.cost, attachment.trace
    _counted_as_priced(counted, cost, case)
    assert cost.macs.all < cost.baseline.all or case in setting.idle
    assert trace.held == cost.bytes


def trace_costs_what_was_counted(setting: Setting, case: str) -> None:
    """The same for methods that decide while they run: what was done is priced as it was counted."""
    pipe = build(case)
    with attached(pipe, setting, case) as attachment, silent():
        _, counted = count(lambda: generate(setting, case, pipe, prompts=2))
        cost = attachment.trace.cost
    _counted_as_priced(counted, cost, case)
    assert cost.macs.all < cost.baseline.all


def _counted_as_priced(counted: Macs, cost: Cost, case: str) -> None:
    """Counted multiply-adds equal the priced ones, and those of what runs beside the denoiser, exactly.

    Perturbed-attention guidance is the exception: its pipeline takes its cheaper attention off after every run, so the
    network is priced with the ordinary one.
    """
    if case == "sd-pag":
        assert 0 < cost.macs.all - counted.all < 0.15 * counted.all
        return
    company = _macs_of_a_plain_run(case) - cost.baseline
    assert counted == cost.macs + company
    assert company == Macs() or any(word in case for word in _COMPANY.split())
    assert min(company.all, company.papers) >= 0


@cache
def _macs_of_a_plain_run(case: str) -> Macs:
    pipe = build(case)
    return count(lambda: run(case, pipe, steps=STEPS, prompts=2))[1]


# -- a batch equals its prompts one by one ---------------------------------------------------------------------------


def batch_equals_its_prompts(setting: Setting, case: str) -> None:
    pipe = build(case)
    with attached(pipe, setting, case), silent():
        alone = [generate(setting, case, pipe, seed=i) for i in range(3)]
        for prompts in (2, 3):
            together = generate(setting, case, pipe, prompts=prompts)
            assert len(together) == prompts
            for i in range(prompts):
                change = (together[i : i + 1] - alone[i]).norm() / alone[i].norm()
                assert change < 1e-4, f"prompt {i} of {prompts} changes by {change:.1e}"
