"""Guidance inside attention written down a second time, as plainly as possible: own attention, own blocks.

`crossed` gives every cross-attention of a network a forward of its own; `sd3` and `flux` are whole networks, block by
block from the published modules. Nothing is remembered, nothing is tapped. Only tests use this.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from whenwhere.guidance import Text


@dataclass(frozen=True)
class Settings:
    """In the paper's letters: s, tau, alpha; the plain difference instead where `subtract` is given."""

    s: float = 2.5
    tau: float = 2.0
    alpha: float = 0.5
    subtract: float | None = None

    def guide(self, z: Tensor, n: Tensor) -> Tensor:
        if self.subtract is not None:
            return z - self.subtract * n
        g = self.s * z - (self.s - 1) * n
        ratio = g.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
        g = torch.where(ratio > self.tau, g * self.tau / ratio, g)
        return self.alpha * g + (1 - self.alpha) * z


def heads(x: Tensor, attn: nn.Module) -> Tensor:
    """From (B, N, D) to (B, H, N, D / H)."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """All (B, H, N, D / H); the output (B, N, D)."""
    logits = q @ k.mT / q.shape[-1] ** 0.5
    logits = logits if bias is None else logits + bias[:, None]
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def rotate(x: Tensor, embedding: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn pairs of features, (B, H, N, D / H)."""
    if embedding is None:
        return x
    cos, sin = embedding
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * cos + turned * sin


def normed(layer: nn.Module | None, x: Tensor) -> Tensor:
    return x if layer is None else layer(x)


def headed(layer: nn.Module | None, x: Tensor, attn: nn.Module) -> Tensor:
    """Normalised, each head by itself or all together, as the layer is wide."""
    if layer is not None and layer.weight is not None and len(layer.weight) == x.shape[-1]:
        return heads(layer(x), attn)
    return normed(layer, heads(x, attn))


# Cross-attention


def context(model: nn.Module, text: Text) -> tuple[Tensor, Tensor | None]:
    """What a network's attentions get of a text, and their mask."""
    bias = None if text.mask is None else (-10000.0 * (1 - text.mask.float()))[:, None]
    if "HunyuanDiT" in type(model).__name__:
        both = torch.cat([text.embeds, model.text_embedder(text.embeds_2)], 1)
        mask = torch.cat([text.mask, text.mask_2], 1)[..., None].bool()
        return both * mask + model.text_embedding_padding * ~mask, None
    if hasattr(model, "caption_projection"):
        return normed(getattr(model, "caption_norm", None), model.caption_projection(text.embeds)), bias
    if hasattr(model, "condition_embedder"):
        return model.condition_embedder.text_embedder(text.embeds), None
    return text.embeds, bias


@contextmanager
def crossed(
    model: nn.Module,
    text: Text,
    settings: Settings,
    which: int = 1,
    branches: int = 2,
    passes: int = 1,
    layers: str = "",
) -> Iterator[None]:
    """Guide branch number `which` of so many in every cross-attention whose path contains `layers`.

    Of so many passes only the first is guided.
    """
    projected, bias = context(model, text)
    modules = [
        m for path, m in model.named_modules() if path.endswith("attn2") and layers in path and m.is_cross_attention
    ]

    def replacement(attn: nn.Module) -> Any:
        calls = count()

        def forward(x: Tensor, encoder_hidden_states: Any, attention_mask: Any = None, image_rotary_emb: Any = None):
            images = encoder_hidden_states[1] if isinstance(encoder_hidden_states, tuple) else ()
            own = encoder_hidden_states[0] if images else encoder_hidden_states
            picture = None
            if getattr(attn, "add_k_proj", None) is not None:
                picture, own = own[:, :-512], own[:, -512:]
            size = len(x) // branches
            rows = slice(which * size, (which + 1) * size)
            q = rotate(headed(attn.norm_q, attn.to_q(x), attn), image_rotary_emb)

            def look_at(q: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
                k, v = headed(attn.norm_k, attn.to_k(text), attn), heads(attn.to_v(text), attn)
                return attend(q, k, v, bias)

            z = look_at(q, own, attention_mask)
            repeats = size // len(projected)
            negative = look_at(
                q[rows],
                projected.repeat_interleave(repeats, 0),
                None if bias is None else bias.repeat_interleave(repeats, 0),
            )
            if next(calls) % passes == 0:
                z[rows] = settings.guide(z[rows], negative)
            for i, image in enumerate(images):
                k, v = (layers[i](image.flatten(1, 2)) for layers in (attn.processor.to_k_ip, attn.processor.to_v_ip))
                z = z + attn.processor.scale[i] * attend(q, heads(k, attn), heads(v, attn))
            if picture is not None:
                k, v = headed(attn.norm_added_k, attn.add_k_proj(picture), attn), heads(attn.add_v_proj(picture), attn)
                z = z + attend(q, k, v)
            return attn.to_out[0](z) / getattr(attn, "rescale_output_factor", 1)

        return forward

    try:
        for module in modules:
            module.forward = replacement(module)
        yield
    finally:
        for module in modules:
            del module.forward


# Joint attention


def joint(attn: nn.Module, image: Tensor, text: Tensor, rotary: Any = None, text_first: bool = False):
    """Z of the image and Z of the text, not projected."""
    q, k, v = (heads(layer(image), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
    tq, tk, tv = (heads(layer(text), attn) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    q, k, tq, tk = (
        normed(layer, x)
        for layer, x in zip(
            (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k), (q, k, tq, tk), strict=True
        )
    )
    pairs = [(tq, q), (tk, k), (tv, v)] if text_first else [(q, tq), (k, tk), (v, tv)]
    q, k, v = (torch.cat(pair, 2) for pair in pairs)
    z = attend(rotate(q, rotary), rotate(k, rotary), v)
    n = text.shape[1] if text_first else image.shape[1]
    return (z[:, n:], z[:, :n]) if text_first else (z[:, :n], z[:, n:])


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def update(block: nn.Module, which: str, x: Tensor, z: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
    """Residual of the attention's output and of the MLP, for the image ("") or a text ("_context")."""
    gate, shift, scale, mlp_gate = gates
    x = x + gate[:, None] * z
    x_normed = getattr(block, f"norm2{which}")(x)
    return x + mlp_gate[:, None] * getattr(block, f"ff{which}")(modulated(x_normed, shift, scale))


def double_block(
    block: nn.Module,
    image: Tensor,
    texts: list[Tensor],
    times: list[Tensor],
    guide: Any,
    rotary: Any,
    text_first: bool,
):
    """Texts: the positive one of all rows, then the negative one of the conditional rows, `guide.rows`."""
    image_normed, *gates = block.norm1(image, emb=times[0])
    own = None
    if len(gates) > 4:
        *gates, second, second_gate = gates
        own = second_gate[:, None] * block.attn2(second)
    zs, new_texts = [], []
    for i, (text, time) in enumerate(zip(texts, times, strict=True)):
        rows = slice(None) if i == 0 else guide.rows
        last = getattr(block, "context_pre_only", False)
        text_normed, *text_gates = [block.norm1_context(text, time)] if last else block.norm1_context(text, emb=time)
        z, text_z = joint(block.attn, image_normed[rows], text_normed, rotary[i], text_first)
        zs.append(z)
        new = None if last else update(block, "_context", text, block.attn.to_add_out(text_z), text_gates)
        new_texts.append(text if new is None else new)
    z = zs[0].clone()
    z[guide.rows] = guide.settings.guide(zs[0][guide.rows], zs[1])
    z = block.attn.to_out[0](z)
    if own is not None:
        # the second attention is added before the MLP sees the image
        gate, *rest = gates
        image, z, gates = image + gate[:, None] * z, own, (torch.ones_like(gate), *rest)
    return update(block, "", image, z, gates), new_texts


def single_block(block: nn.Module, image: Tensor, texts: list[Tensor], times: list[Tensor], guide: Any, rotary: Any):
    """One image stream, with the positive time embedding; two texts."""
    zs, parts = [], []
    image_normed, gate = block.norm(image, emb=times[0])
    for text, time, turn in zip(texts, times, rotary, strict=True):
        text_normed, text_gate = block.norm(text, emb=time)
        x = torch.cat([text_normed, image_normed], 1)
        q, k, v = (heads(layer(x), block.attn) for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v))
        z = attend(rotate(block.attn.norm_q(q), turn), rotate(block.attn.norm_k(k), turn), v)
        text_z, image_z = z.tensor_split([text.shape[1]], 1)
        zs.append(image_z)
        parts.append(text + text_gate[:, None] * finished(block, text_z, text_normed))
    z = guide.settings.guide(*zs)
    return image + gate[:, None] * finished(block, z, image_normed), parts


def finished(block: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    return block.proj_out(torch.cat([z, block.act_mlp(block.proj_mlp(x))], 2))


@dataclass(frozen=True)
class Guided:
    rows: slice
    settings: Settings


@contextmanager
def replaced(model: nn.Module, forward: Any) -> Iterator[None]:
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def sd3(model: nn.Module, text: Text, settings: Settings, branches: int = 2) -> Any:
    """A forward of SD3 whose last branch is guided."""

    def forward(hidden_states, encoder_hidden_states, pooled_projections, timestep, **_: Any):
        rows = slice(len(hidden_states) // branches * (branches - 1), len(hidden_states))
        count = rows.stop - rows.start
        time = model.time_text_embed(timestep, pooled_projections)
        texts = [model.context_embedder(encoder_hidden_states)]
        texts.append(model.context_embedder(text.embeds).repeat_interleave(count // text.rows, 0))
        image, guide = model.pos_embed(hidden_states), Guided(rows, settings)
        for block in model.transformer_blocks:
            times = [time, time[rows]]
            image, texts = double_block(block, image, texts, times, guide, [None, None], text_first=False)
        image = model.proj_out(model.norm_out(image, time))
        height, width = (size // model.config.patch_size for size in hidden_states.shape[-2:])
        p, c = model.config.patch_size, model.out_channels
        image = image.reshape(-1, height, width, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return (image.reshape(-1, c, height * p, width * p),)

    return forward


def flux(model: nn.Module, text: Text, settings: Settings, pooled: Tensor | None) -> Any:
    """A forward of Flux in the shared mode; the negative text has its own pooled vector, or the positive one's."""

    def forward(hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, guidance=None, **_: Any):
        count = len(hidden_states)
        vectors = [pooled_projections, pooled_projections if pooled is None else pooled.expand(count, -1)]
        times = [model.time_text_embed(timestep * 1000, guidance * 1000, vector) for vector in vectors]
        texts = [model.context_embedder(encoder_hidden_states)]
        texts.append(model.context_embedder(text.embeds).repeat_interleave(count // text.rows, 0))
        rotary = [model.pos_embed(torch.cat([img_ids.new_zeros(t.shape[1], 3), img_ids])) for t in texts]
        image, guide = model.x_embedder(hidden_states), Guided(slice(0, count), settings)
        for block in model.transformer_blocks:
            image, texts = double_block(block, image, texts, times, guide, rotary, text_first=True)
        for block in model.single_transformer_blocks:
            image, texts = single_block(block, image, texts, times, guide, rotary)
        return (model.proj_out(model.norm_out(image, times[0])),)

    return forward


def flux_reference(model: nn.Module, text: Text, settings: Settings) -> Any:
    """A forward of Flux as the authors' code has it: two copies of the image in the blocks with one set of weights."""

    def forward(
        hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance=None, **_: Any
    ):
        count = len(hidden_states)
        times = [
            model.time_text_embed(timestep * 1000, guidance * 1000, vector)
            for vector in (pooled_projections, text.pooled.expand(count, -1))
        ]
        texts = [model.context_embedder(encoder_hidden_states)]
        texts.append(model.context_embedder(text.embeds).expand(count, -1, -1))
        rotary = model.pos_embed(torch.cat([txt_ids, img_ids]))
        image, guide = model.x_embedder(hidden_states), Guided(slice(0, count), settings)
        for block in model.transformer_blocks:
            image, texts = double_block(block, image, texts, times, guide, [rotary] * 2, text_first=True)
        streams = [torch.cat([t, image], 1) for t in texts]
        for block in model.single_transformer_blocks:
            streams = twin_block(block, streams, times, guide, rotary, texts[0].shape[1])
        return (model.proj_out(model.norm_out(streams[0][:, texts[0].shape[1] :], times[0])),)

    return forward


def twin_block(block: nn.Module, streams: list[Tensor], times: list[Tensor], guide: Guided, rotary: Any, text: int):
    zs, inputs, gates = [], [], []
    for x, time in zip(streams, times, strict=True):
        x_normed, gate = block.norm(x, emb=time)
        attn = block.attn
        q, k, v = (heads(layer(x_normed), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
        zs.append(attend(rotate(attn.norm_q(q), rotary), rotate(attn.norm_k(k), rotary), v))
        inputs.append(x_normed)
        gates.append(gate)
    z = guide.settings.guide(zs[0][:, text:], zs[1][:, text:])
    zs = [torch.cat([each[:, :text], z], 1) for each in zs]
    return [
        x + gate[:, None] * finished(block, each, x_normed)
        for x, gate, each, x_normed in zip(streams, gates, zs, inputs, strict=True)
    ]
