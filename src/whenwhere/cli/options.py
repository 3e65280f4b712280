"""Options that several commands share."""

from typing import Annotated

import typer

Prompts = Annotated[
    list[str],
    typer.Argument(
        metavar="PROMPT", help="What to draw; several prompts in quotes. Class numbers for DiT.", show_default=False
    ),
]
ModelName = Annotated[
    str, typer.Option("--model", "-m", help="A name of the zoo, or a directory written by pipe.save_pretrained().")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Inference steps.", show_default="the model's")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 is none.", show_default="the model's")]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="ddim, ddpm, dpm, dpm++, euler, euler-a, heun, lcm, pndm, unipc, or the name of a class in diffusers.",
        show_default="the model's",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="The first seed; further pictures count up from it.")]
Negative = Annotated[
    str,
    typer.Option(help="What not to draw: for the guidance, and for nag, nasa and vsf.", show_default=False),
]
Size = Annotated[
    str | None, typer.Option(metavar="WxH", help="Size of the pictures, such as 512x512.", show_default="the model's")
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        "-M",
        help='Methods as in Python: "tgate(gate_step=10)+deepcache(interval=3)".',
        show_default="plain",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes an accelerator where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto is float16 on an accelerator.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]


def read_size(text: str | None) -> tuple[int, int] | None:
    """Height and width from "WIDTHxHEIGHT".

    Raises:
        ValueError: the text is no such size.
    """
    if text is None:
        return None
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise ValueError(f"a size is written as width x height, for example 512x512; got {text!r}.")
    return int(height), int(width)
