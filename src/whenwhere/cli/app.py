"""The commands, put together."""

import typer

from . import bench, compare, convert, diagnose, doctor, generate, language, plan, report, tune, zoo
from .examples import flowing
from .failing import ENVIRONMENT_VARIABLE

app = typer.Typer(
    name="whenwhere",
    help=(
        "Decide when and where a Transformer computes.\n\n"
        "A method (T-GATE, DeepCache, ...) makes a decision at every site of a model and every step of a generation: "
        "compute, reuse, skip. [bold]plan[/bold] prints the decisions and their cost before anything runs, "
        "[bold]compare[/bold] runs a model with and without them, [bold]bench[/bold] measures on many prompts and "
        "[bold]report[/bold] makes a page of that, [bold]tune[/bold] searches for what fits a wish, "
        "[bold]generate[/bold] draws, [bold]zoo[/bold] shows "
        "the models that come with the library."
    ),
    epilog=(
        'Start here:  [cyan]whenwhere compare "red apple, noto style"[/cyan]\n\n'
        f"{ENVIRONMENT_VARIABLE}=1 shows where in the program an error came from."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, module in (
    ("plan", plan),
    ("generate", generate),
    ("compare", compare),
    ("bench", bench),
    ("report", report),
    ("doctor", doctor),
    ("tune", tune),
):
    app.command(name, help=flowing(module.command.__doc__), epilog=module.EXAMPLES)(module.command)
zoo.app.command("convert", help=flowing(convert.command.__doc__), epilog=convert.EXAMPLES)(convert.command)
app.add_typer(zoo.app, name="zoo")
app.add_typer(diagnose.app, name="diagnose")
app.add_typer(language.app, name="lm")


def main() -> None:
    """Run the command line."""
    app()
