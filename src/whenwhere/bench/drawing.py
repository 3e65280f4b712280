"""Calling a pipeline in one way, whatever its class: prompts and seeds in, pictures out."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..anatomy import find
from ..attach import Attachment, attach
from ..families import FAMILIES
from ..finding import denoiser_of
from ..guidance.text import readable
from ..method import Method


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    negative: str | Sequence[str] = "",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] on the CPU, picture i from prompt i and seed i alone.

    A negative prompt is one for all, or one for each.

    Raises:
        ValueError: the pipeline makes no pictures, or cannot do what was asked.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "pt",
    }
    if "prompt" in takes:
        arguments["prompt"] = list(prompts)
    elif "class_labels" in takes:
        arguments["class_labels"] = [_class_number(prompt, getattr(pipe, "labels", {})) for prompt in prompts]
    else:
        raise ValueError(f"{type(pipe).__name__} takes neither prompts nor classes.")
    if "guidance_scale" in takes:
        arguments["guidance_scale"] = guidance
    arguments |= _fitting(pipe, takes, size)
    if negative:
        _require(pipe, "negative_prompt" in takes, "negative prompts")
        arguments["negative_prompt"] = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if size is not None:
        _require(pipe, "height" in takes, "a size")
        arguments |= {"height": size[0], "width": size[1]}
    return _pictures(pipe(**arguments).images)


def attached(pipe: Any, methods: Sequence[Method], guidance: float) -> AbstractContextManager[Attachment | None]:
    """Methods on a pipeline; without any, nothing."""
    if not methods:
        return nullcontext()
    # Where the scheduler moves all branches together nobody but the caller knows whether there is guidance; where the
    # pipeline does not say, it is known only after the first step, which is late for some methods.
    anatomy = find(denoiser_of(pipe), FAMILIES)
    silent = not anatomy.passes and not hasattr(type(pipe), "do_classifier_free_guidance")
    return attach(pipe, *methods, guidance=guidance > 1 if anatomy.doubled or silent else None)


def _fitting(pipe: Any, takes: Mapping[str, inspect.Parameter], size: tuple[int, int] | None) -> dict[str, Any]:
    """Arguments without which a model of unusual size, or text of unusual length, would be refused."""
    arguments: dict[str, Any] = {}
    if "use_resolution_binning" in takes and size is None:
        arguments["use_resolution_binning"] = False  # a model's own size needs no table of sizes; small ones have none
    if "max_sequence_length" in takes:
        arguments["max_sequence_length"] = readable(pipe, takes["max_sequence_length"].default)
    if "clean_caption" in takes and find_spec("bs4") is None:
        arguments["clean_caption"] = False  # the pipeline would warn at every call, and leave captions as they are
    return arguments


def _class_number(prompt: str, labels: Mapping[str, int]) -> int:
    """The class that a prompt names, by its number or by one of the pipeline's labels."""
    if prompt.strip().isdigit():
        return int(prompt)
    if prompt in labels:
        return labels[prompt]
    near = get_close_matches(prompt, labels, n=1, cutoff=0.0)
    known = f", or labels; the nearest is {near[0]!r}" if near else ""
    raise ValueError(f"this model draws classes: prompts are class numbers{known}; got {prompt!r}.")


def _require(pipe: Any, able: bool, what: str) -> None:
    if not able:
        raise ValueError(f"{type(pipe).__name__} takes no {what.removeprefix('a ')}.")


def _pictures(output: Any) -> Tensor:
    """What a pipeline returned, as pictures; a few pipelines answer "pt" with an array (B, H, W, 3)."""
    pictures = output if isinstance(output, Tensor) else torch.as_tensor(output).permute(0, 3, 1, 2)
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"the pipeline returned {tuple(pictures.shape)}, not pictures (B, 3, H, W).")
    if not torch.isfinite(pictures).all():
        raise ValueError("the pipeline returned numbers that are not finite; try dtype float32.")
    return pictures.detach().float().cpu().clamp(0, 1)
