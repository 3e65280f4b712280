"""Pieces of a training of Skip-DiT (Chen et al., 2024, https://arxiv.org/abs/2411.17616): the two stages, and DiT's own
loss, label dropout and initialisation (Peebles & Xie, 2023, https://arxiv.org/abs/2212.09748).

A network with new skips of the paper's form has lost its function. Stage one trains the skips alone until samples are
recognisable, stage two everything. The paper switches by eye; here it is a number of steps, or a plateau.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn
from torch.nn import Parameter, functional

Stage = Literal["skips", "all"]


def enter_stage(model: nn.Module, stage: Stage) -> list[Parameter]:
    """Freeze all but the skips, or nothing; returns what is trained, for an optimiser of this stage.

    Raises:
        ValueError: no such stage, or no skips to train.
    """
    if stage not in ("skips", "all"):
        raise ValueError(f"stage must be 'skips' or 'all', got {stage!r}")
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage == "all" or ".skip_linear." in name or ".skip_norm." in name)
        if parameter.requires_grad:
            trained.append(parameter)
    if not trained:
        raise ValueError(f"{type(model).__name__} has no long skips; SkipDiTTransformer2DModel.from_dit adds them.")
    return trained


def plateaued(losses: Sequence[float], patience: int, tolerance: float = 0.0) -> bool:
    """Whether none of the last `patience` validation losses is lower than the best before, by a share `tolerance`."""
    if len(losses) <= patience:
        return False
    return min(losses[-patience:]) >= min(losses[:-patience]) * (1 - tolerance)


def drop_labels(labels: Tensor, probability: float, none: int, generator: torch.Generator) -> Tensor:
    """Labels (B,) of which each is replaced by `none` with this probability; DiT's is 0.1."""
    dropped = torch.rand(labels.shape, generator=generator).to(labels.device) < probability
    return torch.where(dropped, none, labels)


def silence_label_dropout(model: nn.Module) -> None:
    """Switch off the dropout inside of diffusers' label embeddings; `drop_labels` takes its place.

    In training mode every block of diffusers' DiT drops labels on its own, from the global generator, so that one
    forward is conditional in some blocks and unconditional in others.
    """
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def initialise(model: DiTTransformer2DModel, generator: torch.Generator) -> None:
    """DiT's initialisation, in place: blocks start as the identity, the prediction as zero.

    Skips stay as they are: in the paper's code they are made after this pass.
    """
    for name, module in model.named_modules():
        if name.endswith("skip_linear") or not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            continue
        weight = module.weight
        if any(part in f".{name}" for part in (".norm1.linear", ".proj_out_1", ".proj_out_2")):
            nn.init.zeros_(weight)
        elif "_embedder" in name:
            nn.init.normal_(weight, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(weight.view(weight.shape[0], -1), generator=generator)
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            nn.init.zeros_(module.bias)


class HybridLoss(NamedTuple):
    """The two terms of the loss of every sample, (B,); training minimises the mean of their sum."""

    simple: Tensor
    variational: Tensor


def hybrid_loss(
    prediction: Tensor, clean: Tensor, noisy: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> HybridLoss:
    """DiT's loss with a learned range of variances (Nichol & Dhariwal, 2021, https://arxiv.org/abs/2102.09672).

    `simple` is the squared error of the noise. `variational` is the term of the variational bound at t, in bits per
    dimension, of a Gaussian whose mean is not trained by it and whose log-variance is v log(beta_t) + (1 - v)
    log(posterior variance), v = (second half of the prediction + 1) / 2. DiT adds the two with weight 1.

    Args:
        prediction: (B, 2C, ...): noise, then what becomes v.
        clean, noisy, noise: (B, C, ...).
        timesteps: (B,), from 0.
        alphas_cumprod: (T,), of the training schedule.
    """
    guess, raw = prediction.float().chunk(2, dim=1)
    axes = tuple(range(1, guess.ndim))
    simple = (guess - noise).square().mean(axes)

    kept = alphas_cumprod.to(guess.device, torch.float64)
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    beta = 1 - kept / before
    posterior = beta * (1 - before) / (1 - kept)
    posterior[0] = posterior[1]  # it is 0 there, which has no logarithm; the authors' clipping

    def at(values: Tensor) -> Tensor:
        return values[timesteps.to(values.device)].float().view(-1, *[1] * (guess.ndim - 1))

    low, high = at(posterior.log()), at(beta.log())
    share = (raw + 1) / 2
    log_variance = share * high + (1 - share) * low
    picture = (noisy - at((1 - kept).sqrt()) * guess.detach()) / at(kept.sqrt())
    of_clean, of_noisy = at(beta * before.sqrt() / (1 - kept)), at((1 - before) * (1 - beta).sqrt() / (1 - kept))
    mean, true = of_clean * picture + of_noisy * noisy, of_clean * clean + of_noisy * noisy
    divergence = (log_variance - low + (low - log_variance).exp() + (true - mean).square() / log_variance.exp() - 1) / 2
    first = (timesteps == 0).to(guess.device).view(-1, *[1] * (guess.ndim - 1))
    nats = torch.where(first, -log_likelihood(clean, mean, log_variance), divergence)
    return HybridLoss(simple, nats.mean(axes) / math.log(2))


def log_likelihood(values: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Logarithm, in nats, of the Gaussian mass of the bin around each value.

    Bins are 2 / 255 wide between -1 and 1, the outer ones open. DiT uses it at t = 0 for latents too.
    """
    scale = (-log_variance / 2).exp()
    upper = torch.special.ndtr((values - mean + 1 / 255) * scale)
    lower = torch.special.ndtr((values - mean - 1 / 255) * scale)
    mass = torch.where(values < -0.999, upper, torch.where(values > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def fusion_penalty(model: nn.Module, limit: float = 1.0) -> Tensor:
    """Ours, not the paper's, whose code constrains nothing: the sum over all fusions of max(0, ||W||_2 - limit)^2.

    Raises:
        ValueError: the model has no long skips.
    """
    norms = [torch.linalg.matrix_norm(weight.float(), ord=2) for weight in _fusions(model)]
    return torch.stack([functional.relu(norm - limit) for norm in norms]).square().sum()


@torch.no_grad()
def limit_fusions(model: nn.Module, limit: float = 1.0) -> int:
    """Ours too: scale every fusion whose spectral norm is above the limit down to it, in place; returns how many were.

    Called after every step it is a hard constraint, where `fusion_penalty` is a soft one.

    Raises:
        ValueError: the model has no long skips, or the limit is not above 0.
    """
    if not limit > 0:
        raise ValueError(f"the limit must be above 0, got {limit}; a fusion of norm 0 passes nothing on.")
    scaled = 0
    for weight in _fusions(model):
        norm = float(torch.linalg.matrix_norm(weight.float(), ord=2))
        if norm > limit:
            weight.mul_(limit / norm)
            scaled += 1
    return scaled


def _fusions(model: nn.Module) -> list[Parameter]:
    weights = [p for name, p in model.named_parameters() if name.endswith("skip_linear.weight")]
    if not weights:
        raise ValueError(f"{type(model).__name__} has no long skips, so there is nothing to penalise or to limit.")
    return weights
