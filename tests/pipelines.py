"""Real diffusers pipelines of every family with tiny random networks: no downloads, no waiting.

`build(name)` gives a fresh pipeline with the same weights every time, `run(name, pipe, ...)` its latents.
Row i of a batch depends on `seed + i` and `embeds_seed + i` only, so it can be compared with a run of its own.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock
from zlib import crc32

import torch
from diffusers import DiffusionPipeline
from tiny_models import (
    DEEP_UNET,
    FRAMES,
    PICTURE,
    POOLED,
    SD3,
    SD35,
    SIZED,
    TOKENS,
    UNET,
    WIDTH,
    dit,
    flux,
    hunyuan_dit,
    latte,
    lcm,
    pixart,
    sana,
    sana_sprint,
    sd,
    sd3,
    sd_adapter,
    sd_controlnet,
    sd_ip_adapter,
    sdxl,
    sdxl_controlnet,
    skip_dit,
    svd,
    wan,
    wan_with_picture,
    wan_with_two,
)
from torch import Tensor

GUIDANCE = 3.0

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a caller of `run` asks for."""

    seed: int
    prompts: int
    steps: int
    guidance: bool
    size: int
    embeds_seed: int

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.seed + i) for i in range(self.prompts)]

    def draw(self, what: str, *shape: int) -> Tensor:
        """Draw one normal tensor per prompt, (B, *shape)."""
        seeds = [crc32(f"{what} {self.embeds_seed + i}".encode()) for i in range(self.prompts)]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclass(frozen=True)
class Case:
    """A pipeline and how to call it."""

    name: str
    build: Callable[[], DiffusionPipeline]  # fresh, silent, in eval mode, the same weights every time
    run: Callable[..., Tensor]  # run(pipe, seed=, prompts=, ...) -> latents, see `_case`
    denoiser: str  # "unet" or "transformer"
    guided: bool  # whether guidance makes a guidance batch or a second call


def build(name: str) -> DiffusionPipeline:
    return case(name).build()


def run(name: str, pipe: DiffusionPipeline, **kwargs: Any) -> Tensor:
    return case(name).run(pipe, **kwargs)


def case(name: str) -> Case:
    return CASES[name] if name in CASES else VARIANTS[name]


# Inputs: each function gives a part of a pipeline's arguments


def _common(request: Request) -> Inputs:
    return {
        "num_inference_steps": request.steps,
        "generator": request.generators(),
        "output_type": "latent",
        "return_dict": False,
    }


def _scale(request: Request) -> Inputs:
    return {"guidance_scale": GUIDANCE if request.guidance else 1.0}


def _canvas(request: Request) -> Inputs:
    return {"height": request.size, "width": request.size}


def _eightfold_canvas(request: Request) -> Inputs:
    return {"height": 8 * request.size, "width": 8 * request.size, "use_resolution_binning": False}


def _unprompted(_: Request) -> Inputs:
    return {"negative_prompt": None}


def _sana_canvas(request: Request) -> Inputs:
    return {"height": 32 * request.size, "width": 32 * request.size, "use_resolution_binning": False}


def _wan_canvas(request: Request) -> Inputs:
    return {"height": 8 * request.size, "width": 8 * request.size, "num_frames": 4 * (FRAMES - 1) + 1}


def _video(_: Request) -> Inputs:
    return {"num_frames": FRAMES}


def _latte_video(_: Request) -> Inputs:
    return {"negative_prompt": None, "video_length": FRAMES}


def _prompt(request: Request) -> Inputs:
    return {"prompt_embeds": request.draw("prompt", TOKENS, WIDTH)}


def _text(request: Request) -> Inputs:
    return _prompt(request) | {"negative_prompt_embeds": request.draw("negative prompt", TOKENS, WIDTH)}


def _pooled(request: Request) -> Inputs:
    return {
        "pooled_prompt_embeds": request.draw("pooled prompt", POOLED),
        "negative_pooled_prompt_embeds": request.draw("negative pooled prompt", POOLED),
    }


def _masks(request: Request) -> Inputs:
    """Prompts of different lengths, and a short negative one, as a tokenizer would pad them."""
    lengths = [TOKENS - (request.embeds_seed + i) % 3 for i in range(request.prompts)]
    mask = torch.stack([torch.arange(TOKENS) < length for length in lengths]).long()
    negative = (torch.arange(TOKENS) < 2).long().expand(request.prompts, -1)
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": negative}


def _second_text(request: Request) -> Inputs:
    """A second text encoder's embeddings: other numbers, the same lengths."""
    text = {name: embeds.flip(-1) for name, embeds in _text(request).items()}
    return {f"{name}_2": value for name, value in (text | _masks(request)).items()}


def _unbinned(_: Request) -> Inputs:
    return {"negative_prompt": None, "use_resolution_binning": False}


def _labels(request: Request) -> Inputs:
    return {"class_labels": [(request.embeds_seed + i) * 37 % 1000 for i in range(request.prompts)]}


def _image(request: Request) -> Inputs:
    """Images in [0, 1], (B, 3, H, W)."""
    return {"image": request.draw("image", 3, request.size, request.size).sigmoid()}


def _start(request: Request) -> Inputs:
    """Images to start from: of six steps, the last four are taken."""
    return _image(request) | {"strength": 0.7}


def _hole(request: Request) -> Inputs:
    return {"mask_image": (request.draw("mask", 1, request.size, request.size) > 0).float()}


def _picture(request: Request) -> Inputs:
    """A video's first frame, of a fixed size: the image encoder takes it as it is, the VAE's copy is resized."""
    return {"image": request.draw("image", 3, PICTURE, PICTURE).sigmoid()}


def _first_frame(request: Request) -> Inputs:
    """The same picture for all prompts, as the pipeline demands."""
    edge = 8 * request.size
    return {"image": torch.linspace(-9, 9, 3 * edge * edge).sigmoid().reshape(1, 3, edge, edge)}


def _long_text(request: Request) -> Inputs:
    """As many tokens as Wan's networks with a picture count upon."""
    return {name: request.draw(name, 512, WIDTH) for name in ("prompt_embeds", "negative_prompt_embeds")}


def _sprint(request: Request) -> Inputs:
    mask = {"prompt_attention_mask": _masks(request)["prompt_attention_mask"]}
    return _prompt(request) | mask | {"intermediate_timesteps": 1.3 if request.steps == 2 else None}


def _image_prompt(request: Request) -> Inputs:
    """Give every prompt the same image, as the pipeline demands; the unconditional half comes first."""
    image = torch.linspace(-1, 1, POOLED).sin().reshape(1, 1, POOLED)
    return {"ip_adapter_image_embeds": [torch.cat([-image, image]) if request.guidance else image]}


def _perturbation(request: Request) -> Inputs:
    return {"pag_scale": GUIDANCE if request.guidance else 0.0}


def _video_scale(request: Request) -> Inputs:
    return {"max_guidance_scale": GUIDANCE if request.guidance else 1.0}


def _true_scale(request: Request) -> Inputs:
    return {"true_cfg_scale": GUIDANCE if request.guidance else 1.0}


# Calls


def _call(pipe: DiffusionPipeline, _: Request, inputs: Inputs) -> Tensor:
    latents = pipe(**inputs)
    return latents if isinstance(latents, Tensor) else latents[0]  # a video comes without its tuple


def _call_dit(pipe: DiffusionPipeline, request: Request, inputs: Inputs) -> Tensor:
    """DiTPipeline takes its size from the network's configuration, and always decodes: take what the VAE was given."""
    network = pipe.transformer
    configured = network.config.sample_size
    network.register_to_config(sample_size=request.size)
    try:
        with mock.patch.object(pipe.vae, "decode", wraps=pipe.vae.decode) as decode:
            pipe(**inputs | {"output_type": "pt"})
    finally:
        network.register_to_config(sample_size=configured)
    return decode.call_args.args[0] * pipe.vae.config.scaling_factor


def _case(
    name: str,
    build: Callable[[], DiffusionPipeline],
    *parts: Callable[[Request], Inputs],
    call: Callable[[DiffusionPipeline, Request, Inputs], Tensor] = _call,
    denoiser: str = "transformer",
    guided: bool = True,
    takes_callback: bool = True,
    default_size: int = 8,
) -> Case:
    def run(
        pipe: DiffusionPipeline,
        *,
        seed: int = 0,
        prompts: int = 1,
        steps: int = 6,
        guidance: bool = True,
        size: int | None = None,
        callback: Callable[..., Inputs] | None = None,
        embeds_seed: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate latents; row i is what `seed + i` and `embeds_seed + i` (if not given, as `seed`) give alone.

        `size` is the edge in latent pixels, which are image pixels here; `callback` becomes `callback_on_step_end`.
        """
        if callback is not None and not takes_callback:
            raise ValueError(f"{type(pipe).__name__} has no callback_on_step_end; wrap scheduler.step instead.")
        prompted = seed if embeds_seed is None else embeds_seed
        request = Request(seed, prompts, steps, guidance, size or default_size, prompted)
        inputs: Inputs = {} if callback is None else {"callback_on_step_end": callback}
        for part in (_common, *parts):
            inputs |= part(request)
        with warnings.catch_warnings():
            # Schedulers turn tensors into arrays with numpy's old protocol.
            warnings.filterwarnings("ignore", "__array(_wrap)?__ ", DeprecationWarning)
            return call(pipe, request, inputs | kwargs)

    return Case(name, build, run, denoiser, guided)


_sd_case = partial(_case, denoiser="unet", default_size=16)
_pixart_case = partial(_case, takes_callback=False)
_PROMPTED = (_scale, _text)
_DRAWN = (*_PROMPTED, _canvas)
_XL = (*_DRAWN, _pooled)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _sd_case("sd", sd, *_DRAWN),
        _sd_case("sd-deep", partial(sd, config=DEEP_UNET), *_DRAWN),
        _sd_case("sd-img2img", partial(sd, "Img2Img"), *_PROMPTED, _start),
        _sd_case("sd-inpaint", partial(sd, "Inpaint"), *_DRAWN, _image, _hole),
        _sd_case("sd-inpaint9", partial(sd, "Inpaint", UNET | {"in_channels": 9}), *_DRAWN, _image, _hole),
        _sd_case("sd-controlnet", sd_controlnet, *_DRAWN, _image),
        _sd_case("sd-adapter", sd_adapter, *_DRAWN, _image, takes_callback=False),
        _sd_case("sd-ip-adapter", sd_ip_adapter, *_DRAWN, _image_prompt),
        _sd_case("sd-lcm", lcm, _scale, _prompt, _canvas, guided=False),
        _sd_case("sd-pix2pix", partial(sd, "InstructPix2Pix", UNET | {"in_channels": 8}), *_PROMPTED, _image),
        _sd_case("sd-pag", partial(sd, "PAG", pag_applied_layers=["mid", "up"]), *_DRAWN, _perturbation),
        _sd_case("sdxl", sdxl, *_XL),
        _sd_case("sdxl-img2img", partial(sdxl, "Img2Img"), *_PROMPTED, _pooled, _start),
        _sd_case("sdxl-inpaint", partial(sdxl, "Inpaint"), *_XL, _image, _hole),
        _sd_case("sdxl-controlnet", sdxl_controlnet, *_XL, _image),
        _case("svd", svd, _video_scale, _canvas, _picture, _video, denoiser="unet"),
        _pixart_case("pixart-alpha", partial(pixart, "Alpha"), *_DRAWN, _masks, _unbinned),
        _pixart_case("pixart-alpha-sized", partial(pixart, "Alpha", **SIZED), *_DRAWN, _masks, _unbinned),
        _pixart_case("pixart-sigma", partial(pixart, "Sigma"), *_DRAWN, _masks, _unbinned),
        _case("dit", dit, _scale, _labels, call=_call_dit, takes_callback=False),
        _case("skip-dit", skip_dit, _scale, _labels, call=_call_dit, takes_callback=False),
        _case("hunyuan-dit", hunyuan_dit, *_PROMPTED, _eightfold_canvas, _masks, _second_text),
        _case("latte", latte, *_DRAWN, _latte_video),
        _case("sana", sana, *_PROMPTED, _unprompted, _sana_canvas, _masks),
        _case("wan", wan, *_PROMPTED, _wan_canvas),
        _case("sd3", partial(sd3, SD3), *_XL),
        _case("sd35", partial(sd3, SD35), *_XL),
        _case("flux", flux, *_XL, guided=False),
        _case("flux-true-cfg", flux, _text, _canvas, _pooled, _true_scale),
    )
}

# Further pipelines of the same families, not under the laws: for what guidance inside attention does there.
VARIANTS: dict[str, Case] = {
    variant.name: variant
    for variant in (
        _case("wan-picture", wan_with_picture, _scale, _long_text, _wan_canvas, _first_frame),
        _case("wan-two", wan_with_two, *_PROMPTED, _wan_canvas),
        _case("sana-sprint", sana_sprint, _scale, _sprint, _sana_canvas, guided=False),
    )
}
