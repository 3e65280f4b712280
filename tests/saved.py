"""A whole tiny Stable Diffusion, tokenizer and all, as `save_pretrained` writes it: 16 x 16 pixels, milliseconds."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny_models import BETAS, PIXART, UNET, VAE, WIDTH, randomised
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 8  # tokens of every prompt


@cache
def tiny_pipeline() -> Path:
    """The folder of the pipeline; nobody may write to it."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-pipeline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make().save_pretrained(folder)
    return folder


def make() -> StableDiffusionPipeline:
    words = _tokenizer()
    pipe = StableDiffusionPipeline(
        vae=randomised(AutoencoderKL(**VAE)),
        text_encoder=_text_encoder(words),
        tokenizer=words,
        unet=randomised(UNet2DConditionModel(**UNET)),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pixart() -> PixArtAlphaPipeline:
    words = _tokenizer()
    pipe = PixArtAlphaPipeline(
        tokenizer=words,
        text_encoder=_text_encoder(words),
        vae=randomised(AutoencoderKL(**VAE)),
        transformer=randomised(PixArtTransformer2DModel(**PIXART)),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return randomised(CLIPTextModel(text))


def _tokenizer() -> CLIPTokenizer:
    """One token per letter."""
    marks = ["<|startoftext|>", "<|endoftext|>"]
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz0123456789,." for end in ("", "</w>")]
    vocabulary = {token: number for number, token in enumerate(marks + letters)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)
