"""`whenwhere compare`: plain, methods and baselines on the same prompts and seeds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .compare_table import as_data, print_table
from .examples import examples
from .failing import clearly
from .output import check_file, print_json, progress, replacing
from .quiet import quieten
from .task import make_task

if TYPE_CHECKING:
    from ..bench.comparison import Comparison
    from ..bench.variant import Task, Variant

# Both fit any number of steps: the gate is a fraction of the schedule, that of most published runs of 25 steps.
DEFAULT_METHODS = ("tgate(gate_step=0.4)", "deepcache(interval=3)")
# With a negative text: the pipeline's own guidance, guidance inside attention, and that with T-GATE.
NEGATIVE_METHODS = ("nag", "tgate(gate_step=0.4)+nag")

EXAMPLES = examples(
    'compare "red apple, noto style"',
    'compare "apple, noto style" --negative red --seeds 2',
    'compare "fox, noto style" "blue house, flat style" --method "tgate(gate_step=8)" --seeds 2',
    'compare "a lighthouse" --model ./my-pipeline --method "tgate(10)" --method "tgate(10)+deepcache(3)"',
)


Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-M",
        help="A method to compare; give it several times for several.",
        show_default=" and ".join(DEFAULT_METHODS),
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds.")]
Runs = Annotated[int, typer.Option(min=1, help="Measured runs of every prompt and seed.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the picture goes.")]


@clearly
def command(
    prompts: options.Prompts,
    method: Methods = None,
    model: options.ModelName = "emoji-unet",
    steps: options.Steps = None,
    scheduler: options.Scheduler = None,
    guidance: options.Guidance = None,
    negative: options.Negative = "",
    size: options.Size = None,
    seed: options.Seed = 0,
    seeds: Seeds = 3,
    runs: Runs = 1,
    out: Out = Path("compare.png"),
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Draw the same prompts plainly and with methods, side by side, and measure.

    Runs take turns (plain, A, B, plain, A, B, ...) after a warm-up, and seconds are medians over all of them. Below
    each method stand the two plain ways to compute as little: fewer steps, and guidance stopped early (for T-GATE: at
    the same gate). PSNR and SSIM compare with the plain picture of the same prompt and seed. MACs are multiply-adds of
    the denoiser for one picture; the papers' convention leaves out two products of attention.

    With --negative and no --method: the plain run knows nothing of the text, then come the pipeline's own guidance with
    it (CFG), NAG, and NAG with T-GATE.
    """
    from ..bench.variant import Variant

    if negative and not method:
        asked = negative_variants(negative)
    else:
        asked = list(dict.fromkeys(Variant.of(text).told(negative) for text in method or DEFAULT_METHODS))
    check_file(out, ".png")
    quieten()
    _require_metrics()
    seen = range(seed, seed + seeds)
    task = make_task(
        prompts, seen, runs, model, scheduler, steps, guidance, negative if method else "", size, device, dtype
    )
    comparison = _compare(task, asked)
    _draw(comparison, out)
    if as_json:
        print_json(as_data(comparison) | {"picture": str(out)})
    else:
        print_table(comparison)
        typer.echo(out)


def negative_variants(negative: str) -> list["Variant"]:
    """Ways to steer away from a text: CFG, NAG, NAG with T-GATE."""
    from ..bench.variant import Variant
    from ..methods import CFG

    return [Variant((CFG(negative),)), *(Variant.of(text).told(negative) for text in NEGATIVE_METHODS)]


def _require_metrics() -> None:
    """Fail now where torchmetrics is missing, not after the first run."""
    from ..metrics.images import require

    require()


def _compare(task: "Task", asked: list["Variant"]) -> "Comparison":
    from ..bench.comparison import compare, most_runs

    with progress(most_runs(task, asked)) as advance:
        return compare(task, asked, advance)


def _draw(comparison: "Comparison", out: Path) -> None:
    from ..bench.sheet import draw_comparison

    with replacing(out) as file:
        draw_comparison(comparison).save(file)
