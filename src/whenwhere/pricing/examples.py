"""Arguments of one forward that fit a model's own configuration, on the meta device: what pricing a pipeline needs
before it has run. Shapes follow the pipelines' defaults (native size, full text length)."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

Config = Mapping[str, Any]


def example_of(model: nn.Module, tokenizer: object = None) -> dict[str, Any]:
    """Keyword arguments for one row of a diffusers denoiser.

    Raises:
        ValueError: no example is known for this family; run the pipeline once and read `attachment.trace` instead.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _EXAMPLES:
            config = cast(Config, model.config)
            length = min(int(getattr(tokenizer, "model_max_length", 77)), 512)
            dtype = next(model.parameters()).dtype
            inputs = _EXAMPLES[cls.__name__](config, _maker(dtype), length)
            if getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj":
                conditions = inputs.get("added_cond_kwargs", {})
                inputs["added_cond_kwargs"] = conditions | _image_prompts(model, _maker(dtype))
            return inputs
    raise ValueError(
        f"no example input is known for {type(model).__name__}; run the pipeline once inside attach(...) and read its "
        "plan there."
    )


Make = Callable[..., Tensor]


def _maker(dtype: torch.dtype) -> Make:
    return lambda *shape: torch.empty(shape, dtype=dtype, device="meta")


def _square(config: Config) -> tuple[int, int]:
    size = config.get("sample_size") or 64
    return (size, size) if isinstance(size, int) else tuple(size)


def _unet(config: Config, make: Make, length: int) -> dict[str, Any]:
    width = config["cross_attention_dim"]
    inputs: dict[str, Any] = {
        "sample": make(1, config["in_channels"], *_square(config)),
        "timestep": make(),
        "encoder_hidden_states": make(1, length, width if isinstance(width, int) else width[0]),
    }
    if config.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = make(1, config["time_cond_proj_dim"])
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": make(1, pooled), "time_ids": make(1, 6)}
    return inputs


def _image_prompts(model: nn.Module, make: Make) -> dict[str, Any]:
    """What an IP-Adapter adds: for every adapter the features of one picture, as wide as its projection takes them."""
    projections = cast(Any, model).encoder_hid_proj.image_projection_layers
    widths = [next(m.in_features for m in layer.modules() if isinstance(m, nn.Linear)) for layer in projections]
    return {"image_embeds": [make(1, 1, width) for width in widths]}


def example_of_control(control: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for one row of a ControlNet, or of several, beside a denoiser with these arguments."""
    nets = getattr(control, "nets", None)
    first = control if nets is None else nets[0]
    # Its own first convolutions bring the picture down to the size of the latents, halving it with all but the first.
    factor = 2 ** (len(cast(Config, first.config)["conditioning_embedding_out_channels"]) - 1)
    sample = inputs["sample"]
    height, width = (factor * edge for edge in sample.shape[-2:])
    picture = sample.new_empty(1, cast(Config, first.config)["conditioning_channels"], height, width)
    shared = {name: inputs[name] for name in _CONTROLLED if name in inputs}
    several = {"controlnet_cond": [picture] * len(nets), "conditioning_scale": [1.0] * len(nets)} if nets else {}
    return {**shared, "controlnet_cond": picture, "return_dict": False, **several}


_CONTROLLED = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs", "timestep_cond")


def _svd(config: Config, make: Make, _: int) -> dict[str, Any]:
    width = config["cross_attention_dim"]
    return {
        "sample": make(1, config["num_frames"], config["in_channels"], *_square(config)),
        "timestep": make(),
        "encoder_hidden_states": make(1, 1, width if isinstance(width, int) else width[0]),
        "added_time_ids": make(1, 3),
    }


def _pixart(config: Config, make: Make, length: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "hidden_states": make(1, config["in_channels"], *_square(config)),
        "encoder_hidden_states": make(1, length, config["caption_channels"]),
        "timestep": make(1),
    }
    if config.get("use_additional_conditions"):
        inputs["added_cond_kwargs"] = {"resolution": make(1, 2), "aspect_ratio": make(1, 1)}
    return inputs


def _dit(config: Config, make: Make, _: int) -> dict[str, Any]:
    return {
        "hidden_states": make(1, config["in_channels"], *_square(config)),
        "timestep": make(1),
        "class_labels": make(1).long(),
    }


def _hunyuan(config: Config, make: Make, _: int) -> dict[str, Any]:
    height, width = _square(config)
    tokens = (height // config["patch_size"]) * (width // config["patch_size"])
    rotary = make(tokens, config["attention_head_dim"]).float()
    inputs: dict[str, Any] = {
        "hidden_states": make(1, config["in_channels"], height, width),
        "timestep": make(1),
        "encoder_hidden_states": make(1, config["text_len"], config["cross_attention_dim"]),
        "text_embedding_mask": make(1, config["text_len"]).long(),
        "encoder_hidden_states_t5": make(1, config["text_len_t5"], config["cross_attention_dim_t5"]),
        "text_embedding_mask_t5": make(1, config["text_len_t5"]).long(),
        "image_rotary_emb": (rotary, rotary),
    }
    if config.get("use_style_cond_and_image_meta_size", True):
        inputs |= {"image_meta_size": make(1, 6), "style": make(1).long()}
    return inputs


def _latte(config: Config, make: Make, length: int) -> dict[str, Any]:
    return {
        "hidden_states": make(1, config["in_channels"], config["video_length"], *_square(config)),
        "timestep": make(1),
        "encoder_hidden_states": make(1, length, config["caption_channels"]),
    }


def _skip_latte(config: Config, make: Make, length: int) -> dict[str, Any]:
    if config["caption_channels"]:
        return _latte(config, make, length)
    video = make(1, config["in_channels"], config["video_length"], *_square(config))
    inputs = {"hidden_states": video, "timestep": make(1)}
    return inputs | {"class_labels": make(1).long()} if config["num_classes"] else inputs


def _sd3(config: Config, make: Make, length: int) -> dict[str, Any]:
    return {
        "hidden_states": make(1, config["in_channels"], *_square(config)),
        "encoder_hidden_states": make(1, length + 256, config["joint_attention_dim"]),
        "pooled_projections": make(1, config["pooled_projection_dim"]),
        "timestep": make(1),
    }


def _flux(config: Config, make: Make, _: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "hidden_states": make(1, 4096, config["in_channels"]),  # 1024 x 1024 pixels, packed 2 x 2 latents
        "encoder_hidden_states": make(1, 512, config["joint_attention_dim"]),
        "pooled_projections": make(1, config["pooled_projection_dim"]),
        "timestep": make(1),
        "img_ids": make(4096, 3),
        "txt_ids": make(512, 3),
    }
    if config.get("guidance_embeds"):
        inputs["guidance"] = make(1)
    return inputs


def _sana(config: Config, make: Make, _: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "hidden_states": make(1, config["in_channels"], *_square(config)),
        "encoder_hidden_states": make(1, 300, config["caption_channels"]),
        "timestep": make(1),
    }
    return inputs | {"guidance": make(1)} if config.get("guidance_embeds") else inputs


def _wan(config: Config, make: Make, _: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "hidden_states": make(1, config["in_channels"], 21, 60, 104),  # 81 frames of 480 x 832 pixels
        "encoder_hidden_states": make(1, 512, config["text_dim"]),
        "timestep": make(1),
    }
    if config.get("image_dim"):
        inputs["encoder_hidden_states_image"] = make(1, config.get("pos_embed_seq_len") or 257, config["image_dim"])
    return inputs


_EXAMPLES: Mapping[str, Callable[[Config, Make, int], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "UNetSpatioTemporalConditionModel": _svd,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
    "HunyuanDiT2DModel": _hunyuan,
    "LatteTransformer3DModel": _latte,
    "SkipLatteTransformer3DModel": _skip_latte,
    "SanaTransformer2DModel": _sana,
    "WanTransformer3DModel": _wan,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
