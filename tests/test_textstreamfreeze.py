"""The frozen text stream in joint attention: against naive hooks, and in what it spends."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from naive import denoiser, distance
from pipelines import build, run
from torch import Tensor, nn

from whenwhere import FORA, NAG, DeltaDiT, GuidanceStop, TextStreamFreeze, ToCa, attach, plan
from whenwhere.pricing.cost import count

JOINT = ("sd3", "sd35", "flux", "flux-true-cfg")


@contextmanager
def frozen_keys(model: nn.Module, m: int, calls_per_step: int) -> Iterator[None]:
    """The text stream runs on, but the image reads the keys and values that the text had in evaluation m - 1."""

    def freeze(module: nn.Module, text: int | None) -> None:
        original, seen = module.forward, []

        def forward(tokens: Tensor) -> Tensor:
            output = original(tokens)
            seen.append(output[:, :text])
            step, pass_ = divmod(len(seen) - 1, calls_per_step)
            if step < m:
                return output
            kept = seen[(m - 1) * calls_per_step + pass_]
            return kept if text is None else torch.cat([kept, output[:, text:]], 1)

        module.forward = forward
        frozen.append(module)

    frozen: list[nn.Module] = []
    for path, module in model.named_modules():
        if path.endswith((".attn.add_k_proj", ".attn.add_v_proj")):
            freeze(module, None)
        elif path.startswith("single_") and path.endswith((".attn.to_k", ".attn.to_v")):
            freeze(module, 6)  # tokens of the tiny prompts
    try:
        yield
    finally:
        for module in frozen:
            del module.forward


@cache
def plain(name: str) -> Tensor:
    return run(name, build(name), prompts=2)


@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize("name", JOINT)
def test_the_image_reads_the_text_as_it_was(name, m):
    pipe = build(name)
    with frozen_keys(denoiser(name, pipe), m, 2 if name == "flux-true-cfg" else 1):
        expected = run(name, pipe, prompts=2)
    with attach(pipe, TextStreamFreeze(m)):
        latents = run(name, pipe, prompts=2)
    assert distance(latents, expected) <= 1e-6
    assert distance(latents, plain(name)) > 1e-5


@pytest.mark.parametrize("name", JOINT)
def test_what_it_spends_and_holds_is_what_was_planned(name):
    pipe = build(name)
    with attach(pipe, TextStreamFreeze(2)) as attachment:
        _, counted = count(lambda: run(name, pipe, prompts=2), denoiser(name, pipe))
        planned, trace = attachment.plan, attachment.trace
    assert counted == planned.cost.macs
    assert planned.cost.macs.all < planned.cost.baseline.all
    assert trace.rows == planned.rows
    assert trace.held == planned.cost.bytes


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_fused_projections_are_frozen_alike(name):
    pipe = build(name)
    with attach(pipe, TextStreamFreeze(2)):
        expected = run(name, pipe)
    denoiser(name, pipe).fuse_qkv_projections()
    with attach(pipe, TextStreamFreeze(2)) as attachment:
        _, counted = count(lambda: run(name, pipe), denoiser(name, pipe))
        assert distance(run(name, pipe), expected) < 1e-5
        assert (attachment.trace.held, counted) == (attachment.plan.cost.bytes, attachment.plan.cost.macs)


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("name", ["sd3", "flux-true-cfg"])
def test_guidance_may_stop_before_with_or_after_it(name, stop):
    pipe = build(name)
    with attach(pipe, TextStreamFreeze(3), GuidanceStop(stop)) as attachment:
        _, counted = count(lambda: run(name, pipe, prompts=2), denoiser(name, pipe))
        assert counted == attachment.plan.cost.macs
        assert attachment.trace.rows == attachment.plan.rows


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [FORA(2), DeltaDiT(interval=2, blocks=1)], ids=repr)
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_with_other_methods_the_planned_cost_is_still_exact(name, other, first):
    pipe, own = build(name), TextStreamFreeze(3)
    with attach(pipe, *((own, other) if first else (other, own))) as attachment:
        _, counted = count(lambda: run(name, pipe), denoiser(name, pipe))
        assert counted == attachment.plan.cost.macs
        assert attachment.trace.rows == attachment.plan.rows


def test_a_second_text_must_end_before():
    pipe = build("sd3")
    with attach(pipe, TextStreamFreeze(3), NAG(scale=5.0)), pytest.raises(ValueError, match="let it end before step 3"):
        run("sd3", pipe)
    with attach(pipe, TextStreamFreeze(3), NAG(scale=5.0, end=3)) as attachment:
        run("sd3", pipe)
        assert attachment.trace.rows == attachment.plan.rows


def test_it_is_drawn():
    made = plan(build("sd3"), TextStreamFreeze(3), steps=6)
    groups = dict(made.groups)
    assert set(groups.values()) == {"######", "###iii", "###---"}


def test_models_without_joint_attention_are_refused():
    with pytest.raises(ValueError, match="freezes the text in joint attention; UNet2DConditionModel has none"):
        attach(build("sd"), TextStreamFreeze(3))


def test_a_step_behind_the_last_is_refused():
    with pytest.raises(ValueError, match="freezes at step 9, but only 6 steps are executed"):
        plan(build("sd3"), TextStreamFreeze(9), steps=6)
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        TextStreamFreeze(0)


@pytest.mark.parametrize("reverse", [False, True])
def test_tokens_chosen_from_both_streams_are_refused(reverse):
    pipe, methods = build("flux"), [ToCa(3, 0.3, schedule="flux"), TextStreamFreeze(4)]
    with attach(pipe, *methods[:: -1 if reverse else 1]), pytest.raises(ValueError, match="another method gives"):
        run("flux", pipe, steps=9)
