"""Plain loops over the blocks of Skip-DiT and Skip-Latte, written from the paper's rule and independent of the library.

`cached` is Skip-Cache's state: a dictionary. A full pass writes what enters unit L-k under "deep"; with `partial` the
units in between are left out and it is read.
"""

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

Kept = dict[str, Tensor]


def fuse(block: nn.Module, stream: Tensor, skip: Tensor, residual: bool) -> Tensor:
    both = torch.cat([stream, skip], dim=-1)
    normal = functional.layer_norm(both, both.shape[-1:], block.skip_norm.weight, block.skip_norm.bias, 1e-6)
    width = stream.shape[-1]
    weight = block.skip_linear.weight
    fused = normal[..., :width] @ weight[:, :width].T + normal[..., width:] @ weight[:, width:].T
    return fused + block.skip_linear.bias + (stream if residual else 0)


def skip_dit(
    model: nn.Module,
    latents: Tensor,
    t: Tensor,
    labels: Tensor,
    pairs: int,
    residual: bool = False,
    kept: Kept | None = None,
    depth: int = 0,
    partial: bool = False,
) -> Tensor:
    blocks = list(model.transformer_blocks)
    last = len(blocks) - 1
    outputs = {}
    x = model.pos_embed(latents)
    for i, block in enumerate(blocks):
        if kept is not None and i == last + 1 - depth:
            x = kept["deep"] if partial else x
            kept["deep"] = x
        if partial and depth <= i <= last - depth:
            continue
        if last - i < pairs:
            x = fuse(block, x, outputs[last - i], residual)
        x = outputs[i] = BasicTransformerBlock.forward(block, x, timestep=t, class_labels=labels)
    condition = functional.silu(model.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=x.dtype))
    shift, scale = model.proj_out_1(condition)[:, None].chunk(2, -1)
    x = model.proj_out_2(functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
    edge, grid = model.config.patch_size, int(x.shape[1] ** 0.5)
    x = x.reshape(len(x), grid, grid, edge, edge, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, grid * edge, grid * edge)


def skip_latte(
    model: nn.Module,
    video: Tensor,
    t: Tensor,
    cue: Tensor | None,
    pairs: int,
    residual: bool = False,
    temporal: bool = True,
    kept: Kept | None = None,
    depth: int = 0,
    partial: bool = False,
) -> Tensor:
    """`cue` is the text (B, T, C), the labels (B,) or nothing."""
    count, _, frames, *_ = video.shape
    x = torch.stack([model.pos_embed(video[:, :, f]) for f in range(frames)], dim=1)  # (B, F, N, D)
    places = x.shape[2]
    modulation, final, text = naive_condition(model, t, cue)
    by_frame = {"timestep": torch.stack([modulation] * frames, 1).flatten(0, 1)}
    by_place = {"timestep": torch.stack([modulation] * places, 1).flatten(0, 1)}
    if text is not None:
        by_frame["encoder_hidden_states"] = torch.stack([text] * frames, 1).flatten(0, 1)
    units = list(zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True))
    last = len(units) - 1
    outputs = {}
    for p, (space, time) in enumerate(units):
        if kept is not None and p == last + 1 - depth:
            x = kept["deep"] if partial else x
            kept["deep"] = x
        if partial and depth <= p <= last - depth:
            continue
        if last - p < pairs:
            x = fuse(space, x, outputs[last - p], residual)
        x = BasicTransformerBlock.forward(space, x.flatten(0, 1), **by_frame).unflatten(0, (count, frames))
        if temporal:
            if p == 0 and frames > 1:
                x = x + model.temp_pos_embed[0, :frames, None]
            turned = x.transpose(1, 2).flatten(0, 1)
            x = BasicTransformerBlock.forward(time, turned, **by_place).unflatten(0, (count, places)).transpose(1, 2)
        outputs[p] = x
    shift, scale = final[:, None, None].unbind(-2)  # (B, 1, 1, D)
    x = model.proj_out(functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)  # (B, F, N, p p C)
    edge, grid = model.config.patch_size, int(places**0.5)
    x = x.reshape(count, frames, grid, grid, edge, edge, -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(count, -1, frames, grid * edge, grid * edge)


def naive_condition(model: nn.Module, t: Tensor, cue: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Modulation of the blocks, shift and scale (B, 2, D), projected text."""
    condition, half = model.condition, 128
    angles = t[:, None].float() * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half) / half)
    waves = torch.cat([angles.cos(), angles.sin()], -1)

    def two_layers(layers: nn.Module, x: Tensor) -> Tensor:
        return layers.linear_2(functional.silu(layers.linear_1(x)))

    if not model.config.caption_channels:
        embedded = two_layers(condition.timestep_embedder, waves)
        if cue is not None:
            embedded = embedded + condition.class_embedder.weight[cue]
        return embedded, condition.proj_out(functional.silu(embedded)).unflatten(-1, (2, -1)), None
    embedded = two_layers(condition.adaln_single.emb.timestep_embedder, waves)
    project = condition.caption_projection
    text = project.linear_2(functional.gelu(project.linear_1(cue), approximate="tanh"))
    final = condition.scale_shift_table + embedded[:, None]
    return condition.adaln_single.linear(functional.silu(embedded)), final, text
