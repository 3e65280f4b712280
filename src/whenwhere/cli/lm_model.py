"""What the commands on language models share: opening a directory, reading a method, a knob and texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..expression import parse_one
from .quiet import quieten

if TYPE_CHECKING:
    from torch import Tensor

    from ..lm import Knob

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A directory of a Llama, Qwen2, Qwen3 or Mistral, dense or routed.", show_default=False
    ),
]
Directory = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory of a Llama, Qwen2, Qwen3 or Mistral, dense or routed.")
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        "-M",
        help='For a dense model: "mod(capacity=0.3)", "sdt", "stt", as in Python; its new routers know nothing.',
        show_default=False,
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help="Who selects: topk (best of the whole text, not causal), router, student, all or none.",
        show_default="a threshold, as in decoding",
    ),
]
Capacity = Annotated[
    float | None, typer.Option(help="Share of tokens in routed layers, in (0, 1].", show_default="as trained")
]
Threshold = Annotated[float | None, typer.Option(help="Of scores, in place of a capacity.", show_default=False)]
Speed = Annotated[
    float | None, typer.Option(help="From 0, dense, to 1, no routed layer at all.", show_default="as trained")
]
Seed = Annotated[int, typer.Option(min=0, help="Of new routers, and of sampling.")]


def open_language(directory: str, method: str = "", seed: int = 0, device: str = "auto") -> tuple[Any, Any]:
    """The model in evaluation mode and its tokenizer.

    Args:
        directory: written by `save_pretrained`, with a tokenizer.
        method: of `whenwhere.lm`, to route a dense model.
        seed: of the new routers.
        device: where the model goes.

    Raises:
        ValueError: there is no such directory, the method cannot be read, or it does not fit.
    """
    routing = _read(method) if method.strip() else None
    if not directory or not (Path(directory) / "config.json").is_file():
        raise ValueError(
            f"no model in {directory or '(nothing given)'}: a directory with config.json is needed. "
            "`whenwhere lm fetch smollm2 -o DIR` makes one."
        )
    quieten()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .. import lm

    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if routing is not None:
        if hasattr(model, "routing"):
            raise ValueError(f"{directory} is routed by {type(model.routing).__name__} already; leave --method out.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = lm.route(model, routing)
    return model.to(where).eval(), tokenizer


def _read(method: str) -> Any:
    from ..lm import SDT, STT, MoD

    return parse_one(method, {"MoD": MoD, "SDT": SDT, "STT": STT})


def read_knob(
    model: Any,
    policy: str | None = None,
    capacity: float | None = None,
    threshold: float | None = None,
    speed: float | None = None,
) -> "Knob | None":
    """What the options say, or `None` where they say nothing.

    Raises:
        ValueError: the model is dense, or the options contradict each other.
    """
    from ..lm.call import knob

    asked = {"policy": policy, "capacity": capacity, "threshold": threshold, "speed": speed}
    given = [name for name, value in asked.items() if value is not None]
    if not given:
        return None
    if not hasattr(model, "routing"):
        raise ValueError(f"--{given[0]} needs a routed model, and this one is dense; add --method mod, sdt or stt.")
    return knob(policy, capacity, threshold, speed)  # type: ignore[arg-type]


def read_tokens(file: Path, tokenizer: Any, most: int) -> "Tensor":
    """The first tokens of a text file, (N,).

    Raises:
        ValueError: there is no such file, or nothing in it.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file; give a text in UTF-8.")
    text = file.read_text(encoding="utf-8")[: 16 * most]
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][:most]
    if len(ids) < 2:
        raise ValueError(f"{file} has {len(ids)} tokens; at least 2 are needed.")
    return ids
