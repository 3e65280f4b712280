"""Attaching: what is refused, how decisions nest, and living with whoever else touches a forward."""

import copy
import gc
import pickle
import weakref
from dataclasses import dataclass
from typing import ClassVar

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from fakes import TOWER, Every, doubling_pipeline, own_loop
from pipelines import build, run

from whenwhere import DeepCache, GuidanceStop, Method, TGate, attach
from whenwhere.decision import Decision
from whenwhere.site import Kind

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
class Always(Method):
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


def test_a_denoiser_that_is_used_after_a_generation_begins_a_new_one():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe, Every(2), anatomy=TOWER):
        pipe([1.0, 2.0])
        assert pipe.transformer(torch.tensor([[7.0]])).tolist() == [[14.0]]
        assert pipe([3.0, 4.0]) == [6.0, 6.0]


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_attached_model_is_a_plain_model_with_weights_of_its_own(copied):
    pipe = doubling_pipeline(blocks=2)
    with attach(pipe, Every(2), anatomy=TOWER):
        twin = copied(pipe.transformer)
        for block in twin.blocks:
            block.attn.weight.fill_(3.0)
        assert pipe([10.0, 11.0]) == [40.0, 40.0]
        assert twin(torch.tensor([[1.0]])).tolist() == [[9.0]]
    assert twin(torch.tensor([[1.0]])).tolist() == [[9.0]]
    assert pipe([10.0, 11.0]) == [40.0, 44.0]


def test_methods_may_be_attached_to_a_copy_of_an_attached_model():
    pipe, other = doubling_pipeline(blocks=1), doubling_pipeline(blocks=1)
    with attach(pipe, Every(2), anatomy=TOWER):
        other.transformer = copy.deepcopy(pipe.transformer)
        with attach(other, Every(3), anatomy=TOWER):
            assert other([1.0, 2.0, 3.0]) == [2.0, 2.0, 2.0]
            assert pipe([1.0, 2.0, 3.0]) == [2.0, 2.0, 6.0]


# -- others who touch a forward ----------------------------------------------------------------------------------------


def hooked(pipe: DiffusionPipeline):
    """Accelerate's hook, as offloading puts it on the denoiser; with what takes it off."""
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):  # noqa: ARG002
            calls.append(1)
            return args, kwargs

    hooks.add_hook_to_module(pipe.unet, Hook())
    return calls, lambda: hooks.remove_hook_from_module(pipe.unet)


def treated(name: str, method: Method) -> torch.Tensor:
    pipe = build(name)
    with attach(pipe, method):
        return run(name, pipe)


def test_a_hook_that_was_there_before_stays_and_runs():
    pipe = build("sd")
    plain, expected = run("sd", pipe), treated("sd", GATE)
    calls, _ = hooked(pipe)
    forward = vars(pipe.unet)["forward"]
    with attach(pipe, GATE) as attachment:
        assert torch.equal(run("sd", pipe), expected)
        assert attachment.plan.cost == attachment.trace.cost
    assert len(calls) == 6
    assert vars(pipe.unet)["forward"] is forward
    assert torch.equal(run("sd", pipe), plain)


def test_a_hook_that_comes_and_goes_later_changes_nothing():
    pipe = build("sd")
    expected = treated("sd", GATE)
    with attach(pipe, GATE):
        calls, unhook = hooked(pipe)
        assert torch.equal(run("sd", pipe), expected)
        with pytest.raises(ValueError, match="attached already"):
            attach(pipe, GATE)
        unhook()
        assert torch.equal(run("sd", pipe), expected)
    assert len(calls) == 6
    assert "forward" not in vars(pipe.unet)


def test_what_was_put_over_ours_is_left_with_a_warning_and_nothing_of_ours_acts():
    pipe = build("sd")
    plain = run("sd", pipe)
    attachment = attach(pipe, GATE)
    calls, unhook = hooked(pipe)
    with pytest.warns(UserWarning, match="forward of a UNet2DConditionModel was replaced after attaching"):
        attachment.detach()
    assert torch.equal(run("sd", pipe), plain)
    assert len(calls) == 6
    unhook()
    assert torch.equal(run("sd", pipe), plain)


def test_a_forward_that_offloading_put_back_is_an_error_and_not_silence():
    pipe = build("sd")
    _, unhook = hooked(pipe)
    attachment = attach(pipe, GATE)
    run("sd", pipe)
    unhook()  # as offloading does at the end of every run
    with pytest.raises(RuntimeError, match="attach before you turn it on"):
        run("sd", pipe)
    with pytest.warns(UserWarning, match="replaced after attaching"):
        attachment.detach()


def test_a_wrapper_that_does_not_say_what_it_wraps_is_no_error():
    pipe = build("sd")
    expected = treated("sd", GATE)
    with attach(pipe, GATE):
        ours = pipe.unet.forward
        vars(pipe.unet)["forward"] = lambda *args, **kwargs: ours(*args, **kwargs)
        assert torch.equal(run("sd", pipe), expected)
        vars(pipe.unet)["forward"] = ours


def test_weights_that_are_fetched_from_elsewhere_are_priced_without_fetching():
    """Sequential offloading: the weights are on the meta device, hooks bring them when a module is called."""
    accelerate = pytest.importorskip("accelerate")
    pipe = build("sd")
    unet, scheduler = pipe.unet, pipe.scheduler
    with attach(unet, DeepCache(interval=2), scheduler=scheduler) as attachment:
        latents, expected = own_loop(unet, scheduler, 4), attachment.plan.cost
    accelerate.cpu_offload(unet, execution_device="cpu")
    assert next(unet.parameters()).device.type == "meta"
    with attach(unet, DeepCache(interval=2), scheduler=scheduler) as attachment:
        assert torch.equal(own_loop(unet, scheduler, 4), latents)
        assert attachment.plan.cost == expected == attachment.trace.cost


def test_a_compiled_denoiser_is_attached_to_inside():
    pipe = build("sd")
    plain = run("sd", pipe)
    inside = pipe.unet
    pipe.unet = torch.compile(inside, backend="eager")
    with attach(pipe, GATE) as attachment:
        assert attachment.sites[0].kind is Kind.MODEL
        assert "forward" in vars(inside)
    assert "forward" not in vars(inside)
    pipe.unet = inside
    assert torch.equal(run("sd", pipe), plain)


@pytest.mark.slow
def test_a_compiled_denoiser_carries_decisions_out():
    pipe = build("sd")
    expected = treated("sd", GATE)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with attach(pipe, GATE) as attachment:
        assert torch.equal(run("sd", pipe), expected)
        assert attachment.trace.rows == attachment.plan.rows


# -- what else a caller may ask for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [GATE, GuidanceStop(2), DeepCache(interval=2)])
def test_several_images_of_one_prompt_equal_their_own_runs(method):
    pipe = build("sd")
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with attach(pipe, method):
        images = run("sd", pipe, num_images_per_prompt=2, generator=generators)
        assert len(images) == 2
        for i in range(2):
            alone = run("sd", pipe, seed=i, embeds_seed=0)
            assert (images[i : i + 1] - alone).norm() < 1e-4 * alone.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [GATE, DeepCache(interval=2)])
def test_half_precision_is_remembered_in_half_the_bytes(method, dtype):
    pipe = build("sd")
    with attach(pipe, method) as attachment:
        run("sd", pipe)
        bytes_of_singles = attachment.trace.held
    pipe.to(dtype)
    plain = run("sd", pipe)
    with attach(pipe, method) as attachment:
        latents = run("sd", pipe)
        assert attachment.trace.held == attachment.plan.cost.bytes == bytes_of_singles // 2
    assert latents.dtype is dtype
    assert latents.isfinite().all()
    assert torch.equal(run("sd", pipe), plain)
