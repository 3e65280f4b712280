"""Tiny real text encoders with tokenizers of single letters, in the tiny pipelines: prompts instead of embeddings."""

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from pipelines import build
from tiny_models import HUNYUAN, POOLED, WIDTH, randomised, tiny
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = [chr(ord("a") + i) for i in range(26)]
SMALL = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}


def clip(width: int, projection: int = 0) -> tuple[nn.Module, CLIPTokenizer]:
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(letter + "</w>" for letter in LETTERS), *LETTERS]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=[], model_max_length=77)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, projection_dim=projection or width, **SMALL, **ends
    )
    return randomised((CLIPTextModelWithProjection if projection else CLIPTextModel)(config)), tokenizer


def t5() -> tuple[nn.Module, T5Tokenizer]:
    words = ["<pad>", "</s>", "<unk>", *("▁" + letter for letter in LETTERS), *LETTERS]
    tokenizer = T5Tokenizer(vocab=[(word, -float(i > 2)) for i, word in enumerate(words)])
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return randomised(T5EncoderModel(config)), tokenizer


def bert() -> tuple[nn.Module, BertTokenizer]:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77)
    return randomised(BertModel(BertConfig(vocab_size=len(words), hidden_size=WIDTH, **SMALL))), tokenizer


def _encoders(name: str) -> list[tuple[nn.Module, Any]]:
    half = WIDTH // 2
    if name == "sdxl":
        return [clip(half), clip(half, POOLED)]
    if name == "sd3":
        return [clip(half, half), clip(half, half), t5()]
    if name == "flux":
        return [clip(POOLED), t5()]
    if name == "hunyuan-dit":
        return [bert(), t5()]
    return [clip(WIDTH) if name in ("sd", "sd-lcm") else t5()]


def with_text(name: str) -> DiffusionPipeline:
    """The pipeline with text encoders; HunyuanDiT's own network, which has learned as many paddings as tokens."""
    pipe = build(name)
    parts: dict[str, Any] = {}
    for i, (encoder, tokenizer) in enumerate(_encoders(name)):
        suffix = f"_{i + 1}" if i else ""
        parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
    if name == "hunyuan-dit":
        parts["transformer"] = tiny("HunyuanDiT2DModel", HUNYUAN | {"text_len": 77, "text_len_t5": 256})
    pipe = getattr(diffusers, type(pipe).__name__)(**pipe.components | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
