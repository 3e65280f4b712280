"""Synthetic published weights, at any size and on any device, and the networks written on those names alone."""

import math

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]


def table(width: int, positions: Tensor) -> Tensor:
    """Sines, then cosines, of positions at width / 2 frequencies."""
    angles = positions[:, None].double() * 10000.0 ** -(torch.arange(width // 2).double() / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def plane(width: int, edge: int) -> Tensor:
    """Column, then row, of every place, (1, N, D)."""
    columns, rows = torch.arange(edge).repeat(edge), torch.arange(edge).repeat_interleave(edge)
    return torch.cat([table(width // 2, columns), table(width // 2, rows)], dim=-1)[None]


def class_weights(
    width: int, blocks: int, edge: int, classes: int, frames: int = 0, skips: bool = True, device: str = "cpu"
) -> Weights:
    """DiT's names; with frames those of Latte on classes, or without any condition."""
    shapes = {"x_embedder.proj": (width, 4, 2, 2), "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for i in range(blocks):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    shapes |= {"final_layer.linear": (32, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    weights = drawn(shapes, device)
    if classes:
        weights["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, device=device)
    weights["pos_embed"] = plane(width, edge).to(device)
    if frames:
        weights["temp_embed"] = table(width, torch.arange(frames))[None].to(device)
    return weights | (long_skips(width, blocks // (4 if frames else 2), device) if skips else {})


def text_weights(width: int, units: int, text: int, skips: bool = True, device: str = "cpu") -> Weights:
    """diffusers' names, as Latte text-to-video has them."""
    shapes = {"pos_embed.proj": (width, 4, 2, 2), "proj_out": (32, width), "adaln_single.linear": (6 * width, width)}
    shapes |= {"caption_projection.linear_1": (width, text), "caption_projection.linear_2": (width, width)}
    shapes |= {f"adaln_single.emb.timestep_embedder.linear_{n}": (width, (256, width)[n - 1]) for n in (1, 2)}
    for i in range(units):
        for block in (f"transformer_blocks.{i}", f"temporal_transformer_blocks.{i}"):
            for attention in ("attn1", "attn2") if block.startswith("t") and "temporal" not in block else ("attn1",):
                for part in ("to_q", "to_k", "to_v", "to_out.0"):
                    shapes[f"{block}.{attention}.{part}"] = (width, width)
            shapes |= {f"{block}.ff.net.0.proj": (4 * width, width), f"{block}.ff.net.2": (width, 4 * width)}
    weights = drawn(shapes, device)
    for block in ("transformer_blocks", "temporal_transformer_blocks"):
        for i in range(units):
            weights[f"{block}.{i}.scale_shift_table"] = torch.randn(6, width, device=device)
    weights["scale_shift_table"] = torch.randn(2, width, device=device)
    return weights | (long_skips(width, units // 2, device) if skips else {})


def long_skips(width: int, count: int, device: str) -> Weights:
    weights = drawn({f"skip_linears.{j}.linear": (width, 2 * width) for j in range(count)}, device)
    for j in range(count):
        weights[f"skip_norms.{j}.weight"] = 1 + 0.1 * torch.randn(2 * width, device=device)
        weights[f"skip_norms.{j}.bias"] = 0.1 * torch.randn(2 * width, device=device)
    return weights


def drawn(shapes: dict[str, tuple[int, ...]], device: str) -> Weights:
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = torch.randn(shape, device=device) / math.prod(shape[1:]) ** 0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(shape[0], device=device)
    return weights


# The networks


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def condition(weights: Weights, t: Tensor, labels: Tensor | None) -> Tensor:
    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
    c = linear(weights, "t_embedder.mlp.2", functional.silu(linear(weights, "t_embedder.mlp.0", waves)))
    return c if labels is None else c + weights["y_embedder.embedding_table.weight"][labels]


def block(weights: Weights, name: str, x: Tensor, c: Tensor, heads: int) -> Tensor:
    changes = linear(weights, f"{name}.adaLN_modulation.1", functional.silu(c))[:, None].chunk(6, dim=-1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = changes
    qkv = linear(weights, f"{name}.attn.qkv", norm(x) * (1 + scale_a) + shift_a)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    x = x + gate_a * linear(weights, f"{name}.attn.proj", mixed.transpose(1, 2).flatten(2))
    hidden = functional.gelu(linear(weights, f"{name}.mlp.fc1", norm(x) * (1 + scale_m) + shift_m), approximate="tanh")
    return x + gate_m * linear(weights, f"{name}.mlp.fc2", hidden)


def fuse(weights: Weights, j: int, x: Tensor, skip: Tensor) -> Tensor:
    both = torch.cat([x, skip], dim=-1)
    scale, bias = weights[f"skip_norms.{j}.weight"], weights[f"skip_norms.{j}.bias"]
    return linear(weights, f"skip_linears.{j}.linear", functional.layer_norm(both, both.shape[-1:], scale, bias, 1e-6))


def last(weights: Weights, x: Tensor, c: Tensor) -> Tensor:
    """Pictures (B, 8, H, W) of tokens (B, N, D)."""
    shift, scale = linear(weights, "final_layer.adaLN_modulation.1", functional.silu(c))[:, None].chunk(2, dim=-1)
    patches = linear(weights, "final_layer.linear", norm(x) * (1 + scale) + shift)
    edge = math.isqrt(x.shape[1])
    grid = patches.reshape(-1, edge, edge, 2, 2, 8)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(-1, 8, 2 * edge, 2 * edge)


def embed(weights: Weights, latents: Tensor) -> Tensor:
    patches = functional.conv2d(latents, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=2)
    return patches.flatten(2).mT + weights["pos_embed"]


def skip_dit(weights: Weights, latents: Tensor, t: Tensor, labels: Tensor, blocks: int, heads: int) -> Tensor:
    x, c, half, skips = embed(weights, latents), condition(weights, t, labels), blocks // 2, {}
    for i in range(blocks):
        if i >= half and "skip_norms.0.weight" in weights:
            x = fuse(weights, i - half, x, skips[blocks - 1 - i])
        x = skips[i] = block(weights, f"blocks.{i}", x, c, heads)
    return last(weights, x, c)


def skip_latte(weights: Weights, video: Tensor, t: Tensor, labels: Tensor | None, blocks: int, heads: int) -> Tensor:
    count, _, frames, *_ = video.shape
    x, c = embed(weights, video.transpose(1, 2).flatten(0, 1)), condition(weights, t, labels)
    places, units, skips = x.shape[1], blocks // 2, {}
    by_frame, by_place = c.repeat_interleave(frames, 0), c.repeat_interleave(places, 0)
    for p in range(units):
        if p >= units // 2:
            x = fuse(weights, p - units // 2, x, skips[units - 1 - p])
        x = block(weights, f"blocks.{2 * p}", x, by_frame, heads)
        x = x.unflatten(0, (count, frames)).transpose(1, 2).flatten(0, 1)  # (B N, F, D)
        if p == 0:
            x = x + weights["temp_embed"]
        x = block(weights, f"blocks.{2 * p + 1}", x, by_place, heads)
        x = skips[p] = x.unflatten(0, (count, places)).transpose(1, 2).flatten(0, 1)
    return last(weights, x, by_frame).unflatten(0, (count, frames)).transpose(1, 2)
