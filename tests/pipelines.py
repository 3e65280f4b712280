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

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers import FlowMatchEulerDiscreteScheduler as FlowScheduler
from tiny_models import DEEP_UNET, POOLED, TOKENS, UNET, WIDTH, XL_UNET, dit, flux, pixart, unet, vae
from torch import Tensor

GUIDANCE = 3.0
# Stable Diffusion's, for everyone: a network that predicts nothing grows noise 15 times here, 158 times with DiT's.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WITHOUT_TEXT = {"text_encoder": None, "tokenizer": None}
WITHOUT_TEXT_2 = WITHOUT_TEXT | {"text_encoder_2": None, "tokenizer_2": None}

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
    run: Callable[..., Tensor]  # run(pipe, seed=, prompts=, ...) -> latents, see `_run`
    denoiser: str  # "unet" or "transformer"
    guided: bool  # whether guidance makes a guidance batch or a second call


def build(name: str) -> DiffusionPipeline:
    return CASES[name].build()


def run(name: str, pipe: DiffusionPipeline, **kwargs: Any) -> Tensor:
    return CASES[name].run(pipe, **kwargs)


# Pipelines


def _pipeline(kind: str, **components: Any) -> DiffusionPipeline:
    pipe = getattr(diffusers, kind)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _sd(kind: str = "StableDiffusionPipeline", config: Inputs = UNET) -> DiffusionPipeline:
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return _pipeline(kind, unet=unet(**config), vae=vae(), scheduler=_ddim(), **WITHOUT_TEXT, **absent)


def _sdxl(kind: str = "StableDiffusionXLPipeline") -> DiffusionPipeline:
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1)
    return _pipeline(kind, unet=unet(**XL_UNET), vae=vae(), scheduler=scheduler, **WITHOUT_TEXT_2)


def _pixart(kind: str, **changes: Any) -> DiffusionPipeline:
    scheduler = DPMSolverMultistepScheduler(**BETAS)
    return _pipeline(kind, transformer=pixart(**changes), vae=vae(), scheduler=scheduler, **WITHOUT_TEXT)


def _dit() -> DiffusionPipeline:
    return _pipeline("DiTPipeline", transformer=dit(), vae=vae(), scheduler=_ddim())


def _flux() -> DiffusionPipeline:
    return _pipeline("FluxPipeline", transformer=flux(), vae=vae(), scheduler=FlowScheduler(), **WITHOUT_TEXT_2)


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


def _text(request: Request) -> Inputs:
    return {
        "prompt_embeds": request.draw("prompt", TOKENS, WIDTH),
        "negative_prompt_embeds": request.draw("negative prompt", TOKENS, WIDTH),
    }


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


def _unbinned(_: Request) -> Inputs:
    return {"negative_prompt": None, "use_resolution_binning": False}


def _labels(request: Request) -> Inputs:
    return {"class_labels": [(request.embeds_seed + i) * 37 % 1000 for i in range(request.prompts)]}


def _true_scale(request: Request) -> Inputs:
    return {"true_cfg_scale": GUIDANCE if request.guidance else 1.0}


# Calls


def _call(pipe: DiffusionPipeline, _: Request, inputs: Inputs) -> Tensor:
    return pipe(**inputs)[0]


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
    @torch.no_grad()
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
            warnings.filterwarnings("ignore", "__array__ implementation doesn't accept", DeprecationWarning)
            return call(pipe, request, inputs | kwargs)

    return Case(name, build, run, denoiser, guided)


_unet_case = partial(_case, denoiser="unet", default_size=16)
_pixart_case = partial(_case, takes_callback=False)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _unet_case("sd", _sd, _scale, _canvas, _text),
        _unet_case("sd-deep", partial(_sd, config=DEEP_UNET), _scale, _canvas, _text),
        _unet_case("sdxl", _sdxl, _scale, _canvas, _text, _pooled),
        _pixart_case(
            "pixart-alpha", partial(_pixart, "PixArtAlphaPipeline"), _scale, _canvas, _text, _masks, _unbinned
        ),
        _case("dit", _dit, _scale, _labels, call=_call_dit, takes_callback=False),
        _case("flux", _flux, _scale, _canvas, _text, _pooled, guided=False),
        _case("flux-true-cfg", _flux, _true_scale, _canvas, _text, _pooled),
    )
}
