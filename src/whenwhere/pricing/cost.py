"""The cost of a table: multiply-adds in two conventions, and the bytes its memory holds.

What one row costs at every site is measured by running a weightless twin of the model on the meta device under
PyTorch's own counter. The table then says which sites run on how many rows. One multiply-add is one MAC. The
convention of most papers leaves out the two products of attention, query-key and attention-value, because counters did
not see fused kernels; both figures are always given.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..decision import Output, map_tensors
from ..site import TOGETHER, Kind, Site
from ..table import Column, SlotKey, slot_key
from .counting import Counting
from .sizes import note_sizes
from .unit import Attended as Attended
from .unit import Macs as Macs
from .unit import Unit as Unit


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a generation.

    Attributes:
        macs: multiply-adds spent by the denoiser, all steps and rows together.
        baseline: the same without any method.
        bytes: the most that the memory holds at any moment.
    """

    macs: Macs
    baseline: Macs
    bytes: int

    @property
    def ratio(self) -> float:
        """How many times fewer multiply-adds than without methods, all products counted."""
        return self.baseline.all / self.macs.all if self.macs.all else float("inf")

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x fewer" if self.ratio >= 1 else f"{1 / self.ratio:.2f}x more"


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of a model's structure on the meta device, without any weight, every forward its class's own."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        twin = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    for module in model.modules():
        # An instance's own forward (ours, accelerate's) would be copied as a reference to the original's weights.
        forward = vars(module).get("forward")
        if forward is not None:
            memo[id(forward)] = None
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        vars(module).pop("forward", None)
        vars(module).pop("_hf_hook", None)
    return copied.eval()


class PricingError(ValueError):
    """A network whose multiply-adds nobody can count, because it does not run on tensors without numbers."""


def measure(model: nn.Module, sites: Sequence[Site], example: Mapping[str, Any]) -> list[Unit]:
    """What one row costs at every site of a model.

    Args:
        model: the denoiser, on any device; its weights are not touched.
        sites: the sites to price, from `walk`.
        example: keyword arguments of one forward, tensors on the meta device; the first one has a row for every sample.

    Raises:
        PricingError: an operation of the model is not known on the meta device, as of some that are quantised.
    """
    rows = next(iter(example.values())).shape[0]
    bare = next(model.parameters()).device.type == "meta" and not any("forward" in vars(m) for m in model.modules())
    twin = model if bare else meta_twin(model)  # offloading puts weights on the meta device, and fetches them in front
    outputs: dict[str, tuple[int, ...]] = {}
    tokens: dict[str, int] = {}
    attended: dict[str, Attended] = {}
    handles = [
        twin.get_submodule(site.path).register_forward_hook(_note_bytes(outputs, tokens, site.path))
        for site in sites
        if not site.beside
    ]
    handles += note_sizes(twin, rows, attended)
    try:
        with torch.no_grad(), Counting() as counting:
            twin(**example)
    except NotImplementedError as error:
        reason = str(error).partition(". ")[0].replace("\n", " ")
        raise PricingError(f"the multiply-adds of {type(model).__name__} cannot be counted: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    of_text = next((sizes for sizes in attended.values() if sizes.text), None)
    root = type(twin).__name__
    macs = {path.removeprefix(root).removeprefix("."): spent for path, spent in counting.macs(rows).items()}
    return [
        Unit(
            macs.get(site.path, Macs()),
            tuple(size // rows for size in outputs.get(site.path, ())),
            _parts(macs, site.path),
            attended.get(_attending(site), None if site.path else of_text),
            next(twin.parameters()).element_size(),
            tokens.get(site.path, 0),
        )
        for site in sites
    ]


def price(modules: Mapping[Site, nn.Module | None], examples: Mapping[Kind, Mapping[str, Any]]) -> list[Unit]:
    """What one row costs at every site, for a pipeline's denoiser and for the network beside it, if there is one.

    Args:
        modules: the sites, each with its module; the denoiser is among them.
        examples: by `Kind.MODEL` and `Kind.CONTROL`, what `measure` needs of either.

    Raises:
        PricingError: as `measure` does.
    """
    (denoiser,) = (module for site, module in modules.items() if module is not None and site.kind is Kind.MODEL)
    units = measure(denoiser, tuple(modules), examples[Kind.MODEL])
    for i, (site, module) in enumerate(modules.items()):
        if site.kind is Kind.SCHEDULER:
            units[i] = Unit(Macs(), (_latent_bytes(units[0], examples[Kind.MODEL]),), itemsize=units[0].itemsize)
        if module is not None and site.kind is Kind.CONTROL and Kind.CONTROL in examples:
            (units[i],) = measure(module, [Site(Kind.MODEL, "", 0, 1)], examples[Kind.CONTROL])
    return units


def price_or_reason(
    modules: Mapping[Site, nn.Module | None], examples: Mapping[Kind, Mapping[str, Any]]
) -> list[Unit] | str:
    """What `price` returns, or why it cannot."""
    try:
        return price(modules, examples)
    except PricingError as error:
        return str(error)


def _latent_bytes(model: Unit, example: Mapping[str, Any]) -> int:
    """Of one sample. More than latents may enter the denoiser (a mask), or leave it (a variance), not both."""
    entering: Tensor = next(iter(example.values()))
    return min(sum(model.bytes), entering[0].numel() * entering.element_size())


def _attending(site: Site) -> str:
    """The path whose attention a site's sizes are those of: its own, or that of the block it shares with it."""
    return site.path.rpartition(".")[0] if site.kind in TOGETHER else site.path


def _parts(macs: Mapping[str, Macs], path: str) -> dict[str, Macs]:
    """What lies inside a path, by relative path."""
    prefix = f"{path}." if path else ""
    return {name.removeprefix(prefix): cost for name, cost in macs.items() if name.startswith(prefix)}


def count(run: Any, model: nn.Module | None = None) -> tuple[Output, Macs]:
    """Run a function and count the multiply-adds that really happened, on any device: all, or those of one model."""
    with Counting() as counting:
        output = run()
    return output, counting.macs().get("Global" if model is None else type(model).__name__, Macs())


def total(sites: Sequence[Site], units: Sequence[Unit], columns: Sequence[Column], samples: int) -> Cost:
    """The cost of a table for a number of samples.

    Args:
        sites, units: what there is, and what one row of it costs.
        columns: the table; in each the number of branches stands in its step.
        samples: images, or videos, generated at once.
    """
    spent, baseline = Macs(), Macs()
    held: dict[SlotKey, int] = {}
    peak = 0
    for column in columns:
        inner = column.step.branches
        for i, (site, unit) in enumerate(zip(sites, units, strict=True)):
            whole = site.kind in (Kind.MODEL, Kind.CONTROL)
            branches = column.step.branches if whole else inner
            if whole:
                baseline += unit.macs.times(branches * samples)
            if not column.reached[i]:
                continue
            decisions = [opinion.decision for opinion in column.opinions[i]]
            for decision in decisions if site.kind is Kind.MODEL else ():
                inner = branches = decision.inner_branches(inner)
            share = min((decision.share() for decision in decisions), default=1.0)
            spent += unit.macs.times(branches * samples * (share if whole else share - 1))
            stopped = any(decision.stops for decision in decisions)
            for opinion in column.opinions[i]:
                spent += opinion.decision.extra(unit, samples)
                if not stopped:
                    spent -= opinion.decision.saved(unit).times(branches * samples)
                if opinion.decision.keeps:
                    kept = opinion.decision.held_bytes(unit, branches, samples)
                    key = slot_key(opinion, i, column.step.pass_)
                    # The sites that share a slot fill it together; the text stream may end in the last of them.
                    held[key] = max(kept, held.get(key, 0)) if opinion.decision.home else kept
                    peak = max(peak, sum(held.values()))
    return Cost(spent, baseline, peak)


def _note_bytes(outputs: dict[str, tuple[int, ...]], tokens: dict[str, int], path: str) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Output) -> None:
        seen: set[int] = set()
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(0 if id(tensor) in seen else tensor.numel() * tensor.element_size())
            seen.add(id(tensor))
            return tensor

        map_tensors(output, note)
        outputs[path] = tuple(sizes)
        if isinstance(output, Tensor) and output.ndim == 3:
            tokens[path] = output.shape[1]

    return hook
