"""`whenwhere plan`: the table of decisions and its cost, before anything runs."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from . import options
from .examples import examples
from .failing import clearly
from .output import check_file, console, replacing
from .quiet import quieten

if TYPE_CHECKING:
    from ..plan import Plan

EXAMPLES = examples(
    'plan sdxl --method "tgate(gate_step=10)" --steps 25',
    'plan sd15 --method "tgate(gate_step=0.4)+deepcache(interval=3)" --png plan.png',
    'plan emoji-unet --method "deepcache(interval=3)" --json',
)

_STYLES = {"#": "blue", ".": "bright_cyan", "/": "yellow"}


Model = Annotated[
    str,
    typer.Argument(help="An architecture (sd15, sdxl, pixart-alpha-1024, ...), a name of the zoo, or a directory."),
]
Guidance = Annotated[
    bool | None,
    typer.Option(
        "--guidance/--no-guidance", help="Whether classifier-free guidance is on [the model's]", show_default=False
    ),
]
Images = Annotated[int, typer.Option(min=1, help="Pictures, or videos, made at once.")]
Png = Annotated[Path | None, typer.Option(help="Draw the plan to this file.", show_default=False)]
Save = Annotated[Path | None, typer.Option(help="Save the plan as JSON.", show_default=False)]


@clearly
def command(
    model: Model,
    method: options.Method = "",
    steps: options.Steps = None,
    guidance: Guidance = None,
    images: Images = 1,
    png: Png = None,
    save: Save = None,
    as_json: options.AsJson = False,
) -> None:
    """Print what a method computes when and where, and what it costs, before anything runs.

    Weights are not needed: published architectures are built from their configuration. Rows are sites, columns are
    steps; a blank is a site that is not reached. MACs are given in two conventions, with and without the products of
    attention that the papers leave out.
    """
    from ..bench.variant import Variant

    variant = Variant.of(method) if method.strip() else Variant()
    for file, suffix in ((png, ".png"), (save, ".json")):
        if file is not None:
            check_file(file, suffix)
    quieten()
    plan = make(model, variant, steps, guidance, images)
    if png is not None:
        _draw(plan, f"{model}: {variant.label}", png)
    if save is not None:
        with replacing(save) as temporary:
            plan.save(temporary)
    if as_json:
        typer.echo(_as_json(plan), nl=False)
        return
    heading = Text(f"{model}, {variant.label}, {plan.steps} evaluations\n")
    console().print(heading, coloured(plan), sep="\n", soft_wrap=True)


def _draw(plan: "Plan", title: str, png: Path) -> None:
    from ..picture import draw_plan

    with replacing(png) as temporary:
        draw_plan(plan, title).save(temporary)


def make(name: str, variant: Any, steps: int | None, guidance: bool | None, images: int) -> "Plan":
    """The plan of a variant on a model that is named in any of the three ways.

    Raises:
        ValueError: no such model, or a method that does not fit it.
    """
    from .. import architectures, planning, zoo
    from ..bench.model import find_directory, open_model
    from ..bench.schedulers import evaluations

    if name in architectures.names():
        row = architectures.architecture(name)
        if guidance and not row.guided:
            raise ValueError(f"{name} is run without a guidance batch, so there is no guidance to plan.")
        asked = variant.steps(steps or row.steps)
        return planning.plan(name, *variant.methods, steps=asked, guidance=guidance is not False, images=images)
    if name not in zoo.names():
        find_directory(name, [*architectures.names(), *zoo.names()])
    model = open_model(name, device="cpu", dtype="float32")
    scheduler, asked = model.pipeline.scheduler, variant.steps(steps or model.steps)
    count = evaluations(scheduler, asked)
    scheduler.set_timesteps(asked)
    guidance = model.guidance > 1 if guidance is None else guidance
    return planning.plan(
        model.pipeline, *variant.methods, steps=count, guidance=guidance, images=images, scheduler=scheduler
    )


def coloured(plan: "Plan") -> Text:
    """A plan as it prints, its decisions in colour."""
    text = Text(str(plan))
    start = 0
    width = max(len(label) for label, _ in plan.groups) + 2
    for _, row in plan.groups:
        for step, symbol in enumerate(row):
            if style := _STYLES.get(symbol):
                text.stylize(style, start + width + step, start + width + step + 1)
        start += width + len(row) + 1
    return text


def _as_json(plan: "Plan") -> str:
    """The same as `--save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        plan.save(file)
        return file.read_text(encoding="utf-8")
