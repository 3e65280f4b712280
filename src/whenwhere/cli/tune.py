"""`whenwhere tune`: the schedule for a wish, with the evidence."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from . import options
from .examples import examples
from .failing import clearly
from .output import check_file, console, print_json, progress, replacing
from .quiet import quieten

if TYPE_CHECKING:
    from ..bench.choice import Choice, Rival
    from ..bench.intervals import Interval
    from ..bench.tune_search import Goal
    from ..bench.variant import Task

EXAMPLES = examples(
    "tune emoji-unet --speedup 1.8",
    "tune ./my-pipeline --macs 2 --prompts captions.txt --trials 60 --out choice.json",
    "tune ./my-pipeline --psnr 25 --prompts captions.txt --steps 50",
)

_LIKELY = 8  # runs that the bar counts for every trial

Model = Annotated[str, typer.Argument(help="A name of the zoo, or a directory written by pipe.save_pretrained().")]
Speedup = Annotated[
    float | None, typer.Option(help="So many times as fast as plain, by the clock.", show_default=False)
]
Macs = Annotated[float | None, typer.Option(help="So many times fewer multiply-adds.", show_default=False)]
Psnr = Annotated[
    float | None,
    typer.Option(help="As fast as it goes with pictures this close to the plain ones, in dB.", show_default=False),
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="A text file, one prompt a line; every second one is held out.", show_default="built-in ones"),
]
Limit = Annotated[int, typer.Option(min=2, help="Take only so many prompts; half of them are held out.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds to tune on; as many others are held out.")]
Trials = Annotated[int, typer.Option(min=1, help="Variants that are drawn at most, in every round of the search.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the choice goes; measured changes go beside it.")]


@clearly
def command(
    model: Model = "emoji-unet",
    speedup: Speedup = None,
    macs: Macs = None,
    psnr: Psnr = None,
    prompts: Prompts = None,
    limit: Limit = 32,
    seed: options.Seed = 0,
    seeds: Seeds = 1,
    trials: Trials = 30,
    out: Out = Path("choice.json"),
    steps: options.Steps = None,
    scheduler: options.Scheduler = None,
    guidance: options.Guidance = None,
    negative: options.Negative = "",
    size: options.Size = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Search methods and their parameters for a speed-up, for fewer multiply-adds, or for a floor of quality.

    Plans are filtered by multiply-adds, pictures measure quality (PSNR against the plain picture), and the clock
    confirms, in turns with the plain run. Then the choice is measured on prompts and seeds that the search never
    saw, beside published defaults at equal cost, fewer steps and guidance stopped early, and the command says whether
    it beats them. The file is loaded by `whenwhere.load_choice`.
    """
    goal = _goal(speedup, macs, psnr)
    check_file(out, ".json")
    quieten()
    from ..bench.order import open_task
    from ..bench.prompts import builtin_prompts, read_prompts
    from ..bench.tune import tune
    from ..bench.tune_search import require
    from ..metrics import images

    require()
    images.require()
    lines = (read_prompts(prompts) if prompts is not None else builtin_prompts(model))[:limit]
    if len(lines) < 2:
        raise ValueError("tuning needs at least two prompts: one to tune on and one to judge on.")
    first = range(seed, seed + seeds)
    common = (model, scheduler, steps, guidance, negative, options.read_size(size), device, dtype)
    task = open_task(lines[::2], first, 1, *common)
    held_out = _held_out(task, lines[1::2], range(seed + seeds, seed + 2 * seeds))
    with progress(_LIKELY * trials) as advance:
        choice = tune(task, held_out, goal, trials, out.with_suffix(".calibration.json"), advance)
    with replacing(out) as temporary:
        choice.save(temporary)
    if as_json:
        print_json(asdict(choice) | {"python": choice.python})
    else:
        _print(choice, out)


def _goal(speedup: float | None, macs: float | None, psnr: float | None) -> "Goal":
    from ..bench.tune_search import Goal

    given = [Goal("speedup", speedup)] if speedup is not None else []
    given += [Goal("macs", macs)] if macs is not None else []
    given += [Goal("psnr", psnr)] if psnr is not None else []
    if len(given) != 1:
        raise ValueError(f"give one of --speedup, --macs and --psnr, for example --speedup 1.8; got {len(given)}.")
    return given[0]


def _held_out(task: "Task", prompts: list[str], seeds: range) -> "Task":
    from dataclasses import replace

    return replace(task, prompts=prompts, seeds=seeds)


def _print(choice: "Choice", out: Path) -> None:
    screen = console()
    screen.print(
        f"{choice.model}, {choice.steps} steps, {choice.scheduler}: {choice.goal}, on held-out prompts and seeds"
    )
    table = Table("", "", "fewer MACs", "speed-up", "PSNR, dB", "the choice leads by, dB", "", box=box.SIMPLE_HEAD)
    for rival in (choice.own, *choice.rivals):
        table.add_row(*_cells(rival, rival is choice.own))
    screen.print(table)
    for sentence in choice.said:
        screen.print(sentence, soft_wrap=True)
    screen.print(choice.python, soft_wrap=True, markup=False)
    typer.echo(out)


def _cells(rival: "Rival", own: bool) -> tuple[str, ...]:
    lead = "" if own else _interval(rival.lead, 1)
    numbers = (f"{rival.macs_ratio:.2f}x", _interval(rival.speed_up, 2), _interval(rival.psnr, 1), lead)
    return (rival.name, rival.label, *numbers, "" if own else rival.verdict)


def _interval(found: "Interval", digits: int) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"
