"""How smooth a network's features are: diagnostics of Skip-DiT (Chen et al., 2024, https://arxiv.org/abs/2411.17616).

The paper holds that long skips make features change less: under a change of the weights, from step to step, and when
old features are reused. Each of these is measured here; the norms that would explain it are in `spectra`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Per = Literal["row", "tensor"]
Direction = dict[str, Tensor]


# -- the surface of perturbed weights --------------------------------------------------------------------------------


def random_direction(model: nn.Module, generator: torch.Generator, per: Per = "row") -> Direction:
    """A Gaussian direction in the space of all parameters, rescaled to the norm of what it will be added to.

    `per` "row": every row (filter) of a parameter has the norm of that row, and a parameter of one dimension its own as
    a whole; "tensor": every parameter as a whole. The paper says "normalised according to the original parameters".
    """
    direction = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        axes = tuple(range(1 if per == "row" and parameter.ndim > 1 else 0, parameter.ndim))
        norms = [x.detach().float().square().sum(axes, keepdim=True).sqrt() for x in (parameter, noise)]
        direction[name] = noise * (norms[0] / norms[1].clamp(min=1e-12)).to(noise)
    return direction


def perturbation_surface(
    model: nn.Module,
    observe: Callable[[], Tensor],
    directions: tuple[Direction, Direction],
    alphas: Sequence[float],
    betas: Sequence[float],
) -> Tensor:
    """Cosines of what is observed with weights theta + alpha delta + beta eta and with theta, (len alphas, len betas).

    Args:
        model: its weights are changed and put back, also after an exception.
        observe: runs the model and returns a feature (B, ...), such as the noise predicted at one step of a sampler
            that starts from the same noise every time; cosines are taken per row and averaged.
        directions: delta and eta, as `random_direction` draws them.
        alphas: published: 21 of -0.005 ... 0.005 for Latte, -1 ... 1 for DiT-XL/2.
        betas: as alphas.
    """
    return perturbation_surfaces(model, lambda: (observe(),), directions, alphas, betas)[0]


@torch.no_grad()
def perturbation_surfaces(
    model: nn.Module,
    observe: Callable[[], Sequence[Tensor]],
    directions: tuple[Direction, Direction],
    alphas: Sequence[float],
    betas: Sequence[float],
) -> Tensor:
    """The surfaces of several features that are observed in one go, (features, len alphas, len betas).

    All else is as for `perturbation_surface`.
    """
    own = dict(model.named_parameters())
    original = {name: parameter.detach().clone() for name, parameter in own.items()}
    reference = observe()
    surfaces = torch.empty(len(reference), len(alphas), len(betas))
    try:
        for i, alpha in enumerate(alphas):
            for j, beta in enumerate(betas):
                for name, parameter in own.items():
                    parameter.copy_(original[name] + alpha * directions[0][name] + beta * directions[1][name])
                pairs = zip(observe(), reference, strict=True)
                surfaces[:, i, j] = torch.stack([cosine(*pair).mean() for pair in pairs])
    finally:
        for name, parameter in own.items():
            parameter.copy_(original[name])
    return surfaces


def roughness(surface: Tensor) -> tuple[float, float]:
    """A surface of cosines in two numbers: the mean and the largest of 1 - cos. Both are 0 where nothing changes."""
    return float((1 - surface).mean()), float((1 - surface).max())


# -- change from step to step, and under caching ---------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the rows of two features (B, ...), each row flattened; (B,)."""
    return functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1)


@dataclass(frozen=True)
class ChangeMap:
    """How much the output of every block changes from each step to the next; each (blocks, steps - 1).

    Attributes:
        relative: ||now - before||_1 / ||before||_1.
        turned: 1 - cos over the features of each token, averaged over tokens.
        turned_whole: 1 - cos of the whole feature of each row, averaged over rows.
    """

    relative: Tensor
    turned: Tensor
    turned_whole: Tensor


def change_map(features: Sequence[Sequence[Tensor]]) -> ChangeMap:
    """The change of every block's output between consecutive steps, from `features[step][block]`, each (B, N, D).

    Raises:
        ValueError: fewer than two steps, or steps with unequal numbers of blocks.
    """
    if len(features) < 2 or len({len(step) for step in features}) != 1:
        raise ValueError(f"need two steps or more with equally many blocks, got {[len(step) for step in features]}")

    def table(measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        columns = [[float(measure(a, b)) for a, b in zip(*pair, strict=True)] for pair in pairwise(features)]
        return torch.tensor(columns).T

    return ChangeMap(
        relative=table(lambda before, now: (now - before).abs().sum() / before.abs().sum()),
        turned=table(lambda before, now: 1 - functional.cosine_similarity(before, now, dim=-1).mean()),
        turned_whole=table(lambda before, now: 1 - cosine(before, now).mean()),
    )


def similarity(cached: Sequence[Tensor], uncached: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the rows of cos(cached, uncached) at every step; two tensors (steps,).

    The features (B, ...) are of two runs from the same noise, with and without a cache. One row has no deviation.
    """
    cosines = torch.stack([cosine(a, b) for a, b in zip(cached, uncached, strict=True)])
    return cosines.mean(1), cosines.std(1, correction=0)


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Inside this block the outputs of some modules are collected, as `features[call of the first module][module]`."""
    features: list[list[Tensor]] = []

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        if module is modules[0]:
            features.append([])
        features[-1].append(output.detach().clone())

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
