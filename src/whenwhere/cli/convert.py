"""`whenwhere zoo convert`: published checkpoints as folders that `from_pretrained` reads."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options
from .examples import examples
from .failing import clearly
from .output import check_folder, print_json
from .quiet import quieten

EXAMPLES = examples(
    "zoo convert DiT-XL-2-skip.pt -o dit-xl-2-skip", "zoo convert ucf101-skip.pt -o latte-ucf101 --which ema"
)

File = Annotated[Path, typer.Argument(help="A published checkpoint of Skip-DiT, .pt or .safetensors.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it must not exist, or be empty.")]
Which = Annotated[
    Literal["ema", "model"], typer.Option(help="The moving average of the weights, or the trained weights themselves.")
]
Heads = Annotated[int, typer.Option(min=1, help="Attention heads, which the file does not tell.")]


@clearly
def command(file: File, out: Out, which: Which = "ema", heads: Heads = 16, as_json: options.AsJson = False) -> None:
    """Write a published checkpoint as safetensors.

    Only tensors are unpickled, and only the weights that are asked for are read. The folder holds a network, to be put
    into a pipeline: SkipDiTTransformer2DModel.from_pretrained(folder), or SkipLatteTransformer3DModel's.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not an empty folder; choose another.")
    check_folder(out)
    quieten()
    from ..models.checkpoints import convert

    model = convert(file, out, which=which, heads=heads)
    found = {
        "class": type(model).__name__,
        "folder": str(out),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": model.config.num_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{found['class']} with {found['parameters'] / 1e6:.2f} M weights in {found['dtype']}: {out}")
