"""`whenwhere lm generate`: go on with a text."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import lm_model, options
from .examples import examples
from .failing import clearly
from .output import print_json, seconds

if TYPE_CHECKING:
    from ..lm import Knob

EXAMPLES = examples(
    'lm generate "It is a truth universally acknowledged" --model ./routed --tokens 60',
    'lm generate "It is a truth" --model ./routed --speed 0.7 --temperature 0.8 --seed 3',
)

Prompt = Annotated[str, typer.Argument(help="How the text begins, in quotes.")]
Tokens = Annotated[int, typer.Option(min=1, help="At most so many new tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the likeliest token each time.")]


@clearly
def command(
    prompt: Prompt,
    model: lm_model.Model = "",
    method: lm_model.Method = "",
    tokens: Tokens = 50,
    temperature: Temperature = 0.0,
    policy: lm_model.Policy = None,
    capacity: lm_model.Capacity = None,
    threshold: lm_model.Threshold = None,
    speed: lm_model.Speed = None,
    seed: lm_model.Seed = 0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Let a language model go on with a text.

    A routed model has a knob: --speed, --capacity or --threshold. What came of it, the share of tokens that routed
    layers processed and the size of the cache, is said at the end.
    """
    opened, tokenizer = lm_model.open_language(model, method, seed, device)
    knob = lm_model.read_knob(opened, policy, capacity, threshold, speed)
    found = run(opened, tokenizer, prompt, tokens, temperature, seed, knob)
    if as_json:
        print_json(found)
        return
    typer.echo(found["text"])
    routed = "" if found["realised"] is None else f", {found['realised']:.1%} of tokens in routed layers"
    per_second = found["tokens"] / found["seconds"]
    typer.echo(
        f"{found['tokens']} tokens in {seconds(found['seconds'])} s, {per_second:.1f} a second{routed}", err=True
    )


def run(
    model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float, seed: int, knob: "Knob | None"
) -> dict[str, Any]:
    """The text, prompt included, with seconds, realised capacity and bytes of the cache.

    Raises:
        ValueError: the prompt has no tokens, or the knob asks for what cannot be.
    """
    import torch

    from .. import lm

    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not given.input_ids.shape[-1]:
        raise ValueError("the prompt has no tokens; write how the text shall begin.")
    shares: list[tuple[int, float]] = []
    routed = hasattr(model, "routing")

    def note(*_: Any) -> None:
        found = model.realised if routed else {}
        if found:
            width = next(iter(model.notes.values())).mask.shape[1]
            shares.append((width, sum(found.values()) / len(found)))

    if knob is not None:
        model.knob = knob
    watching = model.register_forward_hook(note)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    began = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=given.input_ids,
                attention_mask=given.attention_mask,
                max_new_tokens=tokens,
                return_dict_in_generate=True,
                **sampling,
            )
    finally:
        watching.remove()
    took = time.perf_counter() - began
    row = output.sequences[0]
    passed = sum(width for width, _ in shares)
    return {
        "text": tokenizer.decode(row, skip_special_tokens=True),
        "tokens": len(row) - given.input_ids.shape[1],
        "seconds": took,
        "realised": sum(width * share for width, share in shares) / passed if passed else None,
        "cache_bytes": sum(lm.cache_bytes(output.past_key_values).values()),
    }
