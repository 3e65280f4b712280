"""`whenwhere generate`: pictures from prompts."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .examples import examples
from .failing import clearly
from .output import check_file, check_folder, print_json, progress, replacing, seconds, slug
from .quiet import quieten
from .task import make_task

if TYPE_CHECKING:
    from torch import Tensor

    from ..bench.variant import Task, Variant

EXAMPLES = examples(
    'generate "red apple, noto style" --seed 3 --scale 8',
    'generate "dog, twemoji style" "fox, noto style" --batch 4 --grid --out animals.png',
    'generate "apple, noto style" --negative red --guidance 1 --method "nag(scale=5)"',
    'generate "a lighthouse" --model ./my-pipeline --scheduler dpm++ --method "tgate(gate_step=0.4)"',
)


Batch = Annotated[int, typer.Option(min=1, help="Pictures of every prompt, from seeds that count up.")]
Grid = Annotated[bool, typer.Option("--grid", help="Write one labelled sheet instead of single pictures.")]
Scale = Annotated[int, typer.Option(min=1, help="Enlarge single pictures so many times, without blur.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="A .png file, or a folder for several pictures (made if missing).")
]


@clearly
def command(
    prompts: options.Prompts,
    model: options.ModelName = "emoji-unet",
    steps: options.Steps = None,
    scheduler: options.Scheduler = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    method: options.Method = "",
    negative: options.Negative = "",
    batch: Batch = 1,
    grid: Grid = False,
    size: options.Size = None,
    scale: Scale = 1,
    out: Out = Path(),
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Draw pictures from prompts and write them as PNG.

    All prompts run as one batch; a picture depends on its own prompt and seed alone. Two runs with the same seed and
    different methods show what the method changes; `whenwhere compare` does that side by side.
    """
    from ..bench.variant import Variant

    variant = (Variant.of(method) if method.strip() else Variant()).told(negative)
    seeds = range(seed, seed + batch)
    files = file_names(out, prompts, seeds, grid)
    quieten()
    task = make_task(prompts, seeds, 1, model, scheduler, steps, guidance, negative, size, device, dtype)
    began = time.perf_counter()
    pictures = draw_all(task, variant)
    took = time.perf_counter() - began
    _write(files, pictures, task, variant, grid, scale)
    if as_json:
        print_json(_data(task, variant, files) | {"seconds": took})
        return
    for file in files:
        typer.echo(file)
    typer.echo(f"{len(pictures)} picture{'s' * (len(pictures) != 1)} in {seconds(took)} s", err=True)


def file_names(out: Path, prompts: Sequence[str], seeds: Sequence[int], grid: bool) -> list[Path]:
    """Where the pictures go.

    Raises:
        ValueError: a file cannot be written, or one file is named for several pictures.
    """
    named = out.suffix.lower() == ".png"
    if named and not grid and len(prompts) * len(seeds) > 1:
        raise ValueError(f"{out} is one file for {len(prompts) * len(seeds)} pictures; name a folder, or add --grid.")
    if not named and out.suffix and not out.is_dir():
        raise ValueError(f"{out} must end in .png, or name a folder.")
    words = [f"{slug(prompt)}-{seed}.png" for prompt in prompts for seed in seeds]
    files = [out] if named else [out / "grid.png"] if grid else [out / word for word in words]
    if len(set(files)) < len(files):
        raise ValueError("two prompts give the same file name; draw them one after the other, or add --grid.")
    if named:
        check_file(out)
    else:
        check_folder(out)
    return files


def draw_all(task: "Task", variant: "Variant") -> "Tensor":
    """All pictures of a task in one batch, prompt by prompt, with a bar that follows the scheduler."""
    from ..bench.drawing import attached, draw
    from ..bench.schedulers import evaluations
    from ..clock import Clock

    pipe, steps = task.model.pipeline, variant.steps(task.steps)
    prompts = [prompt for prompt in task.prompts for _ in task.seeds]
    seeds = [seed for _ in task.prompts for seed in task.seeds]
    with (
        progress(evaluations(pipe.scheduler, steps)) as advance,
        attached(pipe, variant.methods, task.guidance),
    ):
        clock = Clock(pipe.scheduler, lambda: None, lambda *_: advance("denoising"))
        try:
            return draw(pipe, prompts, seeds, steps, task.guidance, variant.negative(task.negative), task.size)
        finally:
            clock.stop()


def _data(task: "Task", variant: "Variant", files: list[Path]) -> dict[str, Any]:
    """What was drawn, with the file of every picture."""
    pairs = [{"prompt": prompt, "seed": seed} for prompt in task.prompts for seed in task.seeds]
    names = [str(file) for file in files] * (len(pairs) // len(files))
    return {
        "model": task.model.name,
        "method": variant.label,
        "steps": task.steps,
        "guidance": task.guidance,
        "pictures": [pair | {"file": name} for pair, name in zip(pairs, names, strict=True)],
    }


def _write(files: list[Path], pictures: "Tensor", task: "Task", variant: "Variant", grid: bool, scale: int) -> None:
    """Write the pictures one by one, or as a sheet with a row for every prompt and a column for every seed."""
    from ..picture import Column, as_image, draw_sheet, enlarge

    images = [as_image(picture) for picture in pictures]
    if grid:
        count = len(task.seeds)
        columns = [Column(f"seed {seed}", images[i::count]) for i, seed in enumerate(task.seeds)]
        about = f"{task.model.name}, {variant.label}, {variant.steps(task.steps)} steps, guidance {task.guidance:g}"
        images = [draw_sheet(columns, list(task.prompts), subtitle=about)]
    else:
        images = [enlarge(image, image.width * scale) for image in images]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, image in zip(files, images, strict=True):
        with replacing(file) as temporary:
            image.save(temporary)
