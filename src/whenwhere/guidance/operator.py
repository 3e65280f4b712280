"""Guidance inside attention, as pure functions: what becomes of a positive and a negative attention output.

`nag` is Normalized Attention Guidance (Chen et al., 2025, https://arxiv.org/abs/2505.21179), `nasa` is Negative-Away
Steer Attention (Nguyen et al., 2024, https://arxiv.org/abs/2412.02687), `vsf` is Value Sign Flip (Guo and Du, 2025,
https://arxiv.org/abs/2508.10931). Outputs are (B, N, D): heads side by side, before the output projection.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Norm = Literal["l1", "l2"]


class Bound(NamedTuple):
    """What the norm of every token says.

    Attributes:
        ratio: R = ||G|| / ||Z+||, (B, N, 1), float32; 1 where both are zero.
        factor: c in [0, 1], (B, N, 1), float32: 1 where R <= tau, tau / R elsewhere.
    """

    ratio: Tensor
    factor: Tensor


def nag(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float, norm: Norm = "l1") -> Tensor:
    """Extrapolate, bound the norm of every token, blend (algorithm 1 of the paper).

    G = s Z+ - (s - 1) Z-;  R = ||G|| / ||Z+||;  Z = alpha G min(R, tau) / R + (1 - alpha) Z+.

    Args:
        positive: Z+, (B, N, D), the attention output of the positive text.
        negative: Z-, (B, N, D), that of the negative text for the same queries.
        scale: s = phi + 1, at least 1; 1 is off.
        tau: the most that a token's norm may grow, at least 1.
        alpha: weight of the guided output, in [0, 1].
        norm: "l1" as in the paper; "l2" as in the authors' first code for Flux, which changes what tau means.
    """
    return blend(positive, negative, bound(positive, negative, scale, tau, norm).factor, scale, alpha)


def bound(positive: Tensor, negative: Tensor, scale: float, tau: float, norm: Norm = "l1") -> Bound:
    """How much every token's norm would grow, and the factor that keeps it below tau.

    Sums are float32: in float16 the norm of one token exceeds the largest number from about 320 channels on.
    No ratio of a possibly zero norm is divided by, so that every token has a finite factor.
    """
    order = 1 if norm == "l1" else 2
    plain = positive.float()
    guided = plain * scale - negative.float() * (scale - 1)
    before = plain.norm(p=order, dim=-1, keepdim=True)
    after = guided.norm(p=order, dim=-1, keepdim=True)
    clipped = after > tau * before
    factor = torch.where(clipped, tau * before / torch.where(clipped, after, 1.0), 1.0)
    ratio = torch.where(after == before, 1.0, after / before)
    return Bound(ratio, factor)


def blend(positive: Tensor, negative: Tensor, factor: Tensor, scale: float, alpha: float) -> Tensor:
    """(1 - alpha + alpha c s) Z+ - alpha c (s - 1) Z-, in the type of Z+: the three steps of `nag` as one."""
    pull = alpha * factor
    return ((1 - alpha + pull * scale) * positive - pull * (scale - 1) * negative).to(positive.dtype)


def nasa(positive: Tensor, negative: Tensor, phi: float) -> Tensor:
    """Z = Z+ - phi Z-: no bound, and features shrink by 1 - phi even where Z- = Z+."""
    return (positive.float() - phi * negative.float()).to(positive.dtype)


def vsf(
    query: Tensor, key: Tensor, value: Tensor, negative_key: Tensor, negative_value: Tensor, scale: float, offset: float
) -> Tensor:
    """One attention over both texts, in which the values of the negative one have the other sign.

    Z = sum over positive j of p_j v_j  -  a * sum over negative j of p_j v_j, p the softmax over all tokens, the
    negative logits lowered by b.

    Args:
        query: (B, H, N, D/H).
        key, value: (B, H, T, D/H), of the positive text.
        negative_key, negative_value: the same of the negative text, whose length may differ.
        scale: a, at least 0.
        offset: b, what is taken off the negative logits.
    """
    bias = query.new_zeros(key.shape[-2] + negative_key.shape[-2])
    bias[key.shape[-2] :] = -offset
    keys, values = torch.cat([key, negative_key], -2), torch.cat([value, -scale * negative_value], -2)
    return scaled_dot_product_attention(query, keys, values, attn_mask=bias.expand(query.shape[-2], -1))
