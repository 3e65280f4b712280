"""ControlNets, several of them, in guess mode and for a part of the schedule: they run at full or key steps only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from naive import distance, rows_seen
from pipelines import build, run
from tiny_models import UNET, controlnet, sd
from torch import nn

from whenwhere import DeepCache, FasterDiffusion, Method, attach

STEPS = 6
DRAWINGS = [torch.linspace(-k, k, 3 * 16 * 16).sin().sigmoid().reshape(1, 3, 16, 16) for k in (9, 5)]


def several() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = sd("ControlNet", controlnet=[controlnet(UNET), controlnet(UNET)])
    return pipe, {"image": DRAWINGS, "controlnet_conditioning_scale": [1.0, 0.5]}


CALLS: dict[str, Callable[[], tuple[DiffusionPipeline, dict[str, Any]]]] = {
    "several": several,
    "guess mode": lambda: (build("sd-controlnet"), {"guess_mode": True}),
    "until the middle": lambda: (build("sd-controlnet"), {"control_guidance_end": 0.5}),
}
ROWS = {"several": 2, "guess mode": 1, "until the middle": 2}  # guess mode leaves the unconditional half alone


def every_third(s: int) -> bool:
    return s % 3 == 0


@contextmanager
def frozen(unet: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run everything, but off every third step let these modules put out what they did at the last of those."""
    evaluations: list[None] = []
    kept: dict[nn.Module, Any] = {}

    def override(module: nn.Module, _: Any, output: Any) -> Any:
        if every_third(len(evaluations)):
            kept[module] = output
        return kept[module]

    handles = [module.register_forward_hook(override) for module in modules]
    handles.append(unet.register_forward_hook(lambda *_: evaluations.append(None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encoder(unet: nn.Module) -> list[nn.Module]:
    return [unet.conv_in, *unet.down_blocks, unet.mid_block]


def entering_the_rim(unet: nn.Module) -> list[nn.Module]:
    return [unet.up_blocks[1].attentions[0]]


METHODS: list[tuple[Method, Callable[[nn.Module], list[nn.Module]]]] = [
    (DeepCache(3), entering_the_rim),
    (FasterDiffusion(every=3, alpha=0), encoder),
    (FasterDiffusion(every=3, alpha=0, batch_cap=STEPS), encoder),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("method", "inside"), METHODS, ids=["DeepCache", "one by one", "in batches"])
def test_control_runs_at_every_third_step_and_is_frozen_in_between(method, inside, call):
    pipe, arguments = CALLS[call]()
    with frozen(pipe.unet, [pipe.controlnet, *inside(pipe.unet)]):
        expected = run("sd-controlnet", pipe, steps=STEPS, **arguments)
    first = pipe.controlnet.nets[0] if call == "several" else pipe.controlnet
    seen = rows_seen(first.conv_in)
    with attach(pipe, method):
        latents = run("sd-controlnet", pipe, steps=STEPS, **arguments)
    assert seen == [ROWS[call]] * 2  # steps 0 and 3
    assert distance(latents, expected) <= 1e-5
