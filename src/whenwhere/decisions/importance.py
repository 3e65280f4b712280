"""How important a token is: pure functions of what attention projects. They never hold a whole attention map."""

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 2**24  # numbers of the attention map that exist at a time


def normalised(scores: Tensor) -> Tensor:
    """Every row divided by its length: (B, N)."""
    return torch.nn.functional.normalize(scores, dim=1)


def received(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """How much every token is attended to: the column sums of the attention map, its heads averaged.

    Args:
        query, key: (B, N, D), heads side by side.
        heads: H.

    Returns:
        (B, N) in float32; a row sums up to N.
    """
    rows = (part.sum(1) for part in _maps(query, key, heads, None))
    return torch.stack(list(rows)).sum(0)


def entropy(query: Tensor, key: Tensor, heads: int, mask: Tensor | None, branches: int) -> Tensor:
    """How evenly every token attends to the text: the entropy of its row of the map, averaged over heads and branches.

    Args:
        query: (B, N, D), heads side by side, branch by branch.
        key: (B, T, D).
        heads: H.
        mask: added to the logits, (B, 1, T); `None` for none.
        branches: guidance branches among the rows.

    Returns:
        (B, N) in float32, alike for all branches of a sample.
    """
    parts = []
    for part in _maps(query, key, heads, mask):
        mean = part.reshape(branches, -1, *part.shape[1:]).mean(0)
        parts.append(-(mean * (mean + 1e-7).log()).sum(-1))  # 1e-7 as in the authors' description
    return torch.cat(parts, 1).repeat(branches, 1)


def _maps(query: Tensor, key: Tensor, heads: int, mask: Tensor | None) -> Iterator[Tensor]:
    """The attention map, its heads averaged, in blocks of queries: (B, n, T) each, in float32."""
    rows, tokens, _ = query.shape
    queries, keys = (_apart(part, heads) for part in (query, key))  # (B * H, N, d)
    block = max(1, _BLOCK // (len(queries) * keys.shape[1]))
    for start in range(0, tokens, block):
        logits = torch.bmm(queries[:, start : start + block], keys.transpose(1, 2)).float()
        logits = logits.reshape(rows, heads, *logits.shape[1:]) * queries.shape[2] ** -0.5
        yield (logits if mask is None else logits + mask[:, None]).softmax(-1).mean(1)


def _apart(features: Tensor, heads: int) -> Tensor:
    """Heads as rows: (B, N, H * d) -> (B * H, N, d)."""
    return features.reshape(*features.shape[:2], heads, -1).transpose(1, 2).flatten(0, 1)
