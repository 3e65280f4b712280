"""Tiny networks of every family: the published classes with random weights in which every part matters."""

from typing import TypeVar
from zlib import crc32

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

WIDTH = 16  # features of every text embedding
POOLED = 16  # features of every pooled text embedding
TOKENS = 6  # tokens of every prompt

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,  # upstream's misnomer: two heads
    "cross_attention_dim": WIDTH,
}
DEEP_UNET = UNET | {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
}
XL_UNET = UNET | {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
}
DIT = HEADS | {"num_layers": 4, "sample_size": 8, "out_channels": 8, "norm_num_groups": 4}
PIXART = HEADS | {
    "num_layers": 4,
    "sample_size": 8,
    "out_channels": 8,
    "cross_attention_dim": 32,
    "caption_channels": WIDTH,
    "use_additional_conditions": False,
}
FLUX = HEADS | {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 3,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": POOLED,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}
VAE = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 4}  # one pixel is one latent


def randomised(model: Model) -> Model:
    """Draw every parameter anew, and freeze: published initialisations leave gates and output projections at zero."""
    generator = torch.Generator().manual_seed(crc32(type(model).__name__.encode()))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, nn.Embedding):
                values = noise
            elif parameter.ndim > 1:
                values = noise / parameter[0].numel() ** 0.5
            else:  # a weight of one dimension belongs to a normalisation
                values = 0.1 * noise + (name == "weight")
            parameter.data.copy_(values)
    return model.eval().requires_grad_(False)


def unet(**config) -> UNet2DConditionModel:
    return randomised(UNet2DConditionModel(**config))


def dit() -> DiTTransformer2DModel:
    return randomised(DiTTransformer2DModel(**DIT))


def pixart(**changes) -> PixArtTransformer2DModel:
    return randomised(PixArtTransformer2DModel(**PIXART | changes))


def flux() -> FluxTransformer2DModel:
    return randomised(FluxTransformer2DModel(**FLUX))


def vae(**changes) -> AutoencoderKL:
    return randomised(AutoencoderKL(**VAE | changes))
