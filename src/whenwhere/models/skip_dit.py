"""Skip-DiT: a class-conditional DiT with long skips (Chen et al., 2024, https://arxiv.org/abs/2411.17616).

A `DiTTransformer2DModel` whose later blocks are `SkipBlock`s. diffusers' own forward runs, unchanged and not copied:
its loop hands one dictionary, `cross_attention_kwargs`, to every block, and in it the skips of this call travel. A
pre-hook in front of every block notes what enters it, which is what the block before put out, and gives a block of the
second half its skip. Nothing is stored on a module; a recomputation under gradient checkpointing finds the same
dictionary; and if something else stands in for a block (a cache), the skip is what the loop really received.
"""
# ruff: noqa: ARG002 - arguments of the constructor are read from the configuration

from functools import partial
from typing import Any, Self

from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - pipelines look for it beside the class they load
from torch import Tensor, nn

from ..layout import argument_reader
from .fusion import Fusion, SkipBlock, copy_into, count_pairs

_RIDER = "long_skips"  # the key under which the skips travel


class SkipDiTTransformer2DModel(DiTTransformer2DModel):  # type: ignore[misc]
    """DiT with long skips; runs in `DiTPipeline` as it is.

    The arguments are those of `DiTTransformer2DModel`, and

    Args:
        num_layers: L, even.
        skip_pairs: how many of the outermost pairs (i, L-1-i) are joined, 1 to L / 2; all if `None`.
        fusion: "replace", the paper's, or "residual_zero", see `whenwhere.models.fusion`.
        frequency_shift: the timestep's frequencies are 10000^(-i / (128 - shift)), i = 0 ... 127. diffusers' DiT has 1,
            the original DiT, and so the published Skip-DiT, 0.

    Raises:
        ValueError: L is odd, or an argument out of range.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        skip_pairs: int | None = None,
        fusion: Fusion = "replace",
        frequency_shift: float = 1.0,
    ) -> None:
        pairs = count_pairs(num_layers, skip_pairs)
        given = dict(self.config)
        own = ("skip_pairs", "fusion", "frequency_shift")
        # Upstream builds the blocks without skips; its constructor writes their number into the configuration.
        super().__init__(**{k: v for k, v in given.items() if k not in own} | {"num_layers": num_layers - pairs})
        self.register_to_config(num_layers=num_layers)
        self.transformer_blocks.extend(SkipBlock(fusion, **_block_config(self)) for _ in range(pairs))
        for i, block in enumerate(self.transformer_blocks):
            block.norm1.emb.time_proj.downscale_freq_shift = frequency_shift
            block.register_forward_pre_hook(partial(_hand_over, i, num_layers - 1 - i, pairs), with_kwargs=True)

    @classmethod
    def from_dit(
        cls, model: DiTTransformer2DModel, skip_pairs: int | None = None, fusion: Fusion = "residual_zero"
    ) -> Self:
        """A copy of a DiT with long skips added; with `residual_zero` it computes the same, bit for bit.

        Raises:
            ValueError: the model has an odd number of layers, or long skips already.
        """
        if isinstance(model, SkipDiTTransformer2DModel):
            raise ValueError("the model has long skips already; from_dit converts a DiTTransformer2DModel without.")
        settings = {key: value for key, value in model.config.items() if not key.startswith("_")}
        converted: Self = cls(**settings, skip_pairs=skip_pairs, fusion=fusion)
        copy_into(converted, model)
        return converted

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicted noise and variance (B, out_channels, H, W) of noisy latents (B, C, H, W); t and labels are (B,)."""
        rider = {**(cross_attention_kwargs or {}), _RIDER: {}}
        return super().forward(hidden_states, timestep, class_labels, rider, return_dict)


def _block_config(model: DiTTransformer2DModel) -> dict[str, Any]:
    """The arguments with which upstream builds a block."""
    same = ["num_attention_heads", "attention_head_dim", "dropout", "activation_fn", "num_embeds_ada_norm"]
    same += ["attention_bias", "upcast_attention", "norm_type", "norm_elementwise_affine", "norm_eps"]
    return {"dim": model.inner_dim} | {key: model.config[key] for key in same}


_named = argument_reader(BasicTransformerBlock.forward)


def _hand_over(
    i: int, partner: int, pairs: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """In front of block i: note the output of block i-1 if it is a skip, and hand block i its partner's, if it has one.

    A checkpointed block is called with positional arguments, another with names; the tokens come first either way.
    """
    named = _named(args, kwargs)
    riders = dict(named.pop("cross_attention_kwargs"))
    skips: dict[int, Tensor] = riders.pop(_RIDER)
    tokens = named.pop("hidden_states")
    if 0 < i <= pairs:
        skips[i - 1] = tokens
    if partner < pairs:
        named["skip"] = skips[partner]
    return (tokens,), named | {"cross_attention_kwargs": riders or None}
