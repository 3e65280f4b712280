"""A comparison as one picture: the pictures side by side, and the plans of the methods below."""

from collections.abc import Sequence

from PIL import Image

from ..picture import Column, as_image, beside, draw_plan, draw_sheet, stack
from ..picture.ink import SCALE
from .comparison import Comparison
from .summary import Summary
from .variant import PLAIN, Variant

_MOST_ROWS = 12  # of pictures
_NARROWEST = 380.0  # points, of a plan beside another


def draw_comparison(comparison: Comparison) -> Image.Image:
    """Columns are the plain run and every method with its baselines; rows are prompts and seeds."""
    task, summaries = comparison.task, comparison.summaries()
    pairs = [(prompt, seed) for prompt in task.prompts for seed in task.seeds][:_MOST_ROWS]

    def column(variant: Variant, apart: bool) -> Column:
        pictures = [as_image(comparison.pictures[variant, prompt, seed]) for prompt, seed in pairs]
        return Column(variant.label, pictures, _notes(summaries[variant]), apart)

    columns = [column(PLAIN, apart=False)]
    for method, baselines in comparison.groups.items():
        columns += [column(variant, apart=variant is method) for variant in (method, *baselines)]
    one = len(task.prompts) == 1
    labels = [f"seed {seed}" if one else f"{prompt} ({seed})" for prompt, seed in pairs]
    title = task.prompts[0] if one else f"{len(task.prompts)} prompts"
    sheet = draw_sheet(columns, labels, title, f"{comparison.heading}. {comparison.environment}")
    return stack([sheet, *_plans(comparison, sheet.width / SCALE)])


def _notes(summary: Summary) -> list[str]:
    """One variant as lines under its heading."""
    time = f"{summary.seconds.median:.3g} s"
    if summary.psnr is None or summary.ssim is None:
        return [time]
    return [
        f"{time}, {summary.speed_up:.2f}x speed",
        f"{summary.macs_ratio:.2f}x fewer MACs",
        f"{summary.psnr:.1f} dB, SSIM {summary.ssim:.3f}",
    ]


def _plans(comparison: Comparison, width: float) -> Sequence[Image.Image]:
    """The plans of the methods, as many beside each other as there is room for."""
    methods = [method for method in comparison.groups if method.methods]
    if not methods:
        return []
    across = max(1, min(len(methods), int(width / _NARROWEST)))
    plans = [
        draw_plan(comparison.prices[method].plan, method.label, max(_NARROWEST, width / across)) for method in methods
    ]
    return [beside(plans[start : start + across]) for start in range(0, len(plans), across)]
