"""A comparison as a table, and as plain data."""

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from .output import console, macs, memory, seconds

if TYPE_CHECKING:
    from ..bench.comparison import Comparison
    from ..bench.summary import Summary


def print_table(comparison: "Comparison") -> None:
    """A row for the plain run and every method, with its baselines below it."""
    from ..bench.variant import PLAIN

    summaries = comparison.summaries()
    table = Table(box=box.SIMPLE_HEAD, title=comparison.heading, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("seconds", "denoising", "speed-up", "MACs", "papers' MACs", "remembered", "PSNR", "SSIM"):
        table.add_column(name, justify="right")
    table.add_row(PLAIN.label, *_cells(summaries[PLAIN]))
    for method, baselines in comparison.groups.items():
        table.add_section()
        table.add_row(method.label, *_cells(summaries[method]), style="bold")
        for baseline in baselines:
            table.add_row(f"  {baseline.label}", *_cells(summaries[baseline]))
    screen = console()
    screen.print(table)
    for variant, summary in summaries.items():
        if summary.counted not in (None, summary.macs):
            screen.print(
                f"{variant.label}: {macs(summary.counted or 0)} MACs were counted, not planned.", style="yellow"
            )
    runs = summaries[PLAIN].seconds.runs
    about = f"{runs} interleaved runs each: medians ± half the range. {comparison.environment}"
    screen.print(about, style="dim", soft_wrap=True)


def _cells(summary: "Summary") -> list[str]:
    """One variant as the cells of a row."""
    spread = (summary.seconds.high - summary.seconds.low) / 2
    return [
        f"{seconds(summary.seconds.median)} ±{spread:.2f}",
        seconds(summary.denoising.median),
        f"{summary.speed_up:.2f}x",
        f"{macs(summary.macs)} ({summary.macs_ratio:.2f}x)",
        macs(summary.macs_papers),
        memory(summary.held),
        "–" if summary.psnr is None else f"{summary.psnr:.1f} dB",
        "–" if summary.ssim is None else f"{summary.ssim:.3f}",
    ]


def as_data(comparison: "Comparison") -> dict[str, Any]:
    """Everything that was measured. Infinity, the PSNR of identical pictures, is written as a word."""
    task = comparison.task
    return {
        "model": task.model.name,
        "revision": task.model.revision,
        "steps": task.steps,
        "guidance": task.guidance,
        "environment": asdict(comparison.environment),
        "variants": [
            {
                "label": variant.label,
                "baselines": [baseline.label for baseline in comparison.groups.get(variant, [])],
                **{key: "inf" if value == math.inf else value for key, value in asdict(summary).items()},
            }
            for variant, summary in comparison.summaries().items()
        ],
        "rows": [json.loads(row.to_json()) for row in comparison.rows],
    }
