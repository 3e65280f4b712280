"""Tiny networks and pipelines of every family: published classes, random weights in which every part matters."""

from typing import Any, TypeVar
from zlib import crc32

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from whenwhere.models import SkipDiTTransformer2DModel

Model = TypeVar("Model", bound=nn.Module)

WIDTH = 16  # features of every text embedding
POOLED = 16  # features of every pooled text embedding
TOKENS = 6  # tokens of every prompt
FRAMES = 3  # frames of every video
PICTURE = 32  # edge of the picture that a video starts from

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

UNET = {
    "sample_size": 16,
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
VIDEO_UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),  # 32 groups are fixed upstream
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "layers_per_block": 1,
    "num_attention_heads": (2, 2),
    "cross_attention_dim": WIDTH,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 3 * 8,
    "num_frames": FRAMES,
}
DIT = HEADS | {"num_layers": 4, "sample_size": 8, "out_channels": 8, "norm_num_groups": 4}
PIXART = {
    "num_attention_heads": 3,  # the conditions on size need a width that three divides
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "num_layers": 4,
    "sample_size": 8,
    "out_channels": 8,
    "caption_channels": WIDTH,
    "use_additional_conditions": False,
}
SIZED = {"sample_size": 128, "use_additional_conditions": True}  # the size at which PixArt's pipelines send conditions
HUNYUAN = HEADS | {
    "hidden_size": 32,
    "in_channels": 4,
    "patch_size": 2,
    "num_layers": 6,  # blocks 0 and 1 feed blocks 5 and 4
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH,
    "pooled_projection_dim": POOLED,
    "text_len": TOKENS,
    "text_len_t5": TOKENS,
}
LATTE = HEADS | {
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "video_length": FRAMES,
    "cross_attention_dim": 32,
    "caption_channels": WIDTH,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
}
SANA = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": WIDTH,
    "sample_size": 8,
}
WAN = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 3,
}
# With a picture: its latents and their mask come behind the noise, its tokens before those of the text.
WAN_PICTURE = WAN | {"in_channels": 12, "image_dim": WIDTH, "added_kv_proj_dim": 32}
WAN_VAE = {
    "base_dim": 3,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
SD3 = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "sample_size": 8,
    "pos_embed_max_size": 16,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": POOLED,
}
SD35 = SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
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
VAE = {"block_out_channels": (4,), "norm_num_groups": 2, "force_upcast": False}  # one pixel is one latent
EIGHTFOLD_VAE = VAE | {
    "block_out_channels": (4,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": PICTURE,
    "patch_size": 16,
    "projection_dim": WIDTH,
}


# Stable Diffusion's, for everyone: a network that predicts nothing grows noise 15 times here, 158 times with DiT's.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

WITHOUT_TEXT = {"text_encoder": None, "tokenizer": None}
WITHOUT_TEXT_2 = WITHOUT_TEXT | {"text_encoder_2": None, "tokenizer_2": None}
WITHOUT_TEXT_3 = WITHOUT_TEXT_2 | {"text_encoder_3": None, "tokenizer_3": None}
WITHOUT_SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


# Networks


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


def tiny(kind: str, config: dict[str, Any]) -> nn.Module:
    return randomised(getattr(diffusers, kind)(**config))


def controlnet(config: dict[str, Any]) -> nn.Module:
    """A U-Net's ControlNet; one width keeps its image at full size, as the VAE does."""
    network = diffusers.UNet2DConditionModel(**config)
    one_width = {"conditioning_embedding_out_channels": (4,), "load_weights_from_unet": False}
    return randomised(diffusers.ControlNetModel.from_unet(network, **one_width))


def ip_adapter_unet() -> nn.Module:
    """A U-Net with an IP-Adapter of four image tokens, loaded the way a checkpoint is."""
    network = diffusers.UNet2DConditionModel(**UNET)
    crossed = [m for name, m in network.named_modules() if name.endswith("attn2")]
    keys = {
        f"{2 * i + 1}.{kind}.weight": torch.zeros(attention.inner_dim, WIDTH)
        for i, attention in enumerate(crossed)
        for kind in ("to_k_ip", "to_v_ip")
    }
    projection = {
        "proj.weight": torch.zeros(4 * WIDTH, POOLED),
        "proj.bias": torch.zeros(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    network._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}], low_cpu_mem_usage=False)
    return randomised(network)


def image_encoder() -> nn.Module:
    return randomised(CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP)))


# Pipelines


def _pipeline(kind: str, **components: Any) -> DiffusionPipeline:
    components = {"vae": tiny("AutoencoderKL", VAE)} | components
    pipe = getattr(diffusers, kind)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(kind: str, **config: Any) -> SchedulerMixin:
    return getattr(diffusers, f"{kind}Scheduler")(**BETAS, **config)


def _ddim(kind: str = "DDIM") -> SchedulerMixin:
    return _scheduler(kind, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _flow() -> SchedulerMixin:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def sd(kind: str = "", config: dict[str, Any] = UNET, **components: Any) -> DiffusionPipeline:
    common = {"unet": tiny("UNet2DConditionModel", config), "scheduler": _ddim()} | WITHOUT_TEXT | WITHOUT_SAFETY
    return _pipeline(f"StableDiffusion{kind}Pipeline", **common | components)


def sd_controlnet() -> DiffusionPipeline:
    return sd("ControlNet", controlnet=controlnet(UNET))


def sd_ip_adapter() -> DiffusionPipeline:
    return sd(unet=ip_adapter_unet())


def sd_adapter() -> DiffusionPipeline:
    config = {"in_channels": 3, "channels": UNET["block_out_channels"], "num_res_blocks": 1, "downscale_factor": 1}
    return sd("Adapter", adapter=tiny("T2IAdapter", config | {"adapter_type": "full_adapter"}))


def lcm() -> DiffusionPipeline:
    network = tiny("UNet2DConditionModel", UNET | {"time_cond_proj_dim": 8})
    components = WITHOUT_TEXT | WITHOUT_SAFETY
    return _pipeline("LatentConsistencyModelPipeline", unet=network, scheduler=_ddim("LCM"), **components)


def sdxl(kind: str = "", **components: Any) -> DiffusionPipeline:
    components |= {"unet": tiny("UNet2DConditionModel", XL_UNET), "scheduler": _scheduler("EulerDiscrete")}
    return _pipeline(f"StableDiffusionXL{kind}Pipeline", **WITHOUT_TEXT_2, **components)


def sdxl_controlnet() -> DiffusionPipeline:
    return sdxl("ControlNet", controlnet=controlnet(XL_UNET))


def svd() -> DiffusionPipeline:
    config = {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True}
    return _pipeline(
        "StableVideoDiffusionPipeline",
        unet=tiny("UNetSpatioTemporalConditionModel", VIDEO_UNET),
        vae=tiny("AutoencoderKLTemporalDecoder", {"block_out_channels": (32,)}),
        image_encoder=image_encoder(),
        feature_extractor=CLIPImageProcessor(),
        scheduler=_scheduler("EulerDiscrete", sigma_min=0.002, sigma_max=700.0, **config),
    )


def pixart(kind: str, **changes: Any) -> DiffusionPipeline:
    network = tiny("PixArtTransformer2DModel", PIXART | changes)
    scheduler = _scheduler("DPMSolverMultistep")
    return _pipeline(f"PixArt{kind}Pipeline", transformer=network, scheduler=scheduler, **WITHOUT_TEXT)


def dit() -> DiffusionPipeline:
    return _pipeline("DiTPipeline", transformer=tiny("DiTTransformer2DModel", DIT), scheduler=_ddim())


def skip_dit() -> DiffusionPipeline:
    """Our DiT with long skips: blocks 0, 1 and 2 feed blocks 5, 4 and 3."""
    network = randomised(SkipDiTTransformer2DModel(**DIT | {"num_layers": 6}))
    return _pipeline("DiTPipeline", transformer=network, scheduler=_ddim())


def hunyuan_dit() -> DiffusionPipeline:
    return _pipeline(
        "HunyuanDiTPipeline",
        transformer=tiny("HunyuanDiT2DModel", HUNYUAN),
        vae=tiny("AutoencoderKL", EIGHTFOLD_VAE),  # the pipeline divides by eight whatever the VAE does
        scheduler=_scheduler("DDPM", prediction_type="v_prediction", clip_sample=False),
        **WITHOUT_TEXT_2,
        **WITHOUT_SAFETY,
    )


def latte() -> DiffusionPipeline:
    network = tiny("LatteTransformer3DModel", LATTE)
    return _pipeline("LattePipeline", transformer=network, scheduler=_ddim(), **WITHOUT_TEXT)


def sana() -> DiffusionPipeline:
    """Without a VAE, one latent is 32 pixels."""
    network = tiny("SanaTransformer2DModel", SANA)
    return _pipeline("SanaPipeline", transformer=network, scheduler=_flow(), vae=None, **WITHOUT_TEXT)


def wan() -> DiffusionPipeline:
    """Without a VAE, one latent is 8 pixels and 4 frames."""
    network = tiny("WanTransformer3DModel", WAN)
    return _pipeline("WanPipeline", transformer=network, scheduler=_flow(), vae=None, **WITHOUT_TEXT)


def wan_with_two() -> DiffusionPipeline:
    """Of two networks the second has the timesteps below 700."""
    pipe = wan()
    second = tiny("WanTransformer3DModel", WAN)
    for parameter in second.parameters():
        parameter.data.mul_(1.1)
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.7)
    return pipe


def wan_with_picture() -> DiffusionPipeline:
    """The image encoder's tokens are drawn: any picture gives the same."""
    pipe = _pipeline(
        "WanImageToVideoPipeline",
        transformer=tiny("WanTransformer3DModel", WAN_PICTURE),
        scheduler=_flow(),
        vae=tiny("AutoencoderKLWan", WAN_VAE),
        image_encoder=None,
        image_processor=None,
        **WITHOUT_TEXT,
    )
    tokens = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    pipe.encode_image = lambda image, device: tokens  # noqa: ARG005
    return pipe


def sana_sprint() -> DiffusionPipeline:
    """A few-step student of Sana's: guidance is embedded, and there is no negative text."""
    network = tiny("SanaTransformer2DModel", SANA | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"})
    scheduler = diffusers.SCMScheduler()
    return _pipeline("SanaSprintPipeline", transformer=network, scheduler=scheduler, vae=None, **WITHOUT_TEXT)


def sd3(config: dict[str, Any]) -> DiffusionPipeline:
    network = tiny("SD3Transformer2DModel", config)
    return _pipeline("StableDiffusion3Pipeline", transformer=network, scheduler=_flow(), **WITHOUT_TEXT_3)


def flux() -> DiffusionPipeline:
    network = tiny("FluxTransformer2DModel", FLUX)
    return _pipeline("FluxPipeline", transformer=network, scheduler=_flow(), **WITHOUT_TEXT_2)
