"""`whenwhere lm trace`: which tokens of a text were computed where."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import lm_model, options
from .examples import examples
from .failing import clearly
from .output import check_file, console, print_json, replacing

if TYPE_CHECKING:
    from ..lm import TokenTrace

EXAMPLES = examples(
    'lm trace "It is a truth universally acknowledged" --model ./routed --png trace.png',
    'lm trace "It is a truth universally acknowledged" --model ./routed --capacity 0.3 --html trace.html',
    'lm trace "The capital of Italy is Rome." --model ./smollm2 --method sdt --policy topk --json',
)

Text = Annotated[str, typer.Argument(help="The text, in quotes.")]
Png = Annotated[Path | None, typer.Option(help="Draw the text with its table to this file.", show_default=False)]
Html = Annotated[Path | None, typer.Option(help="Write the same as a page.", show_default=False)]


@clearly
def command(
    text: Text,
    model: lm_model.Model = "",
    method: lm_model.Method = "",
    policy: lm_model.Policy = None,
    capacity: lm_model.Capacity = None,
    threshold: lm_model.Threshold = None,
    speed: lm_model.Speed = None,
    png: Png = None,
    html: Html = None,
    seed: lm_model.Seed = 0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Print which tokens of a text the routed layers of a model compute: a table of layers x tokens.

    The text stands above the table, a line at a time. Without further options tokens are selected as in decoding, by
    calibrated thresholds; --policy topk shows what training selects.
    """
    for file, suffix in ((png, ".png"), (html, ".html")):
        if file is not None:
            check_file(file, suffix)
    opened, tokenizer = lm_model.open_language(model, method, seed, device)
    from .. import lm

    found = lm.trace(opened, tokenizer, text, lm_model.read_knob(opened, policy, capacity, threshold, speed))
    _write(found, Path(model).name, png, html)
    if as_json:
        print_json(found.to_dict())
        return
    typer.echo(found.lines(console().width))
    typer.echo(f"\n{found.legend}")


def _write(found: "TokenTrace", name: str, png: Path | None, html: Path | None) -> None:
    from ..picture.words import draw_words, write_words

    title = f"{name}: {found.method}"
    if png is not None:
        with replacing(png) as temporary:
            draw_words(found, title).save(temporary)
    if html is not None:
        with replacing(html) as temporary:
            temporary.write_text(write_words(found, title), encoding="utf-8")
