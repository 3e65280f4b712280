"""The ladder of skips, on sites that are numbered: mirrored blocks, and which site's output climbs on."""

from collections.abc import Mapping
from dataclasses import replace

from .site import Kind, Side, Site


def mirrored(site: Site) -> Site:
    """A block on the ladder of long skips: i and L-1-i share rung min(i, L-1-i); the two deepest are the middle."""
    if site.kind is not Kind.BLOCK or site.block is None:
        return site
    depth = min(site.block, site.blocks - 1 - site.block)
    middle = depth == (site.blocks - 1) // 2
    side = Side.MIDDLE if middle else Side.ENCODER if site.block == depth else Side.DECODER
    return replace(site, depth=depth, side=side)


def mark_carriers(sites: list[Site]) -> list[Site]:
    """Mark, for each kind, the last site of every rung on the way up: the next rung receives what it puts out."""
    last: Mapping[tuple[Kind, int], int] = {
        (site.kind, site.depth): i
        for i, site in enumerate(sites)
        if site.depth is not None and site.side is not Side.ENCODER
    }
    return [replace(site, carries=True) if i in last.values() else site for i, site in enumerate(sites)]
