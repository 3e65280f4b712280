"""`whenwhere lm calibrate`: measure which threshold selects which share of the tokens."""

from pathlib import Path
from typing import Annotated

import typer

from . import lm_model, options
from .examples import examples
from .failing import clearly
from .lm_eval import Context, Most
from .output import check_folder, print_json

EXAMPLES = examples(
    "lm calibrate ./routed --text novel.txt --out ./calibrated",
    'lm calibrate ./smollm2 --method "sdt(surprise=relative, always_run=first)" --text novel.txt --out ./routed',
)

File = Annotated[Path, typer.Option("--text", "-t", help="A text in UTF-8, of the kind the model is meant for.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="A directory for the calibrated model (made if missing).")]


@clearly
def command(
    model: lm_model.Directory,
    text: File,
    out: Out,
    method: lm_model.Method = "",
    context: Context = 512,
    tokens: Most = 20_000,
    seed: lm_model.Seed = 0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Calibrate a routed model: store quantiles of its scores, by which a capacity becomes a threshold.

    With --method a dense model is routed first; its new routers know nothing until they are trained.
    """
    check_folder(out)
    opened, tokenizer = lm_model.open_language(model, method, seed, device)
    if not hasattr(opened, "routing"):
        raise ValueError(f"{model} is dense, and has no scores to calibrate; add --method mod, sdt or stt.")
    import torch

    from .. import lm

    ids = lm_model.read_tokens(text, tokenizer, tokens)
    context = min(context, len(ids))
    windows = ids[: len(ids) // context * context].view(-1, context)
    tables = lm.calibrate(opened, torch.split(windows, 4))
    opened.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if as_json:
        medians = {str(layer): float(table[50]) for layer, table in tables.items()}
        print_json({"out": str(out), "tokens": windows.numel(), "medians": medians})
        return
    typer.echo(out)
    typer.echo(f"{len(tables)} routed layers, {windows.numel()} tokens", err=True)
