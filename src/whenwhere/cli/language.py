"""`whenwhere lm`: the commands on language models, put together."""

import typer

from . import lm_calibrate, lm_eval, lm_fetch, lm_generate, lm_trace, lm_train
from .examples import flowing

app = typer.Typer(
    help="Language models with routed layers: Mixture-of-Depths, Subjective Depth, Subjective Timescale.",
    no_args_is_help=True,
)
for name, module in (
    ("trace", lm_trace),
    ("generate", lm_generate),
    ("train", lm_train),
    ("eval", lm_eval),
    ("calibrate", lm_calibrate),
    ("fetch", lm_fetch),
):
    app.command(name, help=flowing(module.command.__doc__), epilog=module.EXAMPLES)(module.command)
