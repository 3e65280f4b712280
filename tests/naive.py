"""T-GATE and DeepCache written down a second time, as plainly as possible: own loop, own guidance, nothing of ours.

`opening` reads off a plain run what a pipeline hands to its loop; `sample` is that loop. Attention outputs are stored
and reused by replaced forwards, the rim of a U-Net is run layer by layer. Only tests use this.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pipelines import CASES, GUIDANCE, run
from torch import Tensor, nn

Inputs = dict[str, Any]
Predict = Callable[[int, Tensor, Tensor], Tensor]  # of evaluation s, scaled latents and timestep


# Comparing


def distance(latents: Tensor, reference: Tensor) -> float:
    return float((latents - reference).norm() / reference.norm())


def rows_seen(module: nn.Module) -> list[int]:
    """A list that fills with the rows of every later call of a module."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


# The loop of a pipeline


@dataclass
class Opening:
    """What a plain run hands to its loop.

    Attributes:
        inputs: arguments of the denoiser's first call, by name.
        latents: the first sample that the scheduler moves, (B, ...).
        scheduler, options: the scheduler before its first step, and that step's other arguments.
        timesteps: one per evaluation.
        control: arguments of the ControlNet's first call; empty without one.
    """

    inputs: Inputs
    latents: Tensor
    scheduler: Any
    options: Inputs
    timesteps: list[Tensor]
    control: Inputs

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def guided(self) -> bool:
        return self.rows == 2 * len(self.latents)


def denoiser(name: str, pipe: DiffusionPipeline) -> nn.Module:
    return getattr(pipe, CASES[name].denoiser)


def opening(name: str, pipe: DiffusionPipeline, **request: Any) -> Opening:
    """Run the plain pipeline once and write down how its loop begins."""
    calls, control, moves = [], [], []
    model, scheduler = denoiser(name, pipe), pipe.scheduler
    original = scheduler.step

    def step(output: Tensor, t: Tensor, latents: Tensor, **options: Any) -> Any:
        moves.append((t, latents, None if moves else deepcopy(scheduler), None if moves else fresh(options)))
        return original(output, t, latents, **options)

    scheduler.step = _with_signature_of(original, step)
    handles = [_note_calls(model, calls)]
    if hasattr(pipe, "controlnet"):
        handles.append(_note_calls(pipe.controlnet, control))
    try:
        run(name, pipe, **request)
    finally:
        del scheduler.step
        for handle in handles:
            handle.remove()
    _, latents, frozen, options = moves[0]
    del frozen.step
    timesteps = [move[0] for move in moves]
    return Opening(
        calls[0], latents, frozen, options | {"return_dict": False}, timesteps, control[0] if control else {}
    )


def _with_signature_of(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    replacement.__signature__ = inspect.signature(original)  # pipelines look which options a scheduler takes
    return replacement


def _note_calls(module: nn.Module, calls: list[Inputs]) -> Any:
    signature = inspect.signature(type(module).forward)

    def note(module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        arguments = signature.bind(module, *args, **kwargs).arguments
        calls.append({key: value for key, value in arguments.items() if key != "self"} | {"return_dict": False})

    return module.register_forward_pre_hook(note, with_kwargs=True)


def fresh(options: Inputs) -> Inputs:
    """The same options with generators of their own, in the same state."""

    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copied(item) for item in value]
        return value.clone_state() if isinstance(value, torch.Generator) else value

    return {key: copied(value) for key, value in options.items()}


@torch.no_grad()
def sample(start: Opening, predict: Predict) -> Tensor:
    """Sample with any predictor; consistency models return their last clean estimate."""
    scheduler, options, x, rest = deepcopy(start.scheduler), fresh(start.options), start.latents, ()
    for s, t in enumerate(start.timesteps):
        x, *rest = scheduler.step(predict(s, scheduler.scale_model_input(x, t), t), t, x, **options)
    return rest[0] if "LCM" in type(scheduler).__name__ else x


def half(value: Any, which: int, rows: int, parts: int = 2) -> Any:
    """One half (or another part) of everything that has `rows` rows, however deeply nested."""
    if isinstance(value, dict):
        return {key: half(item, which, rows, parts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(half(item, which, rows, parts) for item in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return value.chunk(parts)[which]
    return value


def fill(inputs: Inputs, x: Tensor, t: Tensor) -> Inputs:
    """The arguments of an evaluation: present latents and timestep, all else as at the first one.

    What was concatenated to the latents on the channels (a mask, an image) stays.
    """
    name = next(iter(inputs))
    channels = x.ndim - 3
    first = inputs[name]
    conditions = first.narrow(channels, x.shape[channels], first.shape[channels] - x.shape[channels])
    x = torch.cat([x] * (len(first) // len(x)))
    t = t.expand(len(first)) if inputs["timestep"].ndim else t
    return inputs | {name: torch.cat([x, conditions], channels), "timestep": t}


def scale_of(x: Tensor) -> float | Tensor:
    """The guidance scale; videos have one per frame, from 1 to the greatest."""
    return torch.linspace(1, GUIDANCE, x.shape[1]).reshape(1, -1, 1, 1, 1) if x.ndim == 5 else GUIDANCE


def noise_of(output: Tensor, x: Tensor) -> Tensor:
    """The prediction of the noise; transformers with a learned variance put it behind."""
    return output.narrow(x.ndim - 3, 0, x.shape[x.ndim - 3])


def combine(output: Tensor, x: Tensor) -> Tensor:
    """Classifier-free guidance, the unconditional half first."""
    u, c = noise_of(output, x).chunk(2)
    return u + scale_of(x) * (c - u)


# T-GATE


@dataclass(frozen=True)
class Gate:
    """Settings in the paper's letters."""

    m: int
    k: int = 1
    f: int = 1
    w: int = 2

    def actions(self, s: int) -> tuple[str, str]:
        """What cross- and self-attention do at evaluation s."""
        if s == self.m - 1:
            return "average", "average"
        if s >= self.m:
            return "reuse", "store" if s % self.f == 0 else "reuse"
        if s < self.w:
            return "compute", "compute"
        return "compute", "store" if s == self.w or s % self.k == 0 else "reuse"


class Attentions:
    """Replaced forwards of all attention modules: they compute, store, average or reuse as told."""

    def __init__(self, model: nn.Module, anchor: str = "mean") -> None:
        self.stored: dict[str, Tensor] = {}
        self.cross = self.own = "compute"
        self.halves = 1
        self._pick = {"mean": lambda y: y.mean(0), "uncond": lambda y: y[0], "cond": lambda y: y[1]}[anchor]
        self._modules = {name: module for name, module in model.named_modules() if _is_attention(name)}
        for name, module in self._modules.items():
            module.forward = self._replacement(name, module.forward)

    def _replacement(self, name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Tensor:
            crossed = encoder_hidden_states is not None
            action = self.cross if crossed else self.own
            if action == "reuse" and name in self.stored:
                return self.stored[name]
            y = original(hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
            if action == "average" and self.halves == 2:
                halves = torch.stack(y.chunk(2))
                self.stored[name] = self._pick(halves) if crossed else halves.mean(0)
            elif action != "compute":
                self.stored[name] = y
            return y

        return forward

    def remove(self) -> None:
        for module in self._modules.values():
            del module.forward


def _is_attention(name: str) -> bool:
    return name.endswith((".attn1", ".attn2"))


def tgate(
    model: nn.Module, start: Opening, gate: Gate, anchor: str = "mean", run: Callable[..., Tensor] | None = None
) -> Tensor:
    """T-GATE on the raw denoiser. `run(s, inputs)` stands for the network, for combinations with other methods."""
    attentions = Attentions(model, anchor)
    survivor = 1 if start.latents.ndim == 5 else 0  # videos go on with the image, pictures without the text
    run = run or (lambda _, inputs: model(**inputs)[0])

    def predict(s: int, x: Tensor, t: Tensor) -> Tensor:
        attentions.cross, attentions.own = gate.actions(s)
        attentions.halves = 2 if start.guided and s < gate.m else 1
        if attentions.halves == 2:
            return combine(run(s, fill(start.inputs, x, t)), x)
        inputs = half(start.inputs, survivor, start.rows) if start.guided else start.inputs
        return noise_of(run(s, fill(inputs, x, t)), x)

    try:
        return sample(start, predict)
    finally:
        attentions.remove()


@contextmanager
def gated_in_place(model: nn.Module, gate: Gate) -> Iterator[None]:
    """T-GATE inside a guided pipeline: for loops not worth rewriting."""
    attentions = Attentions(model)

    def begin(s: int) -> None:
        attentions.cross, attentions.own = gate.actions(s)
        attentions.halves = 2 if s < gate.m else 1

    try:
        with one_part_from(model, gate.m, begin=begin):
            yield
    finally:
        attentions.remove()


@contextmanager
def one_part_from(
    model: nn.Module, m: int, which: int = 0, parts: int = 2, begin: Callable[[int], None] = lambda _: None
) -> Iterator[None]:
    """Inside a pipeline: from evaluation m on, one part of the guidance batch runs and answers for all of them."""
    original, signature = model.forward, inspect.signature(model.forward)
    count = iter(range(10_000))

    def forward(*args: Any, **kwargs: Any) -> Any:
        s, inputs = next(count), dict(signature.bind(*args, **kwargs).arguments)
        begin(s)
        if s < m:
            return original(**inputs)
        output = original(**half(inputs, which, len(next(iter(inputs.values()))), parts))
        if isinstance(output, tuple):
            return tuple(torch.cat([part] * parts) for part in output)
        return type(output)(torch.cat([output[0]] * parts))

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


# Guidance that stops


def guidance_stop(
    model: nn.Module, start: Opening, m: int, run: Callable[[int, Inputs], Tensor] | None = None
) -> Tensor:
    """Guidance for m evaluations, then the conditional half alone."""
    run = run or (lambda _, inputs: model(**inputs)[0])

    def predict(s: int, x: Tensor, t: Tensor) -> Tensor:
        if s < m:
            return combine(run(s, fill(start.inputs, x, t)), x)
        return noise_of(run(s, fill(half(start.inputs, 1, start.rows), x, t)), x)

    return sample(start, predict)


# DeepCache


def plain(model: nn.Module, start: Opening, run: Callable[[int, Inputs], Tensor] | None = None) -> Tensor:
    """Sample without any method, or with another network: `run(s, inputs)`."""
    run = run or (lambda _, inputs: model(**inputs)[0])

    def predict(s: int, x: Tensor, t: Tensor) -> Tensor:
        output = run(s, fill(start.inputs, x, t))
        return combine(output, x) if start.guided else noise_of(output, x)

    return sample(start, predict)


class Ladder:
    """A U-Net run rung by rung, whole or as the rim of branch b around the feature of the last full evaluation."""

    def __init__(self, unet: nn.Module, branch: int, full: Callable[[int], bool]) -> None:
        self.unet, self.branch, self.full = unet, branch, full
        self.feature: Tensor | None = None  # h
        self.evaluations = 0

    def __call__(self, s: int, inputs: Inputs) -> Tensor:
        if self.full(s):
            self.evaluations += 1
        return self._evaluate(inputs, partial=not self.full(s))

    def _evaluate(self, inputs: Inputs, partial: bool) -> Tensor:
        unet, x = self.unet, inputs["sample"]
        emb, text = self._embed(inputs)
        control = inputs.get("down_block_additional_residuals")
        residuals = [unet.conv_in(x)]
        for rung in encoder_of(unet)[: self.branch if partial else None]:
            residuals.append(_climb(rung, residuals[-1], emb, text))
        h = self.feature
        if not partial:
            h = unet.mid_block(residuals[-1], emb, encoder_hidden_states=text)
            if control is not None:
                h = h + inputs["mid_block_additional_residual"]
        if control is not None:
            residuals = [residual + extra for residual, extra in zip(residuals, control, strict=False)]
        decoder = decoder_of(unet)
        first = len(decoder) - 1 - self.branch
        for j, rung in enumerate(decoder):
            if partial and j < first:
                continue
            if j == first and not partial:
                self.feature = h
            h = _climb(rung, torch.cat([h, residuals[len(decoder) - 1 - j]], 1), emb, text)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))

    def _embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Of time and everything that is added to it; and the text."""
        unet, text, added = self.unet, inputs["encoder_hidden_states"], inputs.get("added_cond_kwargs")
        emb = unet.time_embedding(
            unet.get_time_embed(inputs["sample"], inputs["timestep"]), inputs.get("timestep_cond")
        )
        extra = unet.get_aug_embed(emb, text, added)
        return (emb if extra is None else emb + extra), unet.process_encoder_hidden_states(text, added)


Rung = list[nn.Module]  # a residual network, then the attention or resampler that belong to it


def encoder_of(unet: nn.Module) -> list[Rung]:
    """Rungs in order: rung i makes residual i + 1."""
    rungs = []
    for block in unet.down_blocks:
        rungs += _layers(block)
        rungs += [[sampler] for sampler in block.downsamplers or ()]
    return rungs


def decoder_of(unet: nn.Module) -> list[Rung]:
    """Rungs in order: rung j takes residual R - 1 - j."""
    rungs = []
    for block in unet.up_blocks:
        layers = _layers(block)
        layers[-1] = [*layers[-1], *(block.upsamplers or ())]
        rungs += layers
    return rungs


def _layers(block: nn.Module) -> list[Rung]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return [
        [resnet, attention] if attention else [resnet]
        for resnet, attention in zip(block.resnets, attentions, strict=True)
    ]


def _climb(rung: Rung, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
    for module in rung:
        if "Resnet" in type(module).__name__:
            x = module(x, emb)
        elif "Transformer" in type(module).__name__:
            x = module(x, encoder_hidden_states=text, return_dict=False)[0]
        else:
            x = module(x)
    return x


@contextmanager
def frozen_between(module: nn.Module, model: nn.Module, full: Callable[[int], bool]) -> Iterator[None]:
    """Run everything, but off the full evaluations let `module` put out what it did at the last full one."""
    count, kept = iter(range(10_000)), {}

    def begin(*_: Any) -> None:
        kept["full"] = full(next(count))

    def override(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if kept["full"]:
            kept["output"] = output
        return kept["output"]

    handles = [model.register_forward_pre_hook(begin), module.register_forward_hook(override)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Frozen cross-attention


@contextmanager
def frozen_cross_attention(model: nn.Module, m: int, mean: bool) -> Iterator[None]:
    """From evaluation m on, every cross-attention returns what it did in the last before, or the mean of its halves."""

    def freeze(module: nn.Module) -> None:
        original, outputs = module.forward, []

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if len(outputs) < m:
                outputs.append(original(*args, **kwargs))
                return outputs[-1]
            kept = outputs[-1]
            return torch.cat([kept.reshape(2, -1, *kept.shape[1:]).mean(0)] * 2) if mean else kept

        module.forward = forward

    attentions = [module for path, module in model.named_modules() if path.endswith(".attn2")]
    try:
        for module in attentions:
            freeze(module)
        yield
    finally:
        for module in attentions:
            del module.forward
