"""`whenwhere zoo`: the models that come with the library."""

from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from . import options
from .failing import clearly
from .output import console, print_json
from .quiet import quieten

app = typer.Typer(help="The small trained models that come with the library.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A name that `whenwhere zoo list` prints.")]


@app.command("list")
@clearly
def list_models(as_json: options.AsJson = False) -> None:
    """List the models."""
    quieten()
    from .. import zoo

    entries = [zoo.entry(name) for name in zoo.names()]
    if as_json:
        print_json([_data(entry) for entry in entries])
        return
    table = Table("name", "pipeline", "steps", "guidance", "recipe", box=box.SIMPLE_HEAD)
    for entry in entries:
        table.add_row(entry.name, entry.pipeline, str(entry.steps), f"{entry.guidance:g}", entry.recipe)
    console().print(table)


@app.command("show")
@clearly
def show(name: Name, as_json: options.AsJson = False) -> None:
    """Say what a model is, how it was trained and how good it is."""
    quieten()
    from .. import zoo

    data = _data(zoo.entry(name))
    if as_json:
        print_json(data)
        return
    for key, value in data.items():
        if isinstance(value, dict):
            typer.echo(f"{key}:")
            for inner, number in value.items():
                typer.echo(f"  {inner}: {number}")
        else:
            typer.echo(f"{key}: {value}")


@app.command("path")
@clearly
def path(name: Name, as_json: options.AsJson = False) -> None:
    """Print the folder of a model, for `from_pretrained`."""
    quieten()
    from .. import zoo

    folder = str(zoo.path(name))
    if as_json:
        print_json({"name": name, "path": folder})
    else:
        typer.echo(folder)


def _data(entry: Any) -> dict[str, Any]:
    """An entry of the catalogue as plain data."""
    return {
        field: dict(value) if hasattr(value, "items") else value
        for field, value in ((name, getattr(entry, name)) for name in entry.__dataclass_fields__)
    }
