"""The published weights of Skip-DiT: what their files look like, and what each of their names is called in our modules.

There are three networks. The image and the class-to-video one have the names of the original DiT; the blocks of the
video one alternate, even numbers over space, odd ones over time. The text-to-video one has diffusers' names. In all of
them `skip_norms.j` and `skip_linears.j.linear` belong to unit L/2 + j.
"""

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from math import isqrt
from typing import Any

from torch import Tensor

from .skip_dit import SkipDiTTransformer2DModel
from .skip_latte import SkipLatteTransformer3DModel
from .video_condition import name_in_ours

Weights = Mapping[str, Tensor]


class Layout(Enum):
    """A published network."""

    IMAGE = "class-to-image"
    CLASS_VIDEO = "class-to-video"
    TEXT_VIDEO = "text-to-video"


MODELS = {
    Layout.IMAGE: SkipDiTTransformer2DModel,
    Layout.CLASS_VIDEO: SkipLatteTransformer3DModel,
    Layout.TEXT_VIDEO: SkipLatteTransformer3DModel,
}


def recognise(weights: Weights) -> Layout:
    """Which network these weights are of.

    Raises:
        ValueError: none of the published ones.
    """
    if "temporal_transformer_blocks.0.attn1.to_q.weight" in weights:
        return Layout.TEXT_VIDEO
    if "blocks.0.attn.qkv.weight" in weights and "x_embedder.proj.weight" in weights:
        return Layout.CLASS_VIDEO if "temp_embed" in weights else Layout.IMAGE
    if any(re.fullmatch(r"blocks\.\d+\.skip_linear\.weight", key) for key in weights):
        raise ValueError("these are weights of Hunyuan-DiT, whose long skips diffusers' HunyuanDiT2DModel has itself.")
    raise ValueError(
        "these are no published Skip-DiT weights: neither DiT's names (x_embedder, blocks.0.attn.qkv) nor those of "
        f"Latte text-to-video are among {', '.join(list(weights)[:4])}, ..."
    )


def settings(weights: Weights, layout: Layout, heads: int) -> dict[str, Any]:
    """The configuration of our model, read off the shapes; the number of heads cannot be.

    Raises:
        ValueError: a weight that tells a size is missing, or the sizes contradict one another.
    """
    try:
        found = _text_settings(weights) if layout is Layout.TEXT_VIDEO else _class_settings(weights, layout)
    except (KeyError, IndexError) as error:
        raise ValueError(f"not the {layout.value} network: {error} is missing or has another shape") from error
    width = found.pop("width")
    if width % heads:
        raise ValueError(f"the width {width} is no multiple of {heads} heads")
    return found | {"num_attention_heads": heads, "attention_head_dim": width // heads, "norm_eps": 1e-6}


def _class_settings(weights: Weights, layout: Layout) -> dict[str, Any]:
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    blocks = _count(weights, r"blocks\.(\d+)\..+")
    table = weights.get("y_embedder.embedding_table.weight")
    classes = 0 if table is None else table.shape[0] - 1  # the last row stands for no class
    found = {
        "width": width,
        "in_channels": channels,
        "patch_size": patch,
        "out_channels": weights["final_layer.linear.weight"].shape[0] // patch**2,
        "sample_size": isqrt(weights["pos_embed"].shape[1]) * patch,
    }
    if layout is Layout.IMAGE:
        return found | {"num_layers": blocks, "num_embeds_ada_norm": classes, "frequency_shift": 0.0}
    if blocks % 2:
        raise ValueError(f"blocks over space and over time take turns, but there are {blocks}")
    return found | {
        "num_layers": blocks // 2,
        "num_classes": classes,
        "video_length": weights["temp_embed"].shape[1],
    }


def _text_settings(weights: Weights) -> dict[str, Any]:
    width, channels, patch, _ = weights["pos_embed.proj.weight"].shape
    return {
        "width": width,
        "in_channels": channels,
        "patch_size": patch,
        "out_channels": weights["proj_out.weight"].shape[0] // patch**2,
        "num_layers": _count(weights, r"transformer_blocks\.(\d+)\..+"),
        "caption_channels": weights["caption_projection.linear_1.weight"].shape[1],
        "cross_attention_dim": weights["transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in weights,
    }  # 64 latent pixels and 16 frames, the defaults, stand nowhere in the file


def _count(weights: Weights, pattern: str) -> int:
    """How many there are of what is numbered in these names."""
    numbers = {int(match[1]) for key in weights if (match := re.fullmatch(pattern, key))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"the numbers of {pattern.split('(')[0]!r} have gaps: {sorted(numbers)}")
    return len(numbers)


def check_skips(weights: Weights, units: int, width: int) -> int:
    """How many long skips there are: half as many as units, or none.

    Raises:
        ValueError: an odd number of units, another number of skips, or one of another width.
    """
    names: dict[str, tuple[int, ...]] = {"skip_norms.{}.weight": (2 * width,), "skip_norms.{}.bias": (2 * width,)}
    names |= {"skip_linears.{}.linear.weight": (width, 2 * width), "skip_linears.{}.linear.bias": (width,)}
    present = [key for key in weights if key.startswith(("skip_norms.", "skip_linears."))]
    if not present:
        return 0
    if units % 2:
        raise ValueError(f"long skips join units in pairs, but there are {units}")
    expected = {name.format(j): shape for j in range(units // 2) for name, shape in names.items()}
    if set(present) != set(expected):
        odd = sorted(set(present) ^ set(expected))[0]
        raise ValueError(f"{units} units need {units // 2} long skips, but {len(present) / 4:g} are there; see {odd!r}")
    for key, shape in expected.items():
        if tuple(weights[key].shape) != shape:
            raise ValueError(f"{key} has the shape {tuple(weights[key].shape)}; the width {width} asks for {shape}")
    return units // 2


# Names of the original DiT, after the block's own path.
_IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
# Names outside of the blocks. In diffusers' DiT every block has an embedding of its own: `*` is each of them.
_OUTSIDE = {
    Layout.IMAGE: {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "transformer_blocks.*.norm1.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "transformer_blocks.*.norm1.emb.timestep_embedder.linear_2",
        "y_embedder.embedding_table": "transformer_blocks.*.norm1.emb.class_embedder.embedding_table",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    },
    Layout.CLASS_VIDEO: {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "condition.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "condition.timestep_embedder.linear_2",
        "y_embedder.embedding_table": "condition.class_embedder",
        "final_layer.adaLN_modulation.1": "condition.proj_out",
        "final_layer.linear": "proj_out",
    },
}
TABLES = {"pos_embed": "pos_embed.pos_embed", "temp_embed": "temp_pos_embed"}  # of sines and cosines; we have our own


def translate(weights: Weights, layout: Layout, units: int) -> Iterator[tuple[str, Tensor]]:
    """Every weight under the name, or names, that it has in our module; a name that means nothing stays as it is."""
    for key, tensor in weights.items():
        stem, _, kind = key.rpartition(".")
        if match := re.fullmatch(r"skip_(norms|linears)\.(\d+)(?:\.linear)?", stem):
            yield f"transformer_blocks.{units // 2 + int(match[2])}.skip_{match[1][:-1]}.{kind}", tensor
        elif layout is Layout.TEXT_VIDEO:
            yield name_in_ours(key), tensor
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", stem):
            yield from _in_block(_block(int(match[1]), layout), match[2], kind, tensor)
        elif key not in TABLES:
            name = f"{_OUTSIDE[layout].get(stem, stem)}.{kind}"
            copies = units if "*" in name else 1
            for i in range(copies):  # one storage each, or they would be trained together and not be saved
                yield name.replace("*", str(i)), tensor.clone() if copies > 1 else tensor


def _block(number: int, layout: Layout) -> str:
    if layout is Layout.IMAGE:
        return f"transformer_blocks.{number}"
    return f"{'temporal_' if number % 2 else ''}transformer_blocks.{number // 2}"


def _in_block(block: str, name: str, kind: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name != "attn.qkv":
        yield f"{block}.{_IN_BLOCK.get(name, name)}.{kind}", tensor
        return
    for part, rows in zip("qkv", tensor.chunk(3), strict=True):  # the rows of queries, then keys, then values
        yield f"{block}.attn1.to_{part}.{kind}", rows.clone()
