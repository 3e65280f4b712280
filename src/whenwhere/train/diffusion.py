"""A plain training loop for small latent text-to-image models, whose length is a budget of seconds.

v-prediction with min-SNR weights, AdamW, and a learning rate that falls on a cosine of the share of the budget used, so
a run ends well trained however fast the machine is. A run saves itself and goes on where it stopped.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from whenwhere.train.files import append_row
from whenwhere.train.state import TrainState


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train. The run ends with the budget or with the steps, whichever comes first."""

    budget: float  # seconds of wall-clock, over all resumed runs
    steps: float = math.inf  # optimiser steps
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warm_up: float = 0.01  # share of the run in which the learning rate rises
    ema_decay: float = 0.999  # reached gradually
    gamma: float = 5.0  # min-SNR (Hang et al., 2023, https://arxiv.org/abs/2303.09556)
    # Where noise prevails only the text can tell what to draw; min-SNR alone leaves hardly any gradient there.
    least_weight: float = 0.2
    clip: float = 1.0  # largest norm of the gradient
    bfloat16: bool = False  # autocast; weights, their mean and the optimiser stay in float32
    log_every: int = 50  # steps
    save_every: float = 300.0  # seconds
    seed: int = 0


class Batch(NamedTuple):
    """What one step learns from."""

    latents: Tensor  # (B, C, H, W), unit variance
    input_ids: Tensor  # (B, T)


class DenoiserInput(NamedTuple):
    """Pictures part of the way to noise, with what the denoiser should answer."""

    noisy: Tensor  # (B, C, H, W)
    timesteps: Tensor  # (B,)
    velocity: Tensor  # (B, C, H, W)
    weights: Tensor  # (B,)


class Lesson(NamedTuple):
    """One batch with what should be answered to it."""

    given: DenoiserInput
    input_ids: Tensor  # (B, T)


Draw = Callable[[int, torch.Generator], Batch]
Teach = Callable[[int, torch.Generator], Lesson]
Watch = Callable[[TrainState], None]
Answer = Callable[[TrainState, DenoiserInput, Tensor], Tensor]  # the state, its input, token ids (B, T)
Told = Callable[[Tensor, Tensor], Tensor]  # latents (B, C, H, W) and timesteps (B,) -> what a denoiser says of them


def unet_answer(state: TrainState, given: DenoiserInput, input_ids: Tensor) -> Tensor:
    """What a U-Net that reads text answers, (B, C, H, W)."""
    return told_unet(state.denoiser, state.text_encoder, input_ids)(given.noisy, given.timesteps)


def told_unet(unet: nn.Module, text_encoder: nn.Module, input_ids: Tensor) -> Told:
    """A U-Net that has read its captions (B, T)."""
    text = text_encoder(input_ids).last_hidden_state  # (B, T, D)

    def told(noisy: Tensor, timesteps: Tensor) -> Tensor:
        answer: Tensor = unet(noisy, timesteps, text).sample
        return answer

    return told


def train(
    state: TrainState,
    scheduler: DDPMScheduler,
    draw: Draw,
    config: TrainConfig,
    out: Path,
    *,
    answer: Answer = unet_answer,
    watch: Iterable[Watch] = (),
    clock: Callable[[], float] = time.monotonic,
) -> TrainState:
    """Train on pictures as `learn` does: they are noised at random, and the velocity is asked for."""

    def teach(size: int, generator: torch.Generator) -> Lesson:
        batch = draw(size, generator)
        return Lesson(corrupt(batch.latents, scheduler, config, generator), batch.input_ids)

    return learn(state, teach, config, out, answer=answer, watch=watch, clock=clock)


def learn(
    state: TrainState,
    teach: Teach,
    config: TrainConfig,
    out: Path,
    *,
    answer: Answer = unet_answer,
    watch: Iterable[Watch] = (),
    clock: Callable[[], float] = time.monotonic,
) -> TrainState:
    """Train until the budget is used; continues from `out/state.pt`, appends to `out/loss.jsonl`.

    `watch` functions are called after every log line and at the end; their time counts.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "state.pt"
    if checkpoint.exists():
        state.load(checkpoint)
    since, saved, losses = clock() - state.seconds, state.seconds, []
    while (progress := max(state.seconds / config.budget, state.step / config.steps)) < 1:
        losses.append(advance(state, teach, config, progress, answer))
        state.seconds = clock() - since
        if state.step % config.log_every == 0:
            record(out / "loss.jsonl", state, sum(losses) / len(losses))
            losses.clear()
            for look in watch:
                look(state)
        if state.seconds - saved >= config.save_every:
            state.save(checkpoint)
            saved = state.seconds
    state.save(checkpoint)
    for look in watch:
        look(state)
    return state


def advance(state: TrainState, teach: Teach, config: TrainConfig, progress: float, answer: Answer) -> float:
    """One optimiser step; returns the weighted loss."""
    target, input_ids = teach(config.batch_size, state.generator)
    with precision(target.noisy.device.type, config.bfloat16):
        found = answer(state, target, input_ids).float()
        errors = functional.mse_loss(found, target.velocity, reduction="none").mean(dim=(1, 2, 3))  # (B,)
        loss = (errors * target.weights).mean()
        torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(state.parameters, config.clip)
    for optimiser in state.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * rate(progress, config.warm_up)
        optimiser.step()
        optimiser.zero_grad()
    state.step += 1
    state.images += config.batch_size
    state.mean.follow(state.step, config.ema_decay)
    return loss.item()


@contextmanager
def precision(device: str, bfloat16: bool) -> Iterator[None]:
    """What a step computes in. The fused attention of CPUs is several times slower backwards in bfloat16: not used."""
    if not bfloat16:
        yield
    elif device == "cpu":
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        with torch.autocast(device, torch.bfloat16):
            yield


def corrupt(
    latents: Tensor, scheduler: DDPMScheduler, config: TrainConfig, generator: torch.Generator
) -> DenoiserInput:
    """Noise the latents to random timesteps; weights are min(SNR, gamma) / (SNR + 1), but never below the least."""
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(latents),), generator=generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    kept = scheduler.alphas_cumprod.to(latents.device)[timesteps]
    snr = kept / (1 - kept)
    return DenoiserInput(
        noisy=scheduler.add_noise(latents, noise, timesteps),
        timesteps=timesteps,
        velocity=scheduler.get_velocity(latents, noise, timesteps),
        weights=(snr.clamp(max=config.gamma) / (snr + 1)).clamp(min=config.least_weight),
    )


def rate(progress: float, warm_up: float) -> float:
    """The learning rate as a share of its peak: a short rise, then a cosine to nothing, at `progress` in [0, 1]."""
    rise = min(1.0, progress / warm_up + 0.01) if warm_up > 0 else 1.0
    return rise * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def record(path: Path, state: TrainState, loss: float) -> None:
    """Append one JSON line: step, images seen, seconds used and the mean loss since the last line."""
    row = {"step": state.step, "images": state.images, "seconds": round(state.seconds, 1), "loss": round(loss, 5)}
    append_row(row, path)
    print(f"step {state.step}  {state.images} images  {state.seconds:.0f} s  loss {loss:.4f}", flush=True)
