"""`whenwhere doctor`: which methods fit a pipeline, what each would save, and what is in the way."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from . import options
from .examples import examples
from .failing import clearly
from .output import console, memory, print_json
from .quiet import quieten

if TYPE_CHECKING:
    from ..bench.doctor import Examination

EXAMPLES = examples("doctor emoji-unet", "doctor ./my-pipeline --steps 50 --guidance 7.5")

Model = Annotated[str, typer.Argument(help="A name of the zoo, or a directory written by pipe.save_pretrained().")]


@clearly
def command(
    model: Model = "emoji-unet",
    steps: options.Steps = None,
    scheduler: options.Scheduler = None,
    guidance: options.Guidance = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Say which methods fit a pipeline and what each would save at so many steps; nothing is run.

    Methods are planned with their published defaults, or with fractions where a default counts steps. What is
    saved is in multiply-adds of the denoiser for one picture; `whenwhere bench` measures seconds and quality.
    """
    quieten()
    from ..bench.doctor import examine
    from ..bench.order import open_task

    task = open_task(("-",), (0,), 1, model, scheduler, steps, guidance, "", None, device, dtype)
    found = examine(task.model.pipeline, task.steps, task.guidance)
    if as_json:
        print_json(asdict(found))
    else:
        _print(found)


def _print(found: "Examination") -> None:
    screen = console()
    guided = "with guidance" if found.guided else "without guidance"
    screen.print(f"{found.pipeline}: {found.denoiser}, {found.scheduler}, {found.evaluations} evaluations {guided}")
    for obstacle in found.obstacles:
        screen.print(f"In the way: {obstacle}", style="yellow", soft_wrap=True)
    table = Table("fits", "fewer MACs", "papers' MACs", "remembered", "note", box=box.SIMPLE_HEAD)
    for item in found.treatments:
        if item.ratio is not None and item.ratio_papers is not None:
            ratios = (f"{item.ratio:.2f}x", f"{item.ratio_papers:.2f}x")
            table.add_row(item.label, *ratios, memory(item.bytes), item.reason)
    screen.print(table)
    for item in found.treatments:
        if not item.fits:
            reason = item.reason if item.reason.startswith(item.method) else f"{item.method}: {item.reason}"
            screen.print(f"Does not fit: {reason}", style="dim", soft_wrap=True)
