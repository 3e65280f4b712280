"""Published full-size networks as data: what a plan and its cost need when there are no weights.

An architecture is a row: a class of diffusers, or of this library, its published configuration and the tensors of one
forward. `build` makes the network on the meta device, where one of any size takes about a second and no memory;
`example` makes arguments that fit it. The tests hold every row against published parameter counts and multiply-adds.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .spelling import did_you_mean

Shape = tuple[int | Literal["rows"], ...]  # "rows" stands for the rows of the batch

# As these networks are run and as the published memory tables count. No number of multiply-adds depends on it.
HALF = torch.float16


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor to be made. One whose shape lacks ``"rows"`` is shared by all rows of the batch."""

    shape: Shape
    dtype: torch.dtype = HALF

    def make(self, rows: int) -> Tensor:
        """The tensor on the meta device."""
        return torch.empty([rows if size == "rows" else size for size in self.shape], dtype=self.dtype, device="meta")


Input = Spec | tuple[Spec, ...] | Mapping[str, Spec]
Argument = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One published network at its native size.

    Attributes:
        name: what users call it.
        model: the class in the library.
        config: the arguments of the class.
        inputs: what the pipeline passes to one forward, by argument.
        guided: whether the pipeline normally runs a guidance batch.
        steps: how many the pipeline runs when nothing is said.
        source: where the configuration is published.
        library: the module that has the class.
    """

    name: str
    model: str
    config: Mapping[str, object]
    inputs: Mapping[str, Input]
    guided: bool
    steps: int
    source: str
    library: str = "diffusers"

    @property
    def rows_per_image(self) -> int:
        """Rows of the denoiser's batch for one image or one video; the frames of a video lie inside a row."""
        return 2 if self.guided else 1


def names() -> tuple[str, ...]:
    """The names of all architectures, sorted."""
    return tuple(sorted(_ARCHITECTURES))


def architecture(name: str) -> Architecture:
    """The row called `name`.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"no architecture is called {name!r}{did_you_mean(name, names())} Known: {', '.join(names())}. Models of "
            "the zoo, and any pipeline or denoiser, are planned as objects: plan(zoo.load(name), ...)."
        )
    return _ARCHITECTURES[name]


def build(name: str) -> nn.Module:
    """The network called `name` on the meta device, in half precision and evaluation mode: shapes without values."""
    row = architecture(name)
    library = importlib.import_module(row.library)  # slow to import, and not needed for the data
    with torch.device("meta"):
        model: nn.Module = getattr(library, row.model)(**row.config)
    # SVD makes its mixing factors by torch.Tensor([...]), which ignores the device above: hence device= here.
    # ModelMixin.to warns of modules to keep in float32 even when there are none: hence nn.Module's own.
    nn.Module.to(model, device="meta", dtype=HALF)
    return model.eval()


def example(name: str, rows: int) -> dict[str, Argument]:
    """Keyword arguments of one forward of the network called `name`, on the meta device, for a batch of `rows` rows."""
    if rows < 1:
        raise ValueError(f"an example needs at least one row, got rows={rows}")
    return {argument: _make(spec, rows) for argument, spec in architecture(name).inputs.items()}


def _make(spec: Input, rows: int) -> Argument:
    if isinstance(spec, Spec):
        return spec.make(rows)
    if isinstance(spec, tuple):
        return tuple(part.make(rows) for part in spec)
    return {key: part.make(rows) for key, part in spec.items()}


# The rest is data. Configurations also state what is upstream's default today, so that no new default changes a size.
# They agree with public copies of the published files, except where a comment says how else a row was settled.

_ROWS = Spec(("rows",))
_INTEGER_ROWS = Spec(("rows",), torch.int64)
_INTEGER = Spec((), torch.int64)  # U-Nets get the timestep as the scheduler has it: one number for all rows

_STABLE_DIFFUSION: Mapping[str, object] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
}

_SDXL: Mapping[str, object] = {
    **_STABLE_DIFFUSION,
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),  # heads, in spite of the name; so in all U-Nets
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

_SDXL_INPUTS: Mapping[str, Input] = {
    "sample": Spec(("rows", 4, 128, 128)),
    "timestep": _INTEGER,
    "encoder_hidden_states": Spec(("rows", 77, 2048)),
    "added_cond_kwargs": {"text_embeds": Spec(("rows", 1280)), "time_ids": Spec(("rows", 6))},
}

_DIT: Mapping[str, object] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "attention_bias": True,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
}

_SD3: Mapping[str, object] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}

_SD3_INPUTS: Mapping[str, Input] = {
    "hidden_states": Spec(("rows", 16, 128, 128)),
    "encoder_hidden_states": Spec(("rows", 333, 4096)),  # 77 tokens of CLIP, then 256 of T5
    "pooled_projections": Spec(("rows", 2048)),
    "timestep": Spec(("rows",), torch.float32),
}

_WAN: Mapping[str, object] = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}

# DiT-XL/2 with text: PixArt, and Latte with as many blocks again for time.
# PixArt's rows are settled from the conversion scripts of diffusers.
_DIT_WITH_TEXT: Mapping[str, object] = {
    **_DIT,
    "cross_attention_dim": 1152,
    "norm_type": "ada_norm_single",
    "norm_eps": 1e-6,
    "caption_channels": 4096,
}

_ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            name="sd15",
            model="UNet2DConditionModel",
            config={
                **_STABLE_DIFFUSION,
                "sample_size": 64,
                "cross_attention_dim": 768,
                "attention_head_dim": 8,
                "use_linear_projection": False,
            },
            inputs={
                "sample": Spec(("rows", 4, 64, 64)),
                "timestep": _INTEGER,
                "encoder_hidden_states": Spec(("rows", 77, 768)),
            },
            guided=True,
            steps=50,
            source="https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5: unet/config.json",
        ),
        # The 768-pixel model, as in the T-GATE tables; the 512-pixel "base" has the same network at sample_size 64.
        Architecture(
            name="sd21",
            model="UNet2DConditionModel",
            config={
                **_STABLE_DIFFUSION,
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
                "upcast_attention": True,
            },
            inputs={
                "sample": Spec(("rows", 4, 96, 96)),
                "timestep": _INTEGER,
                "encoder_hidden_states": Spec(("rows", 77, 1024)),
            },
            guided=True,
            steps=50,
            source="https://huggingface.co/stabilityai/stable-diffusion-2-1: unet/config.json",
        ),
        Architecture(
            name="sdxl",
            model="UNet2DConditionModel",
            config=_SDXL,
            inputs=_SDXL_INPUTS,
            guided=True,
            steps=50,
            source="https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0: unet/config.json",
        ),
        # "The current SDXL architecture" of https://playground.com/blog/playground-v2-5, trained and sampled otherwise.
        Architecture(
            name="playground-v2.5",
            model="UNet2DConditionModel",
            config=_SDXL,
            inputs=_SDXL_INPUTS,
            guided=True,
            steps=50,
            source="https://huggingface.co/playgroundai/playground-v2.5-1024px-aesthetic: unet/config.json",
        ),
        # The class-conditional model of the DeepCache tables; a class is a text of one token. Settled from the
        # authors' configuration (cin256-v2.yaml), since diffusers publishes no copy; one head at every level.
        Architecture(
            name="ldm-4",
            model="UNet2DConditionModel",
            config={
                "sample_size": 64,
                "in_channels": 3,
                "out_channels": 3,
                "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
                "mid_block_type": "UNetMidBlock2DCrossAttn",
                "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
                "block_out_channels": (192, 384, 576, 960),
                "layers_per_block": 2,
                "transformer_layers_per_block": 1,
                "cross_attention_dim": 512,
                "attention_head_dim": 1,
                "use_linear_projection": False,
            },
            inputs={
                "sample": Spec(("rows", 3, 64, 64)),
                "timestep": _INTEGER,
                "encoder_hidden_states": Spec(("rows", 1, 512)),
            },
            guided=True,
            steps=250,
            source="https://github.com/CompVis/latent-diffusion: configs/latent-diffusion/cin256-v2.yaml",
        ),
        # SDXL with a projection of the guidance scale, which this network takes as an argument in place of a second
        # branch. Settled without sight of the published file: the width of the projection (256) is from memory and has
        # no visible cost; four steps, as the model card advises, cost what T-GATE's table says.
        Architecture(
            name="lcm-sdxl",
            model="UNet2DConditionModel",
            config={**_SDXL, "time_cond_proj_dim": 256},
            inputs={**_SDXL_INPUTS, "timestep_cond": Spec(("rows", 256))},
            guided=False,
            steps=4,
            source="https://huggingface.co/latent-consistency/lcm-sdxl: config.json",
        ),
        Architecture(
            name="svd-xt",
            model="UNetSpatioTemporalConditionModel",
            config={
                "sample_size": 96,
                "in_channels": 8,
                "out_channels": 4,
                "down_block_types": (*("CrossAttnDownBlockSpatioTemporal",) * 3, "DownBlockSpatioTemporal"),
                "up_block_types": ("UpBlockSpatioTemporal", *("CrossAttnUpBlockSpatioTemporal",) * 3),
                "block_out_channels": (320, 640, 1280, 1280),
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 768,
                "layers_per_block": 2,
                "cross_attention_dim": 1024,
                "transformer_layers_per_block": 1,
                "num_attention_heads": (5, 10, 20, 20),
                "num_frames": 25,
            },
            inputs={
                "sample": Spec(("rows", 25, 8, 72, 128)),  # 25 frames of 576 x 1024
                "timestep": Spec((), torch.float32),
                "encoder_hidden_states": Spec(("rows", 1, 1024)),
                "added_time_ids": Spec(("rows", 3)),
            },
            guided=True,
            steps=25,
            source="https://huggingface.co/stabilityai/stable-video-diffusion-img2vid-xt: unet/config.json",
        ),
        Architecture(
            name="pixart-alpha-1024",
            model="PixArtTransformer2DModel",
            config={**_DIT_WITH_TEXT, "sample_size": 128, "use_additional_conditions": True},
            inputs={
                "hidden_states": Spec(("rows", 4, 128, 128)),
                "encoder_hidden_states": Spec(("rows", 120, 4096)),
                "timestep": _INTEGER_ROWS,
                "added_cond_kwargs": {"resolution": Spec(("rows", 2)), "aspect_ratio": Spec(("rows", 1))},
                "encoder_attention_mask": Spec(("rows", 120), torch.int64),
            },
            guided=True,
            steps=20,
            source="https://huggingface.co/PixArt-alpha/PixArt-XL-2-1024-MS: transformer/config.json",
        ),
        Architecture(
            name="pixart-sigma-1024",
            model="PixArtTransformer2DModel",
            config={
                **_DIT_WITH_TEXT,
                "sample_size": 128,
                "interpolation_scale": 2,
                "use_additional_conditions": False,
            },
            inputs={
                "hidden_states": Spec(("rows", 4, 128, 128)),
                "encoder_hidden_states": Spec(("rows", 300, 4096)),
                "timestep": _INTEGER_ROWS,
                "encoder_attention_mask": Spec(("rows", 300), torch.int64),
            },
            guided=True,
            steps=20,
            source="https://huggingface.co/PixArt-alpha/PixArt-Sigma-XL-2-1024-MS: transformer/config.json",
        ),
        # Settled from the paper and the conversion script. diffusers gives each block its own copy of the timestep and
        # label embeddings, of which the original has one: 749.8 M parameters instead of the paper's 675 M.
        *(
            Architecture(
                name=f"dit-xl-2-{pixels}",
                model="DiTTransformer2DModel",
                config={**_DIT, "sample_size": pixels // 8, "norm_type": "ada_norm_zero", "norm_eps": 1e-5},
                inputs={
                    "hidden_states": Spec(("rows", 4, pixels // 8, pixels // 8)),
                    "timestep": _INTEGER_ROWS,
                    "class_labels": _INTEGER_ROWS,
                },
                guided=True,
                steps=50,
                source=f"https://huggingface.co/facebook/DiT-XL-2-{pixels}: transformer/config.json",
            )
            for pixels in (256, 512)
        ),
        # The paper's own network; the published weights want the original's frequencies and epsilon.
        Architecture(
            name="skip-dit-xl-2-256",
            model="SkipDiTTransformer2DModel",
            config={
                **_DIT,
                "sample_size": 32,
                "norm_type": "ada_norm_zero",
                "norm_eps": 1e-6,
                "fusion": "replace",
                "frequency_shift": 0.0,
            },
            inputs={
                "hidden_states": Spec(("rows", 4, 32, 32)),
                "timestep": _INTEGER_ROWS,
                "class_labels": _INTEGER_ROWS,
            },
            guided=True,
            steps=50,
            source="https://github.com/OpenSparseLLMs/Skip-DiT",
            library="whenwhere.models",
        ),
        # Version 1.2, the one of the Skip-Cache tables. Versions 1.0 and 1.1 also read style and image size.
        Architecture(
            name="hunyuan-dit",
            model="HunyuanDiT2DModel",
            config={
                "num_attention_heads": 16,
                "attention_head_dim": 88,
                "in_channels": 4,
                "patch_size": 2,
                "activation_fn": "gelu-approximate",
                "sample_size": 128,
                "hidden_size": 1408,
                "num_layers": 40,
                "mlp_ratio": 4.3637,
                "learn_sigma": True,
                "cross_attention_dim": 1024,
                "cross_attention_dim_t5": 2048,
                "pooled_projection_dim": 1024,
                "text_len": 77,
                "text_len_t5": 256,
                "use_style_cond_and_image_meta_size": False,
            },
            inputs={
                "hidden_states": Spec(("rows", 4, 128, 128)),
                "timestep": _ROWS,
                "encoder_hidden_states": Spec(("rows", 77, 1024)),
                "text_embedding_mask": Spec(("rows", 77), torch.int64),
                "encoder_hidden_states_t5": Spec(("rows", 256, 2048)),
                "text_embedding_mask_t5": Spec(("rows", 256), torch.int64),
                "image_rotary_emb": (Spec((4096, 88), torch.float32), Spec((4096, 88), torch.float32)),  # cosine, sine
            },
            guided=True,
            steps=50,
            source="https://huggingface.co/Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers: transformer/config.json",
        ),
        # The text-to-video model at 512 pixels; diffusers has no class for the class-to-video ones (673 M). Settled
        # without sight of the published file, from the class and the paper, and confirmed by size: with the 14 skip
        # layers of Skip-DiT it has the 1.094 B parameters of those published weights. The pipeline cuts the text to the
        # longest prompt of the batch; 120 tokens are its limit, which costs 0.6 % more than the published figure.
        Architecture(
            name="latte",
            model="LatteTransformer3DModel",
            config={**_DIT_WITH_TEXT, "sample_size": 64, "video_length": 16},
            inputs={
                "hidden_states": Spec(("rows", 4, 16, 64, 64)),  # 16 frames of 512 x 512
                "timestep": _INTEGER_ROWS,
                "encoder_hidden_states": Spec(("rows", 120, 4096)),
            },
            guided=True,
            steps=50,
            source="https://huggingface.co/maxin-cn/Latte-1: transformer/config.json",
        ),
        Architecture(
            name="sd3-medium",
            model="SD3Transformer2DModel",
            config=_SD3,
            inputs=_SD3_INPUTS,
            guided=True,
            steps=28,
            source="https://huggingface.co/stabilityai/stable-diffusion-3-medium-diffusers: transformer/config.json",
        ),
        # With a second attention, over the image tokens alone, in its first thirteen blocks.
        Architecture(
            name="sd3.5-medium",
            model="SD3Transformer2DModel",
            config={
                **_SD3,
                "pos_embed_max_size": 384,
                "qk_norm": "rms_norm",
                "dual_attention_layers": tuple(range(13)),
            },
            inputs=_SD3_INPUTS,
            guided=True,
            steps=28,
            source="https://huggingface.co/stabilityai/stable-diffusion-3.5-medium: transformer/config.json",
        ),
        Architecture(
            name="sd3.5-large",
            model="SD3Transformer2DModel",
            config={
                **_SD3,
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "qk_norm": "rms_norm",
            },
            inputs=_SD3_INPUTS,
            guided=True,
            steps=28,
            source="https://huggingface.co/stabilityai/stable-diffusion-3.5-large: transformer/config.json",
        ),
        # Settled from diffusers' defaults and conversion script, which are those of this model.
        Architecture(
            name="sana-1600m-1024",
            model="SanaTransformer2DModel",
            config={
                "in_channels": 32,
                "out_channels": 32,
                "num_attention_heads": 70,
                "attention_head_dim": 32,
                "num_layers": 20,
                "num_cross_attention_heads": 20,
                "cross_attention_head_dim": 112,
                "cross_attention_dim": 2240,
                "caption_channels": 2304,
                "mlp_ratio": 2.5,
                "attention_bias": False,
                "sample_size": 32,
                "patch_size": 1,
                "norm_elementwise_affine": False,
                "norm_eps": 1e-6,
            },
            inputs={
                "hidden_states": Spec(("rows", 32, 32, 32)),
                "encoder_hidden_states": Spec(("rows", 300, 2304)),
                "encoder_attention_mask": Spec(("rows", 300), torch.int64),
                "timestep": _INTEGER_ROWS,
            },
            guided=True,
            steps=20,
            source="https://huggingface.co/Efficient-Large-Model/Sana_1600M_1024px_diffusers: transformer/config.json",
        ),
        # Videos of 81 frames at the larger of the sizes that the model card gives: 480 x 832 and 720 x 1280 pixels.
        *(
            Architecture(
                name=f"wan2.1-t2v-{size}",
                model="WanTransformer3DModel",
                config={**_WAN, "num_attention_heads": heads, "ffn_dim": width, "num_layers": layers},
                inputs={
                    "hidden_states": Spec(("rows", 16, 21, *picture)),
                    "encoder_hidden_states": Spec(("rows", 512, 4096)),
                    "timestep": _INTEGER_ROWS,
                },
                guided=True,
                steps=50,
                source=f"https://huggingface.co/Wan-AI/Wan2.1-T2V-{size.upper()}-Diffusers: transformer/config.json",
            )
            for size, heads, width, layers, picture in (
                ("1.3b", 12, 8960, 30, (60, 104)),
                ("14b", 40, 13824, 40, (90, 160)),
            )
        ),
        # Distilled: the guidance scale is an argument, and one row is one image.
        Architecture(
            name="flux1-dev",
            model="FluxTransformer2DModel",
            config={
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": (16, 56, 56),
            },
            inputs={
                "hidden_states": Spec(("rows", 4096, 64)),
                "encoder_hidden_states": Spec(("rows", 512, 4096)),
                "pooled_projections": Spec(("rows", 768)),
                "timestep": _ROWS,
                "img_ids": Spec((4096, 3)),
                "txt_ids": Spec((512, 3)),
                "guidance": Spec(("rows",), torch.float32),
            },
            guided=False,
            steps=28,
            source="https://huggingface.co/black-forest-labs/FLUX.1-dev: transformer/config.json",
        ),
    )
}
