"""The training loop of class-conditional transformers, plain or with long skips, on `accelerate`.

One line serves a CPU, a GPU and many: `accelerate launch recipes/skip_dit.py ...`, or plain `python` for one device. As
for DiT (Peebles & Xie, 2023, https://arxiv.org/abs/2212.09748) the learning rate is constant after a short rise, so
that the state at a step does not depend on when the run will end, and curves of two models compare at every step.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional

from whenwhere.train.class_run import ClassRun
from whenwhere.train.classes import DrawLabelled, LabelledBatch
from whenwhere.train.diffusion import TrainConfig, corrupt, precision
from whenwhere.train.files import append_row
from whenwhere.train.skip import (
    drop_labels,
    fusion_penalty,
    hybrid_loss,
    limit_fusions,
    plateaued,
    silence_label_dropout,
)


@dataclass(frozen=True)
class ClassTraining:
    """How long and how to train. The run ends with the budget or with the steps, whichever comes first."""

    budget: float  # seconds of wall-clock, over all resumed runs
    steps: float = math.inf  # optimiser steps
    batch_size: int = 32  # of one process
    learning_rate: float = 5e-4  # DiT's is 1e-4, for batches of 256
    warm_up: int = 100  # steps in which the learning rate rises
    ema_decay: float = 0.999  # reached gradually; DiT's is 0.9999
    clip: float = 1.0  # largest norm of the gradient; DiT does not clip
    label_dropout: float = 0.1
    least_weight: float = TrainConfig.least_weight  # of a timestep in the loss, where a velocity is predicted
    none: int = 1000  # the label of no class, as DiTPipeline has it
    fusion_limit: float = 0.0  # ours: the spectral norm above which fusions are penalised; 0 is no limit
    fusion_weight: float = 0.01  # of that penalty; infinity makes the limit hard, by scaling after every step
    skips_first: int = 0  # steps of a first stage that trains the long skips alone; 0 is no such stage
    patience: int = 0  # ends the first stage after so many validations without improvement; 0 is by steps alone
    bfloat16: bool = False  # autocast; weights, their mean and the optimiser stay in float32
    checkpointing: bool = False  # recompute blocks backwards instead of remembering them
    log_every: int = 50  # steps
    validate_every: int = 500  # steps; a multiple of `log_every`
    snapshot_every: int = 0  # steps; 0 is never
    save_every: float = 300.0  # seconds
    seed: int = 0


Observe = Callable[[ClassRun], None]


def train_classes(
    model: nn.Module,
    scheduler: DDPMScheduler,
    draw: DrawLabelled,
    apart: LabelledBatch,
    config: ClassTraining,
    out: Path,
    *,
    watch: Observe | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> ClassRun:
    """Train until the budget is used; continues from `out/state.pt`, appends to `out/loss.jsonl`.

    Args:
        model: called as DiT is; out_channels of twice the latents' ask for DiT's loss with learned variances, which
            predicts noise, others for the scheduler's velocity with min-SNR weights.
        scheduler: how latents are noised.
        draw: batches, on any device.
        apart: pictures that are never drawn, for the validation loss.
        config: how.
        out: a folder.
        watch: is called after every log line; its time counts.
        clock: seconds.

    Raises:
        ValueError: a first stage without long skips, or a `state.pt` that is damaged or of another network.
    """
    checkpoint = out / "state.pt"
    run = _begin(model, config, checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    since, saved, losses = clock() - run.seconds, run.seconds, []
    while _together(run, run.seconds < config.budget) and run.step < config.steps:
        if run.stage == "skips" and _first_stage_done(run, config):
            run.enter("all")
        losses.append(_advance(run, scheduler, draw, config))
        run.seconds = clock() - since
        if run.step % config.log_every == 0:
            _record(out / "loss.jsonl", run, config, losses, _validation(run, scheduler, apart, config))
            losses.clear()
            if watch is not None:
                watch(run)
        if config.snapshot_every and run.step % config.snapshot_every == 0:
            run.snapshot(out / "snapshots")
        if run.seconds - saved >= config.save_every:
            run.save(checkpoint)
            saved = run.seconds
    run.save(checkpoint)
    return run


def _begin(model: nn.Module, config: ClassTraining, checkpoint: Path) -> ClassRun:
    """A new run, or the one that was saved; raises ValueError where the model or the file does not fit."""
    silence_label_dropout(model)
    if config.checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    model.train()  # diffusers checkpoints in training mode alone
    # Autocast is ours (`precision`), since CPUs need another attention with it.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    run = ClassRun(model, accelerator, config.learning_rate, "skips" if config.skips_first else "all")
    if checkpoint.exists():
        run.load(checkpoint)
    return run


def _together(run: ClassRun, going_on: bool) -> bool:
    """Whether all processes go on; they stop at one step, though their clocks differ."""
    flag = torch.tensor(float(going_on), device=run.accelerator.device)
    return bool(run.accelerator.reduce(flag, "sum") == run.accelerator.num_processes)


def _first_stage_done(run: ClassRun, config: ClassTraining) -> bool:
    flat = config.patience > 0 and plateaued(run.validations, config.patience)
    return flat or run.step >= config.skips_first


def _advance(run: ClassRun, scheduler: DDPMScheduler, draw: DrawLabelled, config: ClassTraining) -> float:
    """One optimiser step; returns the loss without the penalty. A gradient that is not finite is dropped."""
    accelerator, generator = run.accelerator, run.generator(config.seed)
    batch = draw(config.batch_size, generator)
    labels = drop_labels(batch.labels, config.label_dropout, config.none, generator)
    with precision(accelerator.device.type, config.bfloat16):
        loss = _loss(run.wrapped, scheduler, LabelledBatch(batch.latents, labels), generator, config.least_weight)
        soft = config.fusion_limit and math.isfinite(config.fusion_weight)
        penalty = config.fusion_weight * fusion_penalty(run.model, config.fusion_limit) if soft else 0.0
        accelerator.backward(loss + penalty)
    norm = accelerator.clip_grad_norm_(run.trained, config.clip).item()
    for group in run.optimiser.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (run.step + 1) / config.warm_up)
    if math.isfinite(norm):
        run.clipped += norm > config.clip
        run.optimiser.step()
        if config.fusion_limit and not soft:
            limit_fusions(run.model, config.fusion_limit)
    else:
        run.dropped += 1
    run.optimiser.zero_grad()
    run.step += 1
    run.mean.follow(run.step, config.ema_decay)
    return loss.item()


def _loss(
    model: nn.Module,
    scheduler: DDPMScheduler,
    batch: LabelledBatch,
    generator: torch.Generator,
    least_weight: float = TrainConfig.least_weight,  # validation keeps it, so that its curves compare
) -> Tensor:
    target = corrupt(batch.latents, scheduler, TrainConfig(budget=0, least_weight=least_weight), generator)
    answer = model(target.noisy, target.timesteps, batch.labels).sample.float()
    if answer.shape[1] == 2 * batch.latents.shape[1]:
        kept = scheduler.alphas_cumprod.to(target.noisy.device)
        share = kept[target.timesteps].view(-1, 1, 1, 1)
        noise = (1 - share).sqrt() * target.noisy + share.sqrt() * target.velocity
        terms = hybrid_loss(answer, batch.latents, target.noisy, noise, target.timesteps, kept)
        return (terms.simple + terms.variational).mean()
    errors = functional.mse_loss(answer, target.velocity, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    return (errors * target.weights).mean()


@torch.no_grad()
def _validation(
    run: ClassRun, scheduler: DDPMScheduler, apart: LabelledBatch, config: ClassTraining, repeats: int = 8
) -> float | None:
    """The loss of the mean on the pictures set apart, always with the same noise; `None` when it is not due."""
    if run.step % config.validate_every:
        return None
    many = LabelledBatch(*(part.repeat(repeats, *[1] * (part.ndim - 1)) for part in apart))
    with run.mean.held(), precision(run.accelerator.device.type, config.bfloat16):
        loss = float(_loss(run.model, scheduler, many, torch.Generator().manual_seed(config.seed)))
    run.validations.append(loss)
    return loss


def _record(path: Path, run: ClassRun, config: ClassTraining, losses: list[float], validation: float | None) -> None:
    """Append one JSON line: means over the steps since the last one, and the validation loss where there is one."""
    loss = run.accelerator.reduce(torch.tensor(losses, device=run.accelerator.device).mean(), "mean").item()
    row = {
        "step": run.step,
        "images": run.step * config.batch_size * run.accelerator.num_processes,
        "seconds": round(run.seconds, 1),
        "stage": run.stage,
        "loss": round(loss, 5),
        "clipped": round(run.clipped / len(losses), 3),
        "dropped": run.dropped,
    }
    if validation is not None:
        row["validation"] = round(validation, 5)
    run.clipped = run.dropped = 0
    if run.accelerator.is_main_process:
        append_row(row, path)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
