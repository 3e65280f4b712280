"""Model families, as data. Adding a family is adding a row here, or passing one to `attach(..., anatomy=...)`.

Classes are named by string, so nothing is imported. Paths were walked against real models in the tests.
"""

from dataclasses import replace

from .anatomy import Anatomy, Part, Role, Rung
from .site import Kind, Side

_ENCODER, _MIDDLE, _DECODER = Side.ENCODER, Side.MIDDLE, Side.DECODER

# What runs before what: stages, the layers of a stage in turns, the resampler, the blocks of a layer, the parts of a
# block.
_ORDER = (
    ("conv_in",),
    ("down_blocks",),
    ("mid_block",),
    ("up_blocks",),
    ("resnets", "attentions"),
    ("downsamplers", "upsamplers"),
    ("blocks", "transformer_blocks", "temporal_transformer_blocks"),
    ("single_transformer_blocks",),
    ("proj_mlp",),
    ("attn", "attn1"),
    ("attn2",),
    ("ff", "ffn"),
    ("ff_context",),
    ("proj_out",),
)

_MODEL = Part(Kind.MODEL, "")

# Every layer and every downsampler of the encoder pushes a residual, every layer of the decoder pops one
# (DeepCache, section 3.2; residual 0 is the output of the input convolution, which is always computed).
_LADDER = (
    _MODEL,
    Part(Kind.STEM, "conv_in", _ENCODER, Rung.SAME),
    Part(Kind.STAGE, "down_blocks.*", _ENCODER),
    Part(Kind.LAYER, "down_blocks.*.resnets.*", _ENCODER, Rung.NEXT),
    Part(Kind.LAYER, "down_blocks.*.attentions.*", _ENCODER, Rung.SAME),
    Part(Kind.LAYER, "down_blocks.*.downsamplers.*", _ENCODER, Rung.NEXT),
    Part(Kind.STAGE, "mid_block", _MIDDLE, Rung.BOTTOM),
    Part(Kind.LAYER, "mid_block.attentions.*", _MIDDLE),  # off the ladder: its stage stands for it there
    Part(Kind.STAGE, "up_blocks.*", _DECODER),
    Part(Kind.LAYER, "up_blocks.*.resnets.*", _DECODER, Rung.BACK),
    Part(Kind.LAYER, "up_blocks.*.attentions.*", _DECODER, Rung.SAME),
    Part(Kind.LAYER, "up_blocks.*.upsamplers.*", _DECODER, Rung.SAME),
)


def _with_cross_attention(*lists: str) -> tuple[Part, ...]:
    """Transformer blocks of self-attention, cross-attention and MLP, under these paths."""
    return tuple(
        part
        for path in lists
        for part in (
            Part(Kind.BLOCK, f"{path}.*"),
            Part(Kind.SELF_ATTENTION, f"{path}.*.attn1"),
            Part(Kind.CROSS_ATTENTION, f"{path}.*.attn2"),
            Part(Kind.MLP, f"{path}.*.ff"),
        )
    )


UNET = Anatomy(
    model="UNet2DConditionModel",
    parts=(*_LADDER, *_with_cross_attention("**.transformer_blocks")),
    sequence=_ORDER,
    rows=(
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
    ),
)

# Stable Video Diffusion goes on with the conditional branch: its image is concatenated to the latents and really read.
SVD = Anatomy(
    model="UNetSpatioTemporalConditionModel",
    parts=(*_LADDER, *_with_cross_attention("**.transformer_blocks", "**.temporal_transformer_blocks")),
    sequence=_ORDER,
    rows=("sample", "timestep", "encoder_hidden_states", "added_time_ids"),
    survivor=Role.CONDITIONAL,
)

PIXART = Anatomy(
    model="PixArtTransformer2DModel",
    parts=(_MODEL, *_with_cross_attention("transformer_blocks")),
    sequence=_ORDER,
    rows=(
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "added_cond_kwargs",
        "attention_mask",
        "encoder_attention_mask",
    ),
)

# DiTPipeline puts the conditional half first and keeps the latents of both halves in one tensor.
DIT = Anatomy(
    model="DiTTransformer2DModel",
    parts=(
        _MODEL,
        Part(Kind.BLOCK, "transformer_blocks.*"),
        Part(Kind.SELF_ATTENTION, "transformer_blocks.*.attn1"),
        Part(Kind.MLP, "transformer_blocks.*.ff"),
    ),
    sequence=_ORDER,
    rows=("hidden_states", "timestep", "class_labels"),
    roles=(Role.CONDITIONAL, Role.UNCONDITIONAL),
    doubled=True,
)

# Block i of the first half feeds block L-1-i of the second by a long skip.
HUNYUAN = Anatomy(
    model="HunyuanDiT2DModel",
    parts=(_MODEL, *_with_cross_attention("blocks")),
    sequence=_ORDER,
    rows=(
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "text_embedding_mask",
        "encoder_hidden_states_t5",
        "text_embedding_mask_t5",
        "image_meta_size",
        "style",
        "controlnet_block_samples",
    ),
    mirrored=True,
)

# Blocks over space and over time take turns; only the first have text.
LATTE = Anatomy(
    model="LatteTransformer3DModel",
    parts=(
        _MODEL,
        *_with_cross_attention("transformer_blocks"),
        Part(Kind.BLOCK, "temporal_transformer_blocks.*"),
        Part(Kind.SELF_ATTENTION, "temporal_transformer_blocks.*.attn1"),
        Part(Kind.MLP, "temporal_transformer_blocks.*.ff"),
    ),
    sequence=_ORDER,
    rows=("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"),
)

# Self-attention is linear in the number of tokens, cross-attention is not; the MLP convolves.
SANA = Anatomy(
    model="SanaTransformer2DModel",
    parts=(_MODEL, *_with_cross_attention("transformer_blocks")),
    sequence=_ORDER,
    rows=(
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "guidance",
        "encoder_attention_mask",
        "attention_mask",
        "controlnet_block_samples",
    ),
)

# Guidance, where it is on, is a second call.
WAN = Anatomy(
    model="WanTransformer3DModel",
    parts=(
        _MODEL,
        Part(Kind.BLOCK, "blocks.*"),
        Part(Kind.SELF_ATTENTION, "blocks.*.attn1"),
        Part(Kind.CROSS_ATTENTION, "blocks.*.attn2"),
        Part(Kind.MLP, "blocks.*.ffn"),
    ),
    sequence=_ORDER,
    rows=("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image"),
    passes=(Role.CONDITIONAL, Role.UNCONDITIONAL),
)

# SD 3.5 medium adds a second attention, over the image tokens alone, to its first blocks.
SD3 = Anatomy(
    model="SD3Transformer2DModel",
    parts=(
        _MODEL,
        Part(Kind.BLOCK, "transformer_blocks.*"),
        Part(Kind.JOINT_ATTENTION, "transformer_blocks.*.attn"),
        Part(Kind.SELF_ATTENTION, "transformer_blocks.*.attn2"),
        Part(Kind.MLP, "transformer_blocks.*.ff"),
        Part(Kind.MLP, "transformer_blocks.*.ff_context", text=True),
    ),
    sequence=_ORDER,
    rows=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "block_controlnet_hidden_states"),
)

# Guidance is distilled into the network; true guidance, if asked for, is a second call.
FLUX = Anatomy(
    model="FluxTransformer2DModel",
    parts=(
        _MODEL,
        Part(Kind.BLOCK, "transformer_blocks.*"),
        Part(Kind.JOINT_ATTENTION, "transformer_blocks.*.attn"),
        Part(Kind.MLP, "transformer_blocks.*.ff"),
        Part(Kind.MLP, "transformer_blocks.*.ff_context", text=True),
        Part(Kind.BLOCK, "single_transformer_blocks.*"),
        Part(Kind.EXPANSION, "single_transformer_blocks.*.proj_mlp"),
        Part(Kind.JOINT_ATTENTION, "single_transformer_blocks.*.attn"),
        Part(Kind.PROJECTION, "single_transformer_blocks.*.proj_out"),
    ),
    sequence=_ORDER,
    rows=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"),
    passes=(Role.CONDITIONAL, Role.UNCONDITIONAL),
)

# Our networks with long skips (`whenwhere.models`): block i of the first half feeds block L-1-i of the second; in Latte
# a spatial block and the temporal one after it are the unit.
SKIP_DIT = replace(DIT, model="SkipDiTTransformer2DModel", mirrored=True)
SKIP_LATTE = replace(LATTE, model="SkipLatteTransformer3DModel", rows=(*LATTE.rows, "class_labels"), mirrored=True)

FAMILIES = (UNET, SVD, PIXART, DIT, HUNYUAN, LATTE, SANA, WAN, SD3, FLUX, SKIP_DIT, SKIP_LATTE)

# Pipelines whose guidance batch is not their family's: InstructPix2Pix stacks text with image, image, nothing
# (Brooks et al., 2022, https://arxiv.org/abs/2211.09800, section 3.2).
_TEXT_IMAGE_NOTHING = (Role.CONDITIONAL, Role.IMAGE, Role.UNCONDITIONAL)
PIPELINES = {
    "StableDiffusionInstructPix2PixPipeline": _TEXT_IMAGE_NOTHING,
    "StableDiffusionXLInstructPix2PixPipeline": _TEXT_IMAGE_NOTHING,
    "SanaSprintPipeline": (Role.CONDITIONAL,),  # which never guides, and does not say so
}
