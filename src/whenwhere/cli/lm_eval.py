"""`whenwhere lm eval`: perplexity on a text at several settings of the knob."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from . import lm_model, options
from .examples import examples
from .failing import clearly
from .output import console, print_json

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = examples(
    "lm eval ./routed --text novel.txt --capacity 0.25 --capacity 0.5 --capacity 1",
    "lm eval ./routed --text novel.txt --policy topk --json",
    "lm eval ./smollm2 --text novel.txt",
)

File = Annotated[Path, typer.Option("--text", "-t", help="A text in UTF-8 that the model has not learned from.")]
Capacities = Annotated[
    list[float] | None,
    typer.Option("--capacity", help="Share of tokens in routed layers; may be given again.", show_default="as trained"),
]
Speeds = Annotated[
    list[float] | None, typer.Option("--speed", help="From 0, dense, to 1; may be given again.", show_default=False)
]
Context = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]
Most = Annotated[int, typer.Option(min=2, help="At most so many tokens of the text.")]


@clearly
def command(
    model: lm_model.Directory,
    text: File,
    method: lm_model.Method = "",
    policy: lm_model.Policy = None,
    capacity: Capacities = None,
    threshold: lm_model.Threshold = None,
    speed: Speeds = None,
    context: Context = 512,
    tokens: Most = 20_000,
    seed: lm_model.Seed = 0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Score a text: perplexity, the share of tokens that was realised, and multiply-adds next to dense.

    Every capacity and speed is a row. Tokens are selected as in decoding, by thresholds, so that the numbers are
    causal; with --policy topk they are not.
    """
    opened, tokenizer = lm_model.open_language(model, method, seed, device)
    ids = lm_model.read_tokens(text, tokenizer, tokens)
    settings: list[dict[str, float]] = [
        *({"capacity": share} for share in capacity or ()),
        *({"speed": value} for value in speed or ()),
        *([{"threshold": threshold}] if threshold is not None else []),
    ]
    rows = [_row(opened, ids, context, policy, setting) for setting in settings or [{}]]
    if as_json:
        print_json({"model": model, "text": str(text), "context": context, "rows": rows})
        return
    console().print(_table(rows))


def _row(model: Any, ids: "Tensor", context: int, policy: str | None, setting: dict[str, float]) -> dict[str, Any]:
    """The score at one setting, with the cost of what was realised."""
    from .. import lm

    found = lm.score(model, ids, context, knob=lm_model.read_knob(model, policy, **setting))
    return {
        "setting": ", ".join(f"{name} {value:g}" for name, value in setting.items()) or "as trained",
        "policy": policy or "auto",
        "perplexity": found.perplexity,
        "nats": found.nats,
        "tokens": found.tokens,
        "realised": found.realised,
        "seconds": found.seconds,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("setting", "policy", "perplexity", "realised", "tokens/s", box=box.SIMPLE_HEAD)
    for row in rows:
        rate = row["tokens"] / row["seconds"]
        table.add_row(
            row["setting"], row["policy"], f"{row['perplexity']:.2f}", f"{row['realised']:.1%}", f"{rate:.0f}"
        )
    return table
