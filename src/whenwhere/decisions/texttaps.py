"""Taps for text in joint attention: they note its keys and values, put kept ones in their place, or leave it out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..decision import Call
from ..taps import Forward, Tap, projections

# Of a block that has weights of its own for the text, and of one that has not.
_DOUBLE, _SINGLE = ("add_k_proj", "add_v_proj", "to_added_qkv"), ("to_k", "to_v", "to_qkv")


def noted(attn: nn.Module, kept: dict[str, Tensor], notes: Mapping[str, Any]) -> dict[nn.Module, Tap]:
    """Taps that write the text's keys and values into `kept`; how many tokens are text is in the method's notes."""
    names, text = (_DOUBLE, None) if _double(attn) else (_SINGLE, notes["text"])

    def note(name: str) -> Tap:
        def tap(original: Forward) -> Forward:
            def forward(tokens: Tensor) -> Tensor:
                output: Tensor = original(tokens)
                kept.setdefault(name, output[:, :text])  # of the first run, where guidance adds another
                return output

            return forward

        return tap

    return {module: note(name) for name, module in projections(attn, *names).items()}


def frozen(attn: nn.Module, kept: dict[str, Tensor]) -> dict[nn.Module, Tap]:
    """Taps that give kept keys and values in place of the text's."""
    return _double_taps(attn, kept) if _double(attn) else _single_taps(attn, kept)


def once(call: Call) -> Tap:
    """A tap that refuses a second run of the block, for another text."""
    seen: list[int] = []

    def tap(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if seen:
                raise ValueError(
                    f"{call.method}: another method runs the blocks for a second text, whose keys are not frozen; let "
                    f"it end before step {call.step.index}."
                )
            seen.append(call.step.index)
            return original(*args, **kwargs)

        return forward

    return tap


def _double(attn: Any) -> bool:
    return getattr(attn, "added_kv_proj_dim", None) is not None


def _double_taps(attn: nn.Module, kept: dict[str, Tensor]) -> dict[nn.Module, Tap]:
    """Kept keys and values; queries and output of the text are zeros."""
    taps = {module: _given(kept[name]) for name, module in projections(attn, *_DOUBLE).items()}
    like = next(iter(kept.values()))
    queries = projections(attn, "add_q_proj") if "add_k_proj" in kept else {}
    taps |= {module: _given(torch.zeros_like(like)) for module in queries.values()}
    out = getattr(attn, "to_add_out", None)
    return taps | ({out: _zeros} if isinstance(out, nn.Module) else {})


def _single_taps(attn: nn.Module, kept: dict[str, Tensor]) -> dict[nn.Module, Tap]:
    """Kept keys and values before those of the image; queries of the text are zeros."""
    taps = {module: _before(kept[name]) for name, module in projections(attn, *_SINGLE).items()}
    queries = {} if "to_qkv" in kept else projections(attn, "to_q")
    return taps | {module: _before(torch.zeros_like(next(iter(kept.values())))) for module in queries.values()}


def _given(output: Tensor) -> Tap:
    return lambda _original: lambda _tokens: output


def _zeros(_original: Forward) -> Callable[[Tensor], Tensor]:
    return lambda tokens: tokens.new_zeros(()).expand(tokens.shape)


def _before(text: Tensor) -> Tap:
    return lambda original: lambda tokens: torch.cat([text, original(tokens[:, text.shape[1] :])], 1)
