"""The tiny pipelines are fit for tests: repeatable, well-behaved, and every attention and MLP matters."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention
from pipelines import CASES, POOLED, build, run
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

WITHOUT_CALLBACK = {"sd-adapter", "pixart-alpha", "pixart-alpha-sized", "pixart-sigma", "dit", "skip-dit"}

every_case = pytest.mark.parametrize("name", CASES)


def change(tensor: Tensor, reference: Tensor) -> float:
    return float((tensor - reference).norm() / reference.norm())


def denoiser(name: str, pipe: DiffusionPipeline) -> nn.Module:
    return getattr(pipe, CASES[name].denoiser)


def attentions_and_mlps(network: nn.Module) -> dict[str, nn.Module]:
    kinds = Attention | AttentionModuleMixin | FeedForward
    return {path: module for path, module in network.named_modules() if isinstance(module, kinds)}


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    """The arguments of every call of the network."""
    calls: list[tuple[tuple, dict]] = []
    handle = network.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    yield calls
    handle.remove()


@torch.no_grad()
def predict(network: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    return network(*args, **kwargs | {"return_dict": False})[0]


@every_case
def test_a_run_is_repeatable_bit_for_bit_on_a_fresh_pipeline(name):
    pipe = build(name)
    first = run(name, pipe)
    assert torch.equal(run(name, pipe), first)
    assert torch.equal(run(name, build(name)), first)


@every_case
def test_ten_steps_stay_moderate(name):
    latents = run(name, build(name), steps=10)
    assert latents.isfinite().all()
    assert 0.5 < latents.std() < 50


@every_case
def test_a_row_of_a_batch_equals_its_own_run(name):
    pipe = build(name)
    batch = run(name, pipe, prompts=3)
    assert len(batch) == 3
    for i in range(3):
        assert change(batch[i : i + 1], run(name, pipe, seed=i)) < 1e-4


@every_case
def test_prompt_seed_guidance_steps_and_size_matter(name):
    pipe = build(name)
    plain = run(name, pipe)
    assert change(run(name, pipe, embeds_seed=7), plain) > 1e-2
    assert change(run(name, pipe, seed=7, embeds_seed=0), plain) > 1e-2
    assert change(run(name, pipe, guidance=False), plain) > 1e-2
    assert change(run(name, pipe, steps=4), plain) > 1e-2
    assert run(name, pipe, size=24).numel() > plain.numel()


@every_case
def test_guidance_adds_rows_exactly_where_it_is_said_to(name):
    pipe = build(name)

    def rows(guidance: bool) -> int:
        with recorded(denoiser(name, pipe)) as calls:
            run(name, pipe, prompts=2, steps=2, guidance=guidance)
        return sum(len(next(leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor))) for call in calls)

    assert (rows(guidance=True) > rows(guidance=False)) == CASES[name].guided


@every_case
def test_every_attention_and_mlp_changes_the_prediction(name):
    pipe = build(name)
    network = denoiser(name, pipe)
    with recorded(network) as calls:
        run(name, pipe, steps=2)
    plain = predict(network, *calls[0])
    modules = attentions_and_mlps(network)
    assert len(modules) >= 3
    for path, module in modules.items():
        handle = module.register_forward_hook(lambda *call: tree_map_only(Tensor, torch.zeros_like, call[-1]))
        moved = change(predict(network, *calls[0]), plain)
        handle.remove()
        assert moved > 1e-2, f"{path} moves the prediction by {moved:.1e} only"


@every_case
def test_every_attention_and_mlp_changes_from_step_to_step(name):
    pipe = build(name)
    outputs: dict[str, list[Tensor]] = {}
    for path, module in attentions_and_mlps(denoiser(name, pipe)).items():
        kept = outputs.setdefault(path, [])
        module.register_forward_hook(lambda *call, kept=kept: kept.append(tree_leaves(call[-1])[0]))
    # Wan's first attention sees no text: in one step it is the same in both of its guidance calls.
    run(name, pipe, steps=3, guidance=name != "wan")
    for path, (first, second, *_) in outputs.items():
        constant = name == "svd" and path.endswith("attn2")  # one image token: there is nothing to attend to
        assert constant or change(second, first) > 1e-2, f"{path} hardly changes"


@every_case
def test_a_callback_is_called_or_refused(name):
    pipe = build(name)
    steps = []

    def callback(_, step, __, inputs):
        steps.append(step)
        return inputs

    if name in WITHOUT_CALLBACK:
        with pytest.raises(ValueError, match="has no callback_on_step_end"):
            run(name, pipe, callback=callback)
    else:
        run(name, pipe, callback=callback)
        assert steps == list(range(len(steps)))
        assert steps


def test_the_image_prompt_of_an_ip_adapter_matters():
    pipe = build("sd-ip-adapter")
    other = {"ip_adapter_image_embeds": [torch.ones(2, 1, POOLED)]}
    assert change(run("sd-ip-adapter", pipe, **other), run("sd-ip-adapter", pipe)) > 1e-2
