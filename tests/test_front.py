"""What stands in front of a forward lives with copies, other wrappers, compilation and half precision."""

import copy
import pickle

import pytest
import torch
from diffusers import DiffusionPipeline
from fakes import TOWER, Every, doubling_pipeline, own_loop
from pipelines import build, run

from whenwhere import DeepCache, GuidanceStop, Method, TGate, attach
from whenwhere.site import Kind

GATE = TGate(gate_step=3, sp_interval=2, warm_up=0)


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
