"""Skip-Latte: the video transformer Latte with long skips between pairs of blocks.

Latte (Ma et al., 2024, https://arxiv.org/abs/2401.03048) alternates blocks over space and over time. Skip-DiT (Chen et
al., 2024, https://arxiv.org/abs/2411.17616) takes a spatial and a temporal block as one unit p of P: what unit p puts
out, frame by frame, is fused in front of the spatial block of unit P-1-p.

diffusers' Latte hands its blocks nothing in which skips could travel, and knows no class-to-video model, so the forward
here is our own; the blocks and the names of the weights of the text-to-video model are diffusers'.
"""
# ruff: noqa: ARG002 - arguments of the constructor are read from the configuration

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from diffusers import LatteTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PatchEmbed, get_1d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .fusion import Fusion, SkipBlock, copy_into, count_pairs
from .video_condition import ClassCondition, Given, TextCondition, name_in_ours, swap


class SkipLatteTransformer3DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Latte with long skips; conditioned on text it runs in `LattePipeline` as it is.

    Args:
        num_layers: P, even: pairs of a spatial and a temporal block; 14 in Latte-XL/2 on classes, 28 on text.
        caption_channels: width of the text embeddings, or `None` for the class-to-video model.
        cross_attention_dim: width of the projected text; as wide as the blocks if `None`.
        num_classes: classes of a class-to-video model; 0 for one without condition.
        video_length: the most frames.
        skip_pairs: as in `SkipDiTTransformer2DModel`, for pairs of units (p, P-1-p).
        fusion: as there.

    Raises:
        ValueError: P is odd, an argument out of range, or both text and classes.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        cross_attention_dim: int | None = None,
        attention_bias: bool = True,
        sample_size: int = 64,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int | None = None,
        num_classes: int = 0,
        video_length: int = 16,
        skip_pairs: int | None = None,
        fusion: Fusion = "replace",
    ) -> None:
        super().__init__()
        if caption_channels and num_classes:
            raise ValueError(f"either text ({caption_channels=}) or classes ({num_classes=}), not both")
        pairs, width = count_pairs(num_layers, skip_pairs), num_attention_heads * attention_head_dim
        scale = max(sample_size // 64, 1)  # as in diffusers
        self.pos_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width, interpolation_scale=scale)
        grid = torch.arange(video_length).unsqueeze(1)
        table = get_1d_sincos_pos_embed_from_grid(width, grid, output_type="pt").float()  # (F, D)
        self.register_buffer("temp_pos_embed", table.unsqueeze(0), persistent=False)
        config = _block_config(self)
        spatial = config | {"cross_attention_dim": (cross_attention_dim or width) if caption_channels else None}
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(**spatial) if p < num_layers - pairs else SkipBlock(fusion, **spatial)
            for p in range(num_layers)
        )
        self.temporal_transformer_blocks = nn.ModuleList(BasicTransformerBlock(**config) for _ in range(num_layers))
        if caption_channels:
            self.condition: nn.Module = TextCondition(width, caption_channels)
        else:
            self.condition = ClassCondition(width, num_classes)
            self._share_the_condition(fusion)
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)
        self.gradient_checkpointing = False

    def _share_the_condition(self, fusion: Fusion) -> None:
        """One embedding of timestep and class serves all blocks; their skips start from Xavier weights, zero biases."""
        for block in [*self.transformer_blocks, *self.temporal_transformer_blocks]:
            block.norm1.emb = Given()
            if isinstance(block, SkipBlock) and fusion == "replace":
                nn.init.xavier_uniform_(block.skip_linear.weight)
                nn.init.zeros_(block.skip_linear.bias)

    @classmethod
    def from_latte(
        cls, model: LatteTransformer3DModel, skip_pairs: int | None = None, fusion: Fusion = "residual_zero"
    ) -> Self:
        """A copy of a text-to-video Latte with long skips added; with `residual_zero` it computes the same.

        Raises:
            ValueError: the model has an odd number of layers, or normalisations that Latte's published weights lack.
        """
        if model.config.norm_type != "ada_norm_single":
            raise ValueError(f"norm_type must be 'ada_norm_single', as in Latte-1, not {model.config.norm_type!r}")
        dropped = ("norm_type", "num_embeds_ada_norm")
        settings = {key: value for key, value in model.config.items() if key[0] != "_" and key not in dropped}
        converted: Self = cls(**settings | {"out_channels": model.out_channels}, skip_pairs=skip_pairs, fusion=fusion)
        copy_into(converted, model, name_in_ours)
        return converted

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
        class_labels: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicted noise and variance (B, out_channels, F, H, W) of noisy latents (B, C, F, H, W).

        Args:
            timestep: (B,), or one for all rows.
            encoder_hidden_states: text embeddings (B, T, caption_channels).
            encoder_attention_mask: (B, T), 1 where there is text; all of it if `None`.
            enable_temporal_attentions: whether blocks over time run; pictures are trained without.
            class_labels: (B,); `num_classes` stands for no class.

        Raises:
            ValueError: more frames than `video_length`, or not the condition that the model was made for.
        """
        batch, _, frames, height, width = hidden_states.shape
        if frames > self.config.video_length:
            raise ValueError(f"{frames} frames; the model was made for at most {self.config.video_length}")
        tokens = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1))  # (B F, N, D)
        cue = encoder_hidden_states if self.config.caption_channels else class_labels
        modulation, final, text = self.condition(timestep.expand(batch), cue, tokens.dtype)
        by_frame = {"timestep": modulation.repeat_interleave(frames, 0)}
        by_place = {"timestep": modulation.repeat_interleave(tokens.shape[1], 0)}
        if text is not None:
            by_frame["encoder_hidden_states"] = text.repeat_interleave(frames, 0)
        if encoder_attention_mask is not None:
            bias = (1 - encoder_attention_mask.to(tokens.dtype)) * -10000  # (B, T)
            by_frame["encoder_attention_mask"] = bias.unsqueeze(1).repeat_interleave(frames, 0)
        tokens = self._units(tokens, by_frame, by_place if enable_temporal_attentions else None, batch)
        shift, scale = final.repeat_interleave(frames, 0).chunk(2, dim=1)  # (B F, 1, D)
        pixels = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)  # (B F, N, p p C)
        output = self._assemble(pixels, batch, height // self.config.patch_size, width // self.config.patch_size)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _units(
        self, tokens: Tensor, by_frame: dict[str, Tensor], by_place: dict[str, Tensor] | None, batch: int
    ) -> Tensor:
        """The pairs of blocks, on tokens (B F, N, D), with the arguments of spatial and of temporal blocks."""
        skips: list[Tensor] = []  # the last one is the first to be fused
        blocks = list(zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True))
        pairs = sum(isinstance(spatial, SkipBlock) for spatial, _ in blocks)
        for p, (spatial, temporal) in enumerate(blocks):
            skip = {"skip": skips.pop()} if isinstance(spatial, SkipBlock) else {}
            tokens = self._run(spatial, tokens, by_frame | skip)
            if by_place is not None:
                tokens = swap(tokens, batch)  # (B N, F, D)
                if p == 0 and tokens.shape[1] > 1:
                    tokens = tokens + self.temp_pos_embed[:, : tokens.shape[1]].to(tokens.dtype)
                tokens = swap(self._run(temporal, tokens, by_place), batch)
            if p < pairs:
                skips.append(tokens)
        return tokens

    def _run(self, block: nn.Module, tokens: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """A block, or its checkpointed run where gradients are wanted and memory is short."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            run: Callable[..., Tensor] = self._gradient_checkpointing_func
            return run(partial(block, **inputs), tokens)
        return block(tokens, **inputs)  # type: ignore[no-any-return]

    def _assemble(self, patches: Tensor, batch: int, rows: int, columns: int) -> Tensor:
        """Patches (B F, N, p p C) as a video (B, C, F, H, W)."""
        edge, channels = self.config.patch_size, self.config.out_channels
        grid = patches.reshape(batch, -1, rows, columns, edge, edge, channels)
        return torch.einsum("bfhwpqc->bcfhpwq", grid).reshape(batch, channels, -1, rows * edge, columns * edge)


def _block_config(model: SkipLatteTransformer3DModel) -> dict[str, Any]:
    """The arguments of every block; class-to-video blocks make their own modulation of the condition (adaLN-Zero)."""
    same = ["num_attention_heads", "attention_head_dim", "dropout", "activation_fn", "attention_bias"]
    same += ["norm_elementwise_affine", "norm_eps"]
    kind = "ada_norm_single" if model.config.caption_channels else "ada_norm_zero"
    width = model.config.num_attention_heads * model.config.attention_head_dim
    # The one class of this embedding is never embedded: see _share_the_condition.
    classes = None if model.config.caption_channels else 1
    return {"dim": width, "norm_type": kind, "num_embeds_ada_norm": classes} | {k: model.config[k] for k in same}
