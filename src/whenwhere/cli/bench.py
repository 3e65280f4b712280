"""`whenwhere bench`: methods and their baselines on many prompts and seeds, into a file of rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import options
from .examples import examples
from .failing import clearly
from .output import check_file, print_json
from .quiet import quieten

if TYPE_CHECKING:
    from ..bench.judges import Judging
    from ..bench.rowfile import RowFile

EXAMPLES = examples(
    "bench emoji-unet --out rows.jsonl",
    'bench emoji-unet -M "tgate(gate_step=8)" -M "deepcache(interval=3)" --limit 16 --seeds 2 --workers 2',
    'bench ./my-pipeline --prompts captions.txt -M "tgate(10)+deepcache(3)" --clip ./clip-vit-large --lpips alex',
)

Model = Annotated[str, typer.Argument(help="A name of the zoo, or a directory written by pipe.save_pretrained().")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-M",
        help="A method to measure; give it several times for several.",
        show_default="all that fit, with their published defaults",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="A text file, one prompt a line.", show_default="64 built-in ones, for the zoo's model"),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only so many prompts.", show_default="all")]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds.")]
Runs = Annotated[int, typer.Option(min=1, help="Measured runs of every prompt and seed.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The file of rows; one that is there is gone on with.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that share the work.")]
Ray = Annotated[
    str, typer.Option(help='Let a Ray cluster do the work: its address, or "local".', show_default="plain processes")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads that every process computes with on the CPU.")]
Pictures = Annotated[int, typer.Option(min=0, help="Keep the pictures of so many pairs of prompt and seed.")]
Lpips = Annotated[str, typer.Option(help="Measure LPIPS too: alex, vgg or squeeze.", show_default="no")]
Clip = Annotated[str, typer.Option(help="Measure the CLIP score with the model in this folder.", show_default="no")]
Features = Annotated[
    bool | None,
    typer.Option(
        "--features/--no-features",
        help="Measure distances of EfficientNet-Lite0 features, and on the zoo agreement with prompts.",
        show_default="if the packages are there",
    ),
]


@clearly
def command(
    model: Model = "emoji-unet",
    method: Methods = None,
    prompts: Prompts = None,
    limit: Limit = None,
    seed: options.Seed = 0,
    seeds: Seeds = 1,
    runs: Runs = 1,
    out: Out = Path("rows.jsonl"),
    steps: options.Steps = None,
    scheduler: options.Scheduler = None,
    guidance: options.Guidance = None,
    negative: options.Negative = "",
    size: options.Size = None,
    workers: Workers = 1,
    ray: Ray = "",
    threads: Threads = 1,
    pictures: Pictures = 6,
    features: Features = None,
    lpips: Lpips = "",
    clip: Clip = "",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Measure methods, and for each the two plain ways to compute as little, on many prompts and seeds.

    Every run is a row of the file: seconds, multiply-adds, memory, and how close the picture is to the plain one. Runs
    take turns after a warm-up. A run that was stopped goes on where it was when the same command is given again; with
    several workers the rows are the same, only seconds are those of a busier machine. `whenwhere report` makes a page
    of the file.
    """
    from ..bench.bench import bench
    from ..bench.order import Order
    from ..bench.prompts import builtin_prompts, read_prompts
    from ..bench.variant import Variant

    check_file(out, ".jsonl")
    texts = tuple(dict.fromkeys(method or ()))
    for text in texts:
        Variant.of(text)
    lines = read_prompts(prompts) if prompts is not None else builtin_prompts(model)
    quieten()
    _require(ray)
    order = Order(
        model=model,
        methods=texts,
        prompts=tuple(lines[:limit]),
        seeds=tuple(range(seed, seed + seeds)),
        runs=runs,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        negative=negative,
        size=options.read_size(size),
        device=device,
        dtype=dtype,
        judging=_judging(model, features, lpips, clip),
        threads=threads,
        pictures=pictures,
    )
    with _bar() as bar:
        file = bench(order, out, workers, ray, bar.name, bar.advance)
    if as_json:
        print_json(_data(file))
    else:
        typer.echo(f"{len(file.rows)} rows of {len(file.listings)} variants: {out}")


def _require(ray: str) -> None:
    """Fail now where a package is missing, not after the first run."""
    from ..bench import cluster
    from ..metrics import images

    images.require()
    if ray:
        cluster.require()


def _judging(model: str, features: bool | None, lpips: str, clip: str) -> "Judging":
    """The optional scores that were asked for, or that are there."""
    from dataclasses import replace

    from .. import zoo
    from ..bench.judges import Judging, at_hand

    in_zoo = model in zoo.names()
    found = Judging(True, in_zoo) if features else Judging() if features is False else at_hand(in_zoo)
    return replace(found, lpips=lpips, clip=clip)


def _data(file: "RowFile") -> dict[str, Any]:
    """What was written, and where."""
    return {
        "rows": len(file.rows),
        "variants": [listing.label for listing in file.listings],
        "file": str(file.path),
        "folder": str(file.folder),
    }


class _Bar:
    """A bar of rows on standard error."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._task = bar, bar.add_task("", total=None)

    def name(self, text: str) -> None:
        """Say what is run next."""
        self._bar.update(self._task, description=text)

    def advance(self, done: int, whole: int) -> None:
        """Say how many rows there are, of how many."""
        self._bar.update(self._task, completed=done, total=whole)


@contextmanager
def _bar() -> Iterator[_Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar)
