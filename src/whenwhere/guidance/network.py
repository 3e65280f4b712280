"""What guidance inside attention must know of a model family, as data: a row for every denoiser it works on.

`project` is what the network does to a text before its blocks; it is done to the negative text as well, once per
generation. Published settings are from table 5 of the paper (s = phi + 1).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .text import Text

Projected = tuple[Tensor, Tensor | None]  # what attention gets: tokens (R, T, D), additive mask (R, 1, T) or none


class Published(NamedTuple):
    """Settings of a family: s, tau, alpha."""

    scale: float
    tau: float
    alpha: float


@dataclass(frozen=True, eq=False)
class Network:
    """A row of the table.

    Attributes:
        arguments: parts of a `Text`, each with the denoiser's argument that holds it for the positive text.
        outputs: parts of a `Text`, each with its place among the outputs of the pipeline's `encode_prompt`.
        project: from the denoiser and a text to what attention gets.
        projections: paths of the modules that `project` runs.
        published: settings, given the network's configuration.
        widths: names in the configuration of the number of features of a text; the first one that is set counts.
        encoders: text encoders of which `encode_prompt` is called with one at a time.
        joint: whether text and image share one attention, so that the negative text runs through the network.
        rotary: whether the text has rows in a rotary embedding.
        flow: whether timesteps are 1000 sigma, of a rectified flow.
    """

    arguments: Mapping[str, str]
    outputs: Mapping[str, int]
    project: Callable[[nn.Module, Text], Projected]
    published: Callable[[Mapping[str, Any]], Published]
    widths: tuple[str, ...]
    projections: tuple[str, ...] = ()
    encoders: int = 1
    joint: bool = False
    rotary: bool = False
    flow: bool = False

    def width(self, model: nn.Module) -> int | None:
        """Features of a text that the network takes."""
        config: Any = model.config
        for name in self.widths:
            value = config.get(name)
            if value is not None:
                return int(value if isinstance(value, int) else value[0])
        return None

    def projected_width(self, model: nn.Module) -> int:
        """Features of a text after `project`."""
        config: Any = model.config
        own: Any = getattr(model, "inner_dim", None)
        value = config.get("cross_attention_dim") or config.get("caption_projection_dim") or own
        if value is None:  # Wan has no word for it
            return int(config["num_attention_heads"] * config["attention_head_dim"])
        return int(value if isinstance(value, int) else value[0])

    def projecting(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of what `project` really runs: an IP-Adapter keeps its images' layers where Kolors has its text's."""
        return tuple(
            name
            for name in self.projections
            if name != "encoder_hid_proj" or isinstance(getattr(model, name, None), nn.Linear)
        )


def network_of(model: nn.Module) -> Network:
    """The row of a denoiser, looked up by the names of its class and of those it derives from.

    Raises:
        ValueError: there is none.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _NETWORKS:
            return _NETWORKS[cls.__name__]
    raise ValueError(
        f"guidance inside attention is not known for {type(model).__name__}; it is for {', '.join(sorted(_NETWORKS))}."
    )


def _submodule(model: nn.Module, name: str) -> Any:
    return getattr(model, name, None)


def _unet(model: nn.Module, text: Text) -> Projected:
    """Nothing, but where one linear layer adapts the text (Kolors)."""
    layer = _submodule(model, "encoder_hid_proj")
    adapts = isinstance(layer, nn.Linear)
    return (layer(text.embeds) if adapts else text.embeds), _bias(text)


def _captioned(model: nn.Module, text: Text) -> Projected:
    layer = _submodule(model, "caption_projection")
    return (text.embeds if layer is None else layer(text.embeds)), _bias(text)


def _hunyuan(model: nn.Module, text: Text) -> Projected:
    """Two texts in a row; padding is replaced by a learned vector instead of being masked."""
    if text.embeds_2 is None or text.mask is None or text.mask_2 is None:
        raise ValueError("HunyuanDiT's negative text has two encoders: embeds, mask, embeds_2 and mask_2 are needed")
    both = torch.cat([text.embeds, _submodule(model, "text_embedder")(text.embeds_2)], 1)
    real = torch.cat([text.mask, text.mask_2], -1).unsqueeze(2).bool()
    return torch.where(real, both, _submodule(model, "text_embedding_padding")), None


def _sana(model: nn.Module, text: Text) -> Projected:
    projected = _submodule(model, "caption_norm")(_submodule(model, "caption_projection")(text.embeds))
    return projected, _bias(text)


def _wan(model: nn.Module, text: Text) -> Projected:
    return _submodule(model, "condition_embedder").text_embedder(text.embeds), None


def _joint(model: nn.Module, text: Text) -> Projected:
    return _submodule(model, "context_embedder")(text.embeds), None


def _bias(text: Text) -> Tensor | None:
    """What the models make of a mask: 0 for real tokens, -10000 for padding, (R, 1, T)."""
    if text.mask is None:
        return None
    return ((1 - text.mask.to(text.embeds.dtype)) * -10000.0).unsqueeze(1)


def _of_unet(config: Mapping[str, Any]) -> Published:
    # SDXL, also measured with Playground v2.5 and few-step students, against Stable Diffusion 1.5
    xl = config.get("addition_embed_type") == "text_time"
    return Published(3.0, 2.5, 0.5 if xl else 0.375)


_EMBEDS = {"embeds": "encoder_hidden_states"}
_MASKED = _EMBEDS | {"mask": "encoder_attention_mask"}

_NETWORKS: Mapping[str, Network] = {
    "UNet2DConditionModel": Network(
        _MASKED, {"embeds": 0}, _unet, _of_unet, ("encoder_hid_dim", "cross_attention_dim"), ("encoder_hid_proj",)
    ),
    "PixArtTransformer2DModel": Network(
        _MASKED,
        {"embeds": 0, "mask": 1},
        _captioned,
        lambda _: Published(5.0, 2.5, 0.375),
        ("caption_channels",),
        ("caption_projection",),
    ),
    # Neither HunyuanDiT nor Latte is in the paper: they get what the other transformers with cross-attention have.
    "HunyuanDiT2DModel": Network(
        _EMBEDS
        | {
            "mask": "text_embedding_mask",
            "embeds_2": "encoder_hidden_states_t5",
            "mask_2": "text_embedding_mask_t5",
        },
        {"embeds": 0, "mask": 2},
        _hunyuan,
        lambda _: Published(5.0, 2.5, 0.375),
        ("cross_attention_dim",),
        ("text_embedder",),
        encoders=2,
    ),
    "LatteTransformer3DModel": Network(
        _MASKED,
        {"embeds": 0},
        _captioned,
        lambda _: Published(5.0, 2.5, 0.375),
        ("caption_channels",),
        ("caption_projection",),
    ),
    "SanaTransformer2DModel": Network(
        _MASKED,
        {"embeds": 0, "mask": 1},
        _sana,
        lambda _: Published(5.0, 2.5, 0.375),
        ("caption_channels",),
        ("caption_projection",),
        flow=True,
    ),
    "WanTransformer3DModel": Network(
        _EMBEDS,
        {"embeds": 0},
        _wan,
        lambda _: Published(5.0, 2.5, 0.25),
        ("text_dim",),
        ("condition_embedder.text_embedder",),
        flow=True,
    ),
    "SD3Transformer2DModel": Network(
        _EMBEDS,
        {"embeds": 0},
        _joint,
        lambda _: Published(5.0, 2.5, 0.125),
        ("joint_attention_dim",),
        ("context_embedder",),
        joint=True,
        flow=True,
    ),
    "FluxTransformer2DModel": Network(
        _EMBEDS | {"pooled": "pooled_projections"},
        {"embeds": 0, "pooled": 1},
        _joint,
        lambda _: Published(5.0, 2.5, 0.25),
        ("joint_attention_dim",),
        ("context_embedder",),
        joint=True,
        rotary=True,
        flow=True,
    ),
}
