"""Attaching: how decisions nest, what is refused, coming and going."""

import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar
from unittest.mock import patch

import diffusers
import pytest
import torch
from fakes import TOWER, Every, Nesting, doubling_pipeline
from pipelines import build, run

from whenwhere import DeepCache, FewerSteps, Method, TGate, attach, detach, plan
from whenwhere.clock import Step
from whenwhere.decision import Decision
from whenwhere.decisions.prior import Prior
from whenwhere.site import Kind, Site

GATE = TGate(gate_step=3, sp_interval=2, warm_up=0)


@dataclass(frozen=True)
class Plus(Decision):
    """Run, and add."""

    amount: float
    symbol: ClassVar[str] = "+"
    name: ClassVar[str] = "added to"

    def apply(self, call, slot):  # noqa: ARG002
        return call.run() + self.amount


@dataclass(frozen=True)
class Times(Decision):
    """Run, and multiply."""

    factor: float
    symbol: ClassVar[str] = "*"
    name: ClassVar[str] = "multiplied"

    def apply(self, call, slot):  # noqa: ARG002
        return call.run() * self.factor


@dataclass(frozen=True)
class Always(Nesting):
    """The same decision at every block and step."""

    decision: Decision | None

    kinds: ClassVar = frozenset({Kind.BLOCK})
    idle_reason: ClassVar = "it was told to do nothing."

    def decide(self, site, step):  # noqa: ARG002
        return self.decision


# -- what decisions do -------------------------------------------------------------------------------------------------


def test_a_method_of_twenty_lines_reuses_every_other_step():
    pipe = doubling_pipeline(blocks=2)  # every block doubles: 10 -> 40
    with attach(pipe, Every(2), anatomy=TOWER):
        assert pipe([10.0, 11.0, 12.0]) == [40.0, 40.0, 48.0]
    assert pipe([10.0, 11.0, 12.0]) == [40.0, 44.0, 48.0]


def test_the_outer_decision_encloses_the_inner_one():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe, Always(Plus(1)), Always(Times(3)), anatomy=TOWER):
        assert pipe([10.0]) == [61.0]  # (2 * 10) * 3 + 1
    with attach(pipe, Always(Times(3)), Always(Plus(1)), anatomy=TOWER):
        assert pipe([10.0]) == [63.0]  # (2 * 10 + 1) * 3


def test_a_method_remembers_what_the_methods_inside_it_made():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe, Every(2), Always(Plus(1)), anatomy=TOWER):
        assert pipe([10.0, 20.0]) == [21.0, 21.0]
    with attach(pipe, Always(Plus(1)), Every(2), anatomy=TOWER):
        assert pipe([10.0, 20.0]) == [21.0, 21.0]


def test_methods_remember_apart_from_each_other():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe, Every(2), Every(4), anatomy=TOWER) as attachment:
        assert pipe([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [2.0, 2.0, 2.0, 2.0, 10.0, 10.0]
    assert attachment.trace.row("blocks.0") == "#...#."


def test_a_method_that_never_acts_warns_once_with_its_reason():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe, Always(None), anatomy=TOWER):
        with pytest.warns(UserWarning, match=r"Always\(decision=None\) changed nothing in 2 steps: it was told to"):
            pipe([1.0, 2.0])
        assert pipe([1.0, 2.0]) == [2.0, 4.0]


def test_the_warning_points_at_the_line_that_called_the_pipeline():
    pipe = build("sd")
    with attach(pipe, DeepCache(interval=1)), pytest.warns(UserWarning, match="changed nothing") as caught:
        run("sd", pipe)
    assert caught[0].filename.endswith("pipelines.py")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_attaching_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one method"):
        attach(build("sd"))


@pytest.mark.parametrize("thing", [DeepCache, "deepcache", None])
def test_what_is_no_method_is_refused(thing):
    with pytest.raises(TypeError, match="is not a method"):
        attach(build("sd"), thing)


def test_a_pipeline_without_a_denoiser_is_refused():
    with pytest.raises(TypeError, match="str has neither a unet nor a transformer"):
        attach("a pipeline", DeepCache())


@pytest.mark.parametrize("scheduler", [None, "ddim"])
def test_a_denoiser_without_a_scheduler_is_refused_and_stays_untouched(scheduler):
    unet = build("sd").unet
    with pytest.raises(TypeError, match="nobody tells which step it is"):
        attach(unet, DeepCache(), scheduler=scheduler)
    assert not any("forward" in vars(module) for module in unet.modules())


def test_an_unknown_family_is_refused_unless_its_anatomy_is_given():
    pipe = doubling_pipeline(blocks=1)
    with pytest.raises(ValueError, match="Tower has no anatomy"):
        attach(pipe, Every())
    attach(pipe, Every(), anatomy=TOWER).detach()


def test_a_method_that_finds_no_site_is_refused():
    @dataclass(frozen=True)
    class Stages(Every):
        kinds: ClassVar = frozenset({Kind.STAGE})

    with pytest.raises(ValueError, match="asks about stage; PixArtTransformer2DModel has none"):
        attach(build("pixart-sigma"), Stages())


def test_attaching_twice_is_refused_and_the_first_one_goes_on():
    pipe = build("sd")
    with attach(pipe, GATE):
        expected = run("sd", pipe)
        with pytest.raises(ValueError, match=r"attached already.*all methods to one attach"):
            attach(pipe, DeepCache())
        assert torch.equal(run("sd", pipe), expected)


def test_pipelines_that_share_a_unet_share_what_is_attached():
    pipe = build("sd")
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with attach(pipe, GATE), pytest.raises(ValueError, match="attached already"):
        attach(other, GATE)


def test_there_is_no_plan_before_anything_ran():
    with attach(build("sd"), GATE) as attachment:
        for name in ("plan", "trace"):
            with pytest.raises(RuntimeError, match=rf"no {name} yet.*whenwhere.plan\("):
                getattr(attachment, name)


# -- coming and going --------------------------------------------------------------------------------------------------


def test_detaching_twice_is_as_good_as_once():
    pipe = build("sd")
    attachment = attach(pipe, GATE)
    attachment.detach()
    attachment.detach()
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_an_error_inside_the_with_block_detaches():
    pipe = doubling_pipeline(blocks=1)
    with pytest.raises(KeyError), attach(pipe, Every(), anatomy=TOWER):
        raise KeyError
    assert pipe([1.0, 2.0]) == [2.0, 4.0]


def test_attachments_on_two_pipelines_are_independent():
    first, second = build("sd"), build("sd")
    alone = {}
    for method in (GATE, DeepCache(interval=2)):
        with attach(first, method):
            alone[method] = run("sd", first)
    with attach(first, GATE), attach(second, DeepCache(interval=2)):
        for _ in range(2):
            assert torch.equal(run("sd", first), alone[GATE])
            assert torch.equal(run("sd", second), alone[DeepCache(interval=2)])


def test_pipelines_that_share_a_scheduler_may_both_have_methods():
    first, second = doubling_pipeline(blocks=1), doubling_pipeline(blocks=1)
    second.scheduler = first.scheduler
    with attach(first, Every(2), anatomy=TOWER), attach(second, Every(3), anatomy=TOWER):
        assert first([1.0, 2.0, 3.0]) == [2.0, 2.0, 6.0]
        assert second([1.0, 2.0, 3.0]) == [2.0, 2.0, 2.0]
    assert set(vars(first.scheduler)) == {"timesteps"}


def test_attaching_inside_a_running_loop_disturbs_neither_it_nor_the_next():
    pipe = build("sd")
    with attach(pipe, GATE):
        expected = run("sd", pipe)
    attachments = []

    def callback(pipe, step, timestep, inputs):  # noqa: ARG001
        if step == 2:
            attachments.append(attach(pipe, GATE))
        return inputs

    assert run("sd", pipe, callback=callback).isfinite().all()
    assert torch.equal(run("sd", pipe), expected)
    attachments[0].detach()


def test_detaching_inside_a_running_loop_runs_the_rest_plainly():
    pipe = build("sd")
    plain = run("sd", pipe)
    attachment = attach(pipe, DeepCache(interval=2))

    def callback(pipe, step, timestep, inputs):  # noqa: ARG001
        if step == 0:  # so far nothing was reused
            attachment.detach()
        return inputs

    assert torch.equal(run("sd", pipe, callback=callback), plain)


def test_memory_is_dropped_at_the_end_of_a_generation():
    pipe = doubling_pipeline(blocks=1)
    kept = []
    pipe.transformer.blocks[0].attn.register_forward_hook(lambda *call: kept.append(weakref.ref(call[-1])))
    with attach(pipe, Every(3), anatomy=TOWER):
        pipe([1.0, 2.0])
        gc.collect()
        assert len(kept) == 1
        assert kept[0]() is None


@dataclass(frozen=True)
class AtTheEnd(Method):
    """Adds to what the last step starts from."""

    kinds: ClassVar = frozenset({Kind.SCHEDULER})

    def decide(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        return Prior(alpha=1.0, keep=False) if step.last else None


def test_a_decision_about_the_scheduler_is_carried_out_in_the_last_step_too():
    pipe = build("sd")
    with patch.object(pipe.scheduler, "step", wraps=pipe.scheduler.step) as moved:
        plain = run("sd", pipe)
    with attach(pipe, AtTheEnd()) as attachment:
        latents = run("sd", pipe)
    torch.testing.assert_close(latents, plain + moved.call_args.args[2])
    assert attachment.trace.rows == attachment.plan.rows


def test_memory_is_dropped_when_the_scheduler_fails():
    pipe = build("sd")
    with attach(pipe, DeepCache(2)) as attachment:
        broken = patch.object(pipe.scheduler, "_get_variance", side_effect=OSError("worn out"))
        with broken, pytest.raises(OSError, match="worn out"):
            run("sd", pipe)
        assert attachment._course.latest.memory.peak
        assert attachment._course.present is None


def test_a_denoiser_that_is_used_after_a_generation_begins_a_new_one():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe, Every(2), anatomy=TOWER):
        pipe([1.0, 2.0])
        assert pipe.transformer(torch.tensor([[7.0]])).tolist() == [[14.0]]
        assert pipe([3.0, 4.0]) == [6.0, 6.0]


# -- without what attach returned ------------------------------------------------------------------------------------


def test_what_nobody_kept_is_taken_off_by_the_pipeline():
    pipe = build("sd")
    plain = run("sd", pipe)
    attach(pipe, DeepCache(3))
    detach(pipe)
    assert torch.equal(run("sd", pipe), plain)
    assert "forward" not in vars(pipe.unet)
    with pytest.raises(ValueError, match="nothing is attached to UNet2DConditionModel"):
        detach(pipe)


def test_what_something_stood_over_is_given_back_when_it_is_gone():
    """As offloading does, whose hooks hold the forward that they found."""
    pipe = build("sd")
    attached = attach(pipe, DeepCache(3))
    held = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: held(*args, **kwargs)
    with pytest.warns(UserWarning, match=r"replaced after attaching.*or detach again when what replaced it is gone"):
        attached.detach()
    pipe.unet.forward = held
    with attach(pipe, DeepCache(2)):  # what is left there does nothing
        pass
    attached.detach()
    assert "forward" not in vars(pipe.unet)


def test_an_attachment_says_what_it_is():
    with attach(build("sd"), DeepCache(3)) as attached:
        assert repr(attached) == f"<{DeepCache(3)!r} attached to UNet2DConditionModel>"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (FewerSteps(5), "FewerSteps and CFG are settings to compare with"),
        ("tgate(3)", "the command line alone takes text"),
        (TGate, r"is not a method; write TGate\(...\), with its fields"),
    ],
)
def test_what_is_no_method_is_neither_attached_nor_planned(asked, words):
    for refuse in (lambda: attach(build("sd"), asked), lambda: plan("sd15", asked, steps=4)):
        with pytest.raises(TypeError, match=words):
            refuse()


def test_guidance_is_a_truth_value_and_no_scale():
    for refuse in (lambda: attach(build("sd"), TGate(3), guidance=7.5), lambda: plan("sd15", steps=4, guidance=7.5)):
        with pytest.raises(TypeError, match=r"guidance must be True or False, got 7\.5"):
            refuse()
