"""The tiny pipelines are fit for tests: repeatable, well-behaved, and every attention and MLP matters."""

import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention
from pipelines import CASES, build, run
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

NAMES = list(CASES)


def change(tensor: Tensor, reference: Tensor) -> float:
    return float((tensor - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_repeatable_bit_for_bit_on_a_fresh_pipeline(name):
    pipe = build(name)
    first = run(name, pipe)
    assert torch.equal(run(name, pipe), first)
    assert torch.equal(run(name, build(name)), first)


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_stay_moderate(name):
    latents = run(name, build(name), steps=10)
    assert latents.isfinite().all()
    assert 0.05 < latents.std() < 100


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_batch_equals_its_own_run(name):
    pipe = build(name)
    batch = run(name, pipe, prompts=3)
    assert len(batch) == 3
    for i in range(3):
        alone = run(name, pipe, seed=i)
        assert change(batch[i : i + 1], alone) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_prompt_seed_guidance_size_and_steps_matter(name):
    pipe = build(name)
    plain = run(name, pipe)
    assert change(run(name, pipe, embeds_seed=7), plain) > 1e-2
    assert change(run(name, pipe, seed=7, embeds_seed=0), plain) > 1e-2
    assert change(run(name, pipe, guidance=False), plain) > 1e-2
    assert change(run(name, pipe, steps=4), plain) > 1e-2
    assert run(name, pipe, size=24).numel() != plain.numel()


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_and_mlp_changes_the_prediction(name):
    pipe = build(name)
    network = getattr(pipe, CASES[name].denoiser)
    args, kwargs = first_call(name, pipe, network)
    plain = predict(network, args, kwargs)
    modules = {
        path: m for path, m in network.named_modules() if isinstance(m, Attention | AttentionModuleMixin | FeedForward)
    }
    assert modules
    for path, module in modules.items():
        handle = module.register_forward_hook(lambda *call: tree_map_only(Tensor, torch.zeros_like, call[-1]))
        moved = change(predict(network, args, kwargs), plain)
        handle.remove()
        assert moved > 1e-3, f"{path} moves the prediction by {moved:.1e} only"


@torch.no_grad()
def predict(network: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    return network(*args, **kwargs | {"return_dict": False})[0]


def first_call(name, pipe, network) -> tuple[tuple, dict]:
    calls = []
    handle = network.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    run(name, pipe, steps=2)
    handle.remove()
    return calls[0]
