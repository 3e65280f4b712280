"""`whenwhere lm train`: go on training a model on a text, above all the routers of a converted one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import lm_model, options
from .examples import examples
from .failing import clearly
from .output import check_folder, print_json, seconds

if TYPE_CHECKING:
    from torch import Tensor

_CALIBRATION = 16_384  # tokens

EXAMPLES = examples(
    'lm train ./smollm2 --method "sdt(surprise=relative, always_run=first)" --routers --text novel.txt --budget 600 '
    "--out ./run",
    "lm train ./run/model --text novel.txt --budget 3600 --rate 1e-5 --out ./further",
)

File = Annotated[Path, typer.Option("--text", "-t", help="A text in UTF-8 to learn from.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="A directory for the run; the model is in its folder model.")]
Budget = Annotated[float, typer.Option(min=0.001, help="Seconds of training, over all resumed runs.")]
Steps = Annotated[int | None, typer.Option(min=1, help="At most so many steps.", show_default=False)]
Routers = Annotated[bool, typer.Option("--routers", help="Train the routers alone; the language model stays.")]
Rate = Annotated[float, typer.Option(help="Largest rate of learning of the language model.")]
RouterRate = Annotated[float, typer.Option(help="Largest rate of learning of the routers' networks.")]
Batch = Annotated[int, typer.Option(min=1, help="Windows in a step.")]
Context = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]
Most = Annotated[int, typer.Option(min=2, help="At most so many tokens of the text.")]
Bfloat16 = Annotated[bool, typer.Option("--bfloat16", help="Autocast; weights stay in float32.")]


@clearly
def command(
    model: lm_model.Directory,
    text: File,
    out: Out,
    budget: Budget,
    method: lm_model.Method = "",
    steps: Steps = None,
    routers: Routers = False,
    rate: Rate = 1e-5,
    router_rate: RouterRate = 1e-3,
    batch: Batch = 4,
    context: Context = 256,
    tokens: Most = 2_000_000,
    bfloat16: Bfloat16 = False,
    seed: lm_model.Seed = 0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Train a model on a text, calibrate its routers, and save it.

    The same line goes on with an interrupted run. A pretrained model is best converted with its routers first, by
    --method and --routers, and trained as a whole after that.
    """
    check_folder(out)
    opened, tokenizer = lm_model.open_language(model, method, seed, device)
    routed = hasattr(opened, "routing")
    if routers and not routed:
        raise ValueError(f"{model} is dense, and has no routers; add --method mod, sdt or stt.")
    ids = lm_model.read_tokens(text, tokenizer, tokens)
    import math

    from ..train.language import LanguageConfig, learn_language

    if routers:
        _freeze(opened)
    config = LanguageConfig(
        budget=budget,
        steps=steps or math.inf,
        batch_size=batch,
        context=context,
        learning_rate=rate,
        network_rate=router_rate,
        bfloat16=bfloat16,
        seed=seed,
    )
    state = learn_language(opened, ids, config, out, tell=lambda line: typer.echo(line, err=True))
    if routed:
        _calibrate(opened, ids, context)
    opened.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    if as_json:
        print_json({"out": str(out / "model"), "steps": state.step, "tokens": state.tokens, "seconds": state.seconds})
        return
    typer.echo(out / "model")
    typer.echo(f"{state.step} steps, {state.tokens} tokens in {seconds(state.seconds)} s", err=True)


def _freeze(model: Any) -> None:
    """Leave the language model as it is: only what the routers brought along learns."""
    from .. import lm

    for group in lm.parameter_groups(model):
        if group["name"].startswith("base"):
            for parameter in group["params"]:
                parameter.requires_grad_(False)


def _calibrate(model: Any, ids: "Tensor", context: int) -> None:
    """Measure quantiles on the beginning of the text."""
    import torch

    from .. import lm

    most = min(_CALIBRATION, len(ids)) // context * context
    lm.calibrate(model, torch.split(ids[:most].view(-1, context), 4))
