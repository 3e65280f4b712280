"""`whenwhere diagnose`: measurements that explain why a model bears a method or does not."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from . import options
from .examples import examples
from .failing import clearly
from .output import check_file, console, print_json, replacing
from .quiet import quieten

app = typer.Typer(help="Measure why a model bears a method, or does not.", no_args_is_help=True)

EXAMPLES = examples(
    "diagnose smoothness runs/skip/pipeline --png smoothness.png",
    'diagnose smoothness runs/skip/pipeline --method "skipcache(interval=2)" --json',
)

Pipeline = Annotated[str, typer.Argument(help="A name of the zoo, or a directory written by pipe.save_pretrained().")]
Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT",
        help="What is drawn meanwhile; classes for DiT, by number or label.",
        show_default="classes 0, 1, ..., or empty",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Pictures in the batch where no prompt is given.")]
Steps = Annotated[int, typer.Option(min=2, help="Inference steps.")]
Pairs = Annotated[int, typer.Option(min=1, help="Pairs of random directions.")]
Grid = Annotated[int, typer.Option(min=2, help="Points along each direction.")]
Radius = Annotated[float, typer.Option(help="Largest perturbation, as a share of the weights' own norm.")]
Iterations = Annotated[int, typer.Option(min=0, help="Of the power method for Jacobians; 0 leaves them out.")]
Guidance = Annotated[float, typer.Option(min=0, help="Guidance scale; 1 is none.")]
Seed = Annotated[int, typer.Option(min=0, help="Of noise and directions.")]
Rerun = Annotated[
    bool, typer.Option(help="Perturbed networks run the sampler themselves; otherwise they are asked once per moment.")
]
Png = Annotated[Path | None, typer.Option(help="Draw everything to this file.", show_default=False)]
Device = options.Device


@app.callback()
def _group() -> None:
    """Measure why a model bears a method, or does not."""


@app.command("smoothness", epilog=EXAMPLES)
@clearly
def smoothness(
    pipeline: Pipeline,
    prompts: Prompts = None,
    samples: Samples = 4,
    steps: Steps = 20,
    pairs: Pairs = 3,
    grid: Grid = 5,
    radius: Radius = 0.1,
    iterations: Iterations = 10,
    guidance: Guidance = 1.0,
    method: options.Method = "",
    seed: Seed = 0,
    rerun: Rerun = True,
    device: Device = "cpu",
    png: Png = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how smooth the features of a model are: the diagnostics of Skip-DiT.

    The prediction under perturbed weights, the change of every block from step to step, the norms of the blocks'
    Jacobians, the singular values of the fusions of long skips, and, with a method, how far its predictions leave
    those of the plain run.
    """
    from ..bench.variant import PLAIN, Variant

    variant = Variant.of(method) if method.strip() else PLAIN
    if png is not None:
        check_file(png, ".png")
    quieten()
    from ..bench.model import open_model
    from ..bench.survey import Extent, default_prompts, survey

    extent = Extent(steps, (0.2, 0.5, 0.8), pairs, grid, radius, iterations, guidance, seed, rerun)
    pipe = open_model(pipeline, device, "float32").pipeline
    found = survey(pipe, prompts or default_prompts(pipe, samples), extent, variant)
    if png is not None:
        from ..picture.survey import draw_survey

        with replacing(png) as temporary:
            draw_survey(found, pipeline).save(temporary)
    if as_json:
        print_json(found)
        return
    console().print(_table(found))


def _table(found: dict) -> Table:  # type: ignore[type-arg]
    """The survey in a few numbers."""
    table = Table("what", "value", box=box.SIMPLE_HEAD)
    for row in found["surface"]:
        table.add_row(f"1 - cos under perturbed weights, step {row['step']}: mean", f"{row['mean']:.3g}")
        table.add_row("   worst", f"{row['worst']:.3g}")
    table.add_row("change of a block from step to step, relative L1: mean", f"{found['change']['mean']:.3g}")
    early = f"   share in the first {found['change']['early steps']:.2g} of the steps"
    table.add_row(early, f"{found['change']['early share']:.3g}")
    for row in found.get("jacobians", []):
        table.add_row(f"norm of a block's Jacobian, step {row['step']}: largest", f"{row['largest']:.3g}")
    if "similarity" in found:
        least = min(found["similarity"]["mean"])
        table.add_row(
            f"1 - cos to the plain prediction with {found['similarity']['method']}: worst", f"{1 - least:.3g}"
        )
    for half in ("stream", "skip") if "fusions" in found else ():
        largest = max(row[half][0] for row in found["fusions"])
        table.add_row(f"norm of a fusion's half for the {half}: largest", f"{largest:.3g}")
    return table
