"""Tiny random language models, and routed ones."""

import re
from functools import partial
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from whenwhere.lm import Routing, calibrate, route

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SENTENCE = "The capital of Italy is Rome, and that of France is Paris."
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (partial(Qwen3Config, head_dim=16), Qwen3ForCausalLM),  # heads wider than the stream, as published
    "mistral": (partial(MistralConfig, sliding_window=None), MistralForCausalLM),
}


def dense(family: str = "llama", attention: str = "sdpa", **sizes: Any) -> Any:
    """A dense model in evaluation mode, the same every time; weights are large enough for attention to matter."""
    config_type, model_type = MODELS[family]
    config = config_type(**SIZES | sizes, attn_implementation=attention, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_type(config).eval()


def routed(routing: Routing, family: str = "llama", attention: str = "sdpa", **sizes: Any) -> Any:
    """A routed model, whose new weights are the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return route(dense(family, attention, **sizes), routing)


def calibrated(routing: Routing, family: str = "llama", attention: str = "sdpa") -> Any:
    """A routed model with quantiles."""
    model = routed(routing, family, attention)
    calibrate(model, [text(4, 40, seed=9)])
    return model


def words() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of one sentence, each with the blank in front of it."""
    pattern = r" ?\w+|[,.]"
    known = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *re.findall(pattern, SENTENCE)])
    tokens = Tokenizer(WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="<pad>")


def text(rows: int = 2, tokens: int = 16, seed: int = 0) -> Tensor:
    """Token numbers (B, T), none of them special."""
    return torch.randint(3, SIZES["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(seed))
