"""Anatomies: what a model family looks like, as data, and the walk that turns a real model into sites.

An anatomy is a table of parts. `*` in a path stands for a number, `**` for any run of names; everything else is
literal. The execution order of the sites, which their registration order does not give, is data too: the `sequence`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, StrEnum

from torch import nn

from .ladder import mark_carriers, mirrored
from .site import Kind, Side, Site


class Role(StrEnum):
    """What a row of the guidance batch is conditioned on."""

    CONDITIONAL = "conditional"
    UNCONDITIONAL = "unconditional"
    IMAGE = "image"  # InstructPix2Pix: the picture without the text
    PERTURBED = "perturbed"  # perturbed-attention guidance: the text, with identity attention


class Rung(Enum):
    """How a part moves on the skip ladder when the network is walked in the order of execution."""

    NEXT = 1  # pushes a new skip
    SAME = 0  # works on the skip of the site before it
    BACK = -1  # pops a skip
    BOTTOM = 2  # the middle of the network, deeper than every skip


@dataclass(frozen=True, slots=True)
class Part:
    """One row of an anatomy: all modules at `path` have this role."""

    kind: Kind
    path: str
    side: Side | None = None
    rung: Rung | None = None
    text: bool = False  # whether it serves the text stream alone


@dataclass(frozen=True)
class Anatomy:
    """A model family as data.

    Attributes:
        model: class name of the denoiser, in diffusers or anywhere else.
        parts: its sites by role.
        sequence: names of modules in the order of execution, in groups; the members of one group take turns (resnet 0,
            attention 0, resnet 1, ...).
        rows: arguments of the denoiser's forward that hold one row per sample and guidance branch.
        roles: the branches of a guidance batch, in their order.
        passes: the branches as separate calls of the denoiser, in their order; empty where one batch holds them all.
        survivor: the branch that goes on when guidance is dropped for good (T-GATE section 5 of the paper's code).
        mirrored: whether the blocks are joined by long skips, block i to block count - 1 - i, where blocks that take
            turns count as one.
        doubled: whether the family's pipeline keeps the latents of all branches, so that the scheduler moves them all
            and its `step` does not tell how many branches there are.
    """

    model: str
    parts: tuple[Part, ...]
    sequence: tuple[tuple[str, ...], ...]
    rows: tuple[str, ...]
    roles: tuple[Role, ...] = (Role.UNCONDITIONAL, Role.CONDITIONAL)
    passes: tuple[Role, ...] = ()
    survivor: Role = Role.UNCONDITIONAL
    mirrored: bool = False
    doubled: bool = False


def find(model: nn.Module, anatomies: Iterable[Anatomy]) -> Anatomy:
    """The anatomy of a model, looked up by the names of its class and of the classes it derives from.

    Raises:
        ValueError: no anatomy fits.
    """
    known = {anatomy.model: anatomy for anatomy in anatomies}
    for cls in type(model).__mro__:
        if cls.__name__ in known:
            return known[cls.__name__]
    raise ValueError(
        f"{type(model).__name__} has no anatomy, so no site of it is known. Known: {', '.join(sorted(known))}. "
        "Another family is added by passing attach(..., anatomy=Anatomy(...))."
    )


def walk(model: nn.Module, anatomy: Anatomy) -> dict[Site, nn.Module]:
    """All sites of a model in the order of execution, each with its module.

    Raises:
        ValueError: no row but that of the model itself matches, or there is no row for the model itself. A single row
            that matches nothing is no error: a U-Net without attention on one level is legal.
    """
    if not any(part.kind is Kind.MODEL and part.path == "" for part in anatomy.parts):
        raise ValueError(f'the anatomy {anatomy.model!r} lacks the model itself: it needs a row Part(Kind.MODEL, "").')
    found = [
        (_moment(path, anatomy.sequence), path, _as_told(part, module), module)
        for path, module in model.named_modules()
        for part in anatomy.parts
        if _matches(part.path, path)
    ]
    found.sort(key=lambda row: row[0])
    if all(part.kind is Kind.MODEL for _, _, part, _ in found):
        raise ValueError(f"{type(model).__name__}: no row of the anatomy {anatomy.model!r} matches any of its modules.")
    depths = _ladder([(path, part) for _, path, part, _ in found])
    kinds = [part.kind for _, _, part, _ in found]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    seen: dict[Kind, int] = dict.fromkeys(counts, 0)
    sites = []
    for (_, path, part, _), (depth, side) in zip(found, depths, strict=True):
        sites.append(Site(part.kind, path, seen[part.kind], counts[part.kind], side, depth, text=part.text))
        seen[part.kind] += 1
    sites = _number_blocks(sites, anatomy.sequence)
    joined = {site.block for site in sites if site.kind is Kind.PROJECTION}
    sites = [replace(site, parallel=site.kind is not Kind.BLOCK and site.block in joined) for site in sites]
    sites = mark_carriers([mirrored(site) for site in sites] if anatomy.mirrored else sites)
    return dict(zip(sites, (module for *_, module in found), strict=True))


# What a module that says whether it attends to a text is; blocks may do so in both their attentions, or in neither.
_TOLD: dict[object, Kind] = {True: Kind.CROSS_ATTENTION, False: Kind.SELF_ATTENTION}


def _as_told(part: Part, module: nn.Module) -> Part:
    """A row of attention, with the role that the module itself tells where it does (diffusers' `Attention`)."""
    if part.kind not in _TOLD.values():
        return part
    return replace(part, kind=_TOLD.get(getattr(module, "is_cross_attention", None), part.kind))


def _matches(pattern: str, path: str) -> bool:
    """Whether a dotted path fits a pattern: `*` is a number, `**` is one or more names."""
    escaped = re.escape(pattern).replace(r"\*\*", r".+").replace(r"\*", r"\d+")
    return re.fullmatch(escaped, path) is not None


def _moment(path: str, sequence: tuple[tuple[str, ...], ...]) -> list[tuple[int, int, int]]:
    """When a module runs, as a sortable key: for each name on the path its group, its number, its turn in the group."""
    place = {name: (group, turn) for group, names in enumerate(sequence) for turn, name in enumerate(names)}
    names = path.split(".") if path else []
    key = []
    for name, following in zip(names, [*names[1:], ""], strict=False):
        if not name.isdigit():
            group, turn = place.get(name, (len(sequence), 0))
            key.append((group, int(following) if following.isdigit() else 0, turn))
    return key


def _ladder(parts: list[tuple[str, Part]]) -> list[tuple[int | None, Side | None]]:
    """Depth and side of every part, given in the order of execution."""
    rung = 0
    turned = any(part.rung is Rung.BOTTOM for _, part in parts)  # distilled U-Nets may lack the middle
    depths: list[int | None] = []
    for _, part in parts:
        if part.rung is Rung.BACK and not turned:
            rung, turned = rung + 1, True
        if part.rung is not None:
            rung += 1 if part.rung is Rung.BOTTOM else part.rung.value
        depths.append(None if part.rung is None else rung)
    for i, (path, part) in enumerate(parts):
        if part.kind is Kind.STAGE and depths[i] is None:
            within = [d for d, (p, _) in zip(depths, parts, strict=True) if d is not None and p.startswith(path + ".")]
            depths[i] = min(within, default=None)
    return [(depth, part.side) for depth, (_, part) in zip(depths, parts, strict=True)]


def _number_blocks(sites: list[Site], sequence: tuple[tuple[str, ...], ...]) -> list[Site]:
    """Number the blocks in the order of execution, those that take turns as one; mark what lies inside with it."""
    moments: dict[str, object] = {}
    for site in sites:
        if site.kind is Kind.BLOCK:
            *outer, (group, number, _) = _moment(site.path, sequence)
            moments[site.path] = (*outer, group, number)
    numbers = {moment: i for i, moment in enumerate(dict.fromkeys(moments.values()))}
    paths = {path: numbers[moment] for path, moment in moments.items()}
    return [replace(site, block=_enclosing(site.path, paths), blocks=len(numbers)) for site in sites]


def _enclosing(path: str, blocks: Mapping[str, int]) -> int | None:
    """The number of the innermost block that a path is or lies in."""
    names = path.split(".")
    prefixes = (".".join(names[:end]) for end in range(len(names), 0, -1))
    return next((blocks[prefix] for prefix in prefixes if prefix in blocks), None)
