"""Scores of tokens, read from what an attention projects while it runs; its own processor, fused or not, stays."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..decision import Call, Output
from ..site import Kind
from .importance import entropy, normalised, received


def run_and_score(call: Call, score: str) -> tuple[Output, Tensor]:
    """Run an attention; its output, and the score of every token, (B, N), every row of length 1.

    Args:
        call: of the attention.
        score: one of `PROJECTIONS`.

    Raises:
        RuntimeError: its projections cannot be read, or nobody declared the guidance branches that it averages over.
    """
    if call.site.kind is Kind.JOINT_ATTENTION:
        return _run_and_score_jointly(call, score)
    output, projected = _run_and_see(call, PROJECTIONS[score])
    return output, normalised(_SCORES[score](call, *projected))


def _run_and_score_jointly(call: Call, score: str) -> tuple[Output, Tensor]:
    """The same where text and picture share the attention: of both, the text first, as in Flux."""
    own, added = JOINT_PROJECTIONS[score]
    stream = bool(getattr(call.module, "added_kv_proj_dim", None))  # a text that still comes by itself
    output, seen = _run_and_see(call, (*added, *own) if stream else own)
    joined = (
        [torch.cat(pair, 1) for pair in zip(seen[: len(added)], seen[len(added) :], strict=True)] if stream else seen
    )
    if score != "attention":
        return output, normalised(_norm(call, joined[0]))
    rotary = call.kwargs.get("image_rotary_emb")
    query, key = (_turned(part, rotary).flatten(2) for part in joined)  # (B, N, H, d) -> (B, N, D)
    return output, normalised(received(query, key, joined[0].shape[2]))


def _turned(features: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys (B, N, H, d) with their positions (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""
    if rotary is None:
        return features
    from diffusers.models.embeddings import apply_rotary_emb

    turned: Tensor = apply_rotary_emb(features, rotary, sequence_dim=1)
    return turned


JOINT_PROJECTIONS = {  # of the picture, and of the text where it comes by itself
    "attention": (("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")),
    "key_norm": (("to_k",), ("add_k_proj",)),
    "value_norm": (("to_v",), ("add_v_proj",)),
}
PROJECTIONS = {
    "attention": ("to_q", "to_k"),
    "cross_attention": ("to_q", "to_k"),
    "key_norm": ("to_k",),
    "value_norm": ("to_v",),
}


def _run_and_see(call: Call, names: tuple[str, ...]) -> tuple[Output, list[Tensor]]:
    """Run, and see what the named layers of the module put out on the way.

    Raises:
        RuntimeError: one of them did not run, as its projections were fused into one layer.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str, _module: Any, _args: Any, output: Tensor) -> None:
        seen[name] = output

    handles = [getattr(call.module, name).register_forward_hook(partial(note, name)) for name in names]
    try:
        output = call.run()
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) < len(names):
        raise RuntimeError(
            f"{call.method}: {call.site} did not run {', '.join(names)}. Undo fuse_qkv_projections(), or take "
            "score='norm'."
        )
    return output, [seen[name] for name in names]


def _received(call: Call, query: Tensor, key: Tensor) -> Tensor:
    return received(query, key, _heads(call))


def _entropy(call: Call, query: Tensor, key: Tensor) -> Tensor:
    if call.branches is None:
        raise RuntimeError(
            f"{call.method} averages attention to the text over the guidance branches, and this pipeline does not tell "
            "before its first step whether there are any: say attach(..., guidance=True), or False."
        )
    mask = call.kwargs.get("attention_mask")
    return 1 + entropy(query, key, _heads(call), mask, len(call.branches.roles))


def _norm(_: Call, projected: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(projected.float(), dim=-1)
    return norms


def _heads(call: Call) -> int:
    if getattr(call.module, "norm_q", None) is not None:
        raise ValueError(f"{call.method}: {call.site} normalises its queries; take score='value_norm'.")
    return int(call.module.heads)  # type: ignore[union-attr, arg-type]


_SCORES: Mapping[str, Any] = {
    "attention": _received,
    "cross_attention": _entropy,
    "key_norm": _norm,
    "value_norm": _norm,
}
