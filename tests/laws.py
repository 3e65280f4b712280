"""The laws every method obeys on every pipeline it accepts, as functions of a setting and a case.

A new method adds one `Setting` to `SETTINGS` in `test_laws.py`; what it refuses is written there by hand.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from diffusers import DiffusionPipeline
from interruptions import INTERRUPTIONS, STEPS
from pipelines import build, run
from torch import Tensor, nn

import whenwhere
from whenwhere import Attachment, Method, attach
from whenwhere.pricing.cost import Macs, count

IDLE = "changed nothing"

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
    """

    name: str
    methods: tuple[Method, ...]
    neutral: Callable[[int], tuple[Method, ...]]
    refused: Mapping[str, str]
    refused_later: Mapping[str, str]
    idle: frozenset[str] = frozenset()

    def accepts(self, case: str) -> bool:
        return case not in self.refused and case not in self.refused_later

    def __str__(self) -> str:
        return self.name


def steps_of(case: str) -> int:
    """Image-to-image runs the last 0.7 of the six steps; SDXL's inpainting has a strength of 0.9999."""
    return {"sd-img2img": 4, "sdxl-img2img": 4, "sdxl-inpaint": 5}.get(case, STEPS)


def attached(pipe: DiffusionPipeline, case: str, *methods: Method) -> Attachment:
    """Attach; DiTPipeline does not tell that it guides."""
    return attach(pipe, *methods, guidance=True if case == "dit" else None)


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
    """A generation in which methods may find nothing to do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{IDLE}", UserWarning)
        yield


@cache
def plain(case: str) -> Tensor:
    """The latents of a run without any method."""
    return run(case, build(case), steps=STEPS)


@cache
def treated(setting: Setting, case: str, steps: int = STEPS) -> Tensor:
    """The latents of a run with the setting on a fresh pipeline."""
    pipe = build(case)
    with attached(pipe, case, *setting.methods), silent():
        return run(case, pipe, steps=steps)


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
            attached(pipe, case, *setting.methods)
        assert attributes(pipe) == before
    elif case in setting.refused_later:
        with attached(pipe, case, *setting.methods), pytest.raises(ValueError, match=setting.refused_later[case]):
            run(case, pipe, steps=STEPS)
        assert torch.equal(run(case, pipe, steps=STEPS), plain(case))
    else:
        with attached(pipe, case, *setting.methods), idleness(case in setting.idle):
            latents = run(case, pipe, steps=STEPS)
        assert torch.equal(latents, plain(case)) == (case in setting.idle)


# -- neutral is exact ------------------------------------------------------------------------------------------------


def neutral_is_exact(setting: Setting, case: str) -> None:
    pipe = build(case)
    with attached(pipe, case, *setting.neutral(steps_of(case))), idleness(True):
        assert torch.equal(run(case, pipe, steps=STEPS), plain(case))


# -- nothing left ----------------------------------------------------------------------------------------------------


def nothing_left(setting: Setting, case: str) -> None:
    """After a complete generation."""
    pipe = build(case)
    assert torch.equal(run(case, pipe, steps=STEPS), plain(case))
    before = attributes(pipe)
    with attached(pipe, case, *setting.methods), silent():
        run(case, pipe, steps=STEPS)
    assert attributes(pipe) == before
    assert not any("forward" in names for names in attributes(pipe).values())
    assert torch.equal(run(case, pipe, steps=STEPS), plain(case))


def nothing_left_after(interruption: str, setting: Setting, case: str) -> None:
    """After a generation that ended early: the next one is clean, attached and detached."""
    pipe = build(case)
    run(case, pipe, steps=STEPS)
    before = attributes(pipe)
    with attached(pipe, case, *setting.methods), silent():
        INTERRUPTIONS[interruption](case, pipe)
        assert torch.equal(run(case, pipe, steps=STEPS + 2), treated(setting, case, STEPS + 2))
        INTERRUPTIONS[interruption](case, pipe)
    assert attributes(pipe) == before
    assert torch.equal(run(case, pipe, steps=STEPS), plain(case))


# -- generations are independent -------------------------------------------------------------------------------------


def generations_are_independent(setting: Setting, case: str) -> None:
    """Neither the same generation before, nor one with everything different, changes a generation."""
    pipe = build(case)
    with attached(pipe, case, *setting.methods), silent():
        assert torch.equal(run(case, pipe, steps=STEPS), treated(setting, case))
        assert torch.equal(run(case, pipe, steps=STEPS), treated(setting, case))
        run(case, pipe, steps=STEPS + 2, prompts=2, size=24, seed=5)
        assert torch.equal(run(case, pipe, steps=STEPS), treated(setting, case))
        if case != "dit":  # whose guidance is declared once and for all
            run(case, pipe, steps=STEPS - 1, guidance=False, embeds_seed=9)
            assert torch.equal(run(case, pipe, steps=STEPS), treated(setting, case))


# -- the plan tells the truth ----------------------------------------------------------------------------------------


def plan_tells_the_truth(setting: Setting, case: str) -> None:
    """What was planned before anything ran, the plan in force, and what was done: the same rows."""
    pipe = build(case)
    beforehand = whenwhere.plan(pipe, *setting.methods, steps=steps_of(case), guidance=case != "flux")
    with attached(pipe, case, *setting.methods) as attachment, silent():
        run(case, pipe, steps=STEPS)
        plan, trace = attachment.plan, attachment.trace
    assert trace.rows == plan.rows
    assert trace.sites == plan.sites == beforehand.sites
    assert plan.rows == beforehand.rows
    assert trace.cost == plan.cost


# -- the cost is what was promised -----------------------------------------------------------------------------------


def cost_is_what_was_promised(setting: Setting, case: str) -> None:
    """Counted multiply-adds and held bytes equal the planned ones, exactly, for two prompts.

    Perturbed-attention guidance is the exception: its pipeline takes its cheaper attention off after every run, so the
    network is priced with the ordinary one.
    """
    pipe = build(case)
    with attached(pipe, case, *setting.methods) as attachment, silent():
        _, counted = count(lambda: run(case, pipe, steps=STEPS, prompts=2))
        cost, trace = attachment.plan.cost, attachment.trace
    company = _macs_of_a_plain_run(case) - cost.baseline
    if case == "sd-pag":
        assert 0 < cost.macs.all - counted.all < 0.15 * counted.all
    else:
        assert counted == cost.macs + company
        assert company == Macs() or any(word in case for word in _COMPANY.split())
        assert min(company.all, company.papers) >= 0
    assert cost.macs.all < cost.baseline.all or case in setting.idle
    assert trace.held == cost.bytes


@cache
def _macs_of_a_plain_run(case: str) -> Macs:
    pipe = build(case)
    return count(lambda: run(case, pipe, steps=STEPS, prompts=2))[1]


# -- a batch equals its prompts one by one ---------------------------------------------------------------------------


def batch_equals_its_prompts(setting: Setting, case: str) -> None:
    pipe = build(case)
    with attached(pipe, case, *setting.methods), silent():
        alone = [run(case, pipe, steps=STEPS, seed=i) for i in range(3)]
        for prompts in (2, 3):
            together = run(case, pipe, steps=STEPS, prompts=prompts)
            assert len(together) == prompts
            for i in range(prompts):
                change = (together[i : i + 1] - alone[i]).norm() / alone[i].norm()
                assert change < 1e-4, f"prompt {i} of {prompts} changes by {change:.1e}"
