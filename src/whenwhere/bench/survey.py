"""A survey of smoothness: all diagnostics of `metrics.smoothness` and `metrics.spectra` on one pipeline.

The pipeline runs as it is; the denoiser's own calls are noted at some of the steps and repeated with perturbed weights,
or differentiated. So it works on every pipeline whose blocks pass one tensor on.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import find, walk
from ..families import FAMILIES
from ..finding import denoiser_of
from ..metrics.smoothness import change_map, perturbation_surfaces, random_direction, recorded, roughness, similarity
from ..metrics.spectra import block_jacobian_norms, fusion_spectra
from ..ranges import at_least
from ..site import Kind
from .calls import Calls, noted
from .drawing import attached, draw
from .variant import PLAIN, Variant


@dataclass(frozen=True)
class Extent:
    """How much is measured. The paper names no sizes; 21 x 21 points and 16 samples make a smooth picture.

    Attributes:
        steps: of a run.
        moments: where in the run, as shares of its steps, surfaces and Jacobians are measured.
        pairs: of random directions.
        grid: points along each of the two, at least 2.
        radius: the largest share of its norm that a weight is moved by, along each.
        iterations: of the power method; 0 measures no Jacobian.
        guidance: scale.
        seed: of noise and directions.
        rerun: whether a network of moved weights runs the sampler itself up to each moment, from the same noise, as
            published; otherwise it is asked once, on what the network as it is was given there. That is quicker, and
            leaves out what errors add up to.
    """

    steps: int = 20
    moments: tuple[float, ...] = (0.2, 0.5, 0.8)
    pairs: int = 3
    grid: int = 5
    radius: float = 0.1
    iterations: int = 10
    guidance: float = 1.0
    seed: int = 0
    rerun: bool = True

    def __post_init__(self) -> None:
        at_least(2, steps=self.steps, grid=self.grid)
        at_least(1, pairs=self.pairs)
        at_least(0, iterations=self.iterations, seed=self.seed)
        if not self.moments or not all(0 <= moment < 1 for moment in self.moments):
            raise ValueError(f"moments are shares of the run in [0, 1), got {self.moments}")
        if not self.radius > 0:
            raise ValueError(f"radius must be above 0, got {self.radius}")

    @property
    def offsets(self) -> list[float]:
        """The points along a direction, from -radius to radius."""
        return [float(x) for x in torch.linspace(-self.radius, self.radius, self.grid)]


def survey(pipe: Any, prompts: Sequence[str], extent: Extent, variant: Variant = PLAIN) -> dict[str, Any]:
    """Run a pipeline on these prompts and measure; plain data, ready for JSON.

    Keys: `surface` and `jacobians`, a list with an entry for every moment; `change`, of every block from step to step;
    `similarity` with the variant's cache, where there is one; `fusions`, where there are long skips.

    Raises:
        ValueError: the blocks of this model do not pass on one tensor, or the variant does not fit.
    """
    denoiser = denoiser_of(pipe)
    blocks = [module for site, module in walk(denoiser, find(denoiser, FAMILIES)).items() if site.kind is Kind.BLOCK]
    if not blocks:
        raise ValueError(f"{type(denoiser).__name__} has no transformer blocks, so there is nothing to survey.")
    try:
        with recorded(blocks) as features, noted(denoiser) as calls:
            _run(pipe, prompts, extent, PLAIN)
    except AttributeError as error:
        raise ValueError(
            f"the blocks of {type(denoiser).__name__} pass on more than one tensor; the survey knows one only."
        ) from error
    steps = sorted({int(moment * len(calls.inputs)) for moment in extent.moments})
    found = _change(features)

    def rerun() -> list[Tensor]:
        with noted(denoiser, steps[-1] + 1) as again:
            _run(pipe, prompts, extent, PLAIN)
        return [again.outputs[step] for step in steps]

    def ask() -> list[Tensor]:
        return [denoiser(*args, **kwargs)[0] for args, kwargs in (calls.inputs[step] for step in steps)]

    found["surface"] = _surfaces(denoiser, rerun if extent.rerun else ask, steps, extent)
    if extent.iterations:
        found["jacobians"] = [_jacobians(denoiser, blocks, calls, step, extent) for step in steps]
    if variant.methods:
        with noted(denoiser) as cached:
            _run(pipe, prompts, extent, variant)
        mean, spread = similarity(cached.outputs, calls.outputs)
        found["similarity"] = {"method": variant.label, "mean": mean.tolist(), "spread": spread.tolist()}
    if any(isinstance(getattr(module, "skip_linear", None), nn.Linear) for module in denoiser.modules()):
        found["fusions"] = [
            {"path": fusion.path}
            | {name: getattr(fusion, name)[: _most(fusion.stream)].tolist() for name in ("whole", "stream", "skip")}
            for fusion in fusion_spectra(denoiser)
        ]
    return found


def default_prompts(pipe: Any, count: int) -> list[str]:
    """The first classes of a class-conditional pipeline, empty prompts for another."""
    takes = inspect.signature(type(pipe).__call__).parameters
    return [str(number) for number in range(count)] if "class_labels" in takes else [""] * count


def _most(values: Tensor, most: int = 16) -> int:
    """How many singular values of a fusion are reported: the largest."""
    return min(most, len(values))


def _run(pipe: Any, prompts: Sequence[str], extent: Extent, variant: Variant) -> None:
    seeds = range(extent.seed, extent.seed + len(prompts))
    with attached(pipe, variant.methods, extent.guidance):
        draw(pipe, prompts, seeds, extent.steps, extent.guidance)


def _change(features: list[list[Tensor]]) -> dict[str, Any]:
    changes = change_map(features)
    relative = changes.relative
    early = round(0.3 * relative.shape[1])
    return {
        "change": {
            "relative": relative.tolist(),
            "turned": changes.turned.tolist(),
            "mean": float(relative.mean()),
            "early share": float(relative[:, :early].sum() / relative.sum()),  # of all change
            "early steps": early / relative.shape[1],  # about 0.3; an even spread has the same share
        }
    }


def _surfaces(
    denoiser: nn.Module, observe: Callable[[], Sequence[Tensor]], steps: Sequence[int], extent: Extent
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(extent.seed)
    pairs = []
    for _ in range(extent.pairs):
        directions = random_direction(denoiser, generator), random_direction(denoiser, generator)
        pairs.append(perturbation_surfaces(denoiser, observe, directions, extent.offsets, extent.offsets))
    found = []
    for step, surfaces in zip(steps, zip(*pairs, strict=True), strict=True):
        means, worst = zip(*map(roughness, surfaces), strict=True)
        spread = {"mean": sum(means) / len(means), "worst": max(worst), "means": list(means)}
        found.append({"step": step, **spread, "first": surfaces[0].tolist()})
    return found


def _jacobians(
    denoiser: nn.Module, blocks: Sequence[nn.Module], calls: Calls, step: int, extent: Extent
) -> dict[str, Any]:
    args, kwargs = calls.inputs[step]
    generator = torch.Generator().manual_seed(extent.seed)
    try:
        norms = block_jacobian_norms(blocks, lambda: denoiser(*args, **kwargs), generator, extent.iterations)
    except (IndexError, KeyError) as error:
        raise ValueError(
            f"the blocks of {type(denoiser).__name__} do not take the stream as their first argument exactly once; "
            "iterations=0 leaves the Jacobians out."
        ) from error
    return {"step": step, "norms": norms, "largest": max(norms)}
