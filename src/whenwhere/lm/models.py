"""Routed causal language models: configurations, classes, and their registration with `transformers`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaPreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2PreTrainedModel

from .causal import RoutedCausalLM
from .layer import Routed


class RoutedLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """A `LlamaConfig`, with `routing`, the method and its parameters, and whether its quantiles were measured."""

    model_type = "whenwhere_llama"
    routing: dict[str, Any] | None = None
    routing_calibrated: bool = False


class RoutedQwen2Config(Qwen2Config):  # type: ignore[misc]
    """A `Qwen2Config`, with `routing`, the method and its parameters, and whether its quantiles were measured."""

    model_type = "whenwhere_qwen2"
    routing: dict[str, Any] | None = None
    routing_calibrated: bool = False


class RoutedLlamaModel(LlamaModel):  # type: ignore[misc]
    """Llama's stack; what is recorded of a routed layer is the whole stream behind it."""

    config_class = RoutedLlamaConfig
    _can_record_outputs: ClassVar = {"hidden_states": [LlamaDecoderLayer, Routed], "attentions": LlamaAttention}


class RoutedQwen2Model(Qwen2Model):  # type: ignore[misc]
    """Qwen2's stack; what is recorded of a routed layer is the whole stream behind it."""

    config_class = RoutedQwen2Config
    _can_record_outputs: ClassVar = {"hidden_states": [Qwen2DecoderLayer, Routed], "attentions": Qwen2Attention}


class RoutedLlamaForCausalLM(RoutedCausalLM, LlamaForCausalLM):  # type: ignore[misc]
    """A Llama with routed layers."""

    config_class = RoutedLlamaConfig

    def __init__(self, config: RoutedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self._build(RoutedLlamaModel)
        self.post_init()


class RoutedQwen2ForCausalLM(RoutedCausalLM, Qwen2ForCausalLM):  # type: ignore[misc]
    """A Qwen2 with routed layers."""

    config_class = RoutedQwen2Config

    def __init__(self, config: RoutedQwen2Config) -> None:
        Qwen2PreTrainedModel.__init__(self, config)
        self._build(RoutedQwen2Model)
        self.post_init()


FAMILIES: Mapping[type, tuple[Any, Any]] = {
    LlamaForCausalLM: (RoutedLlamaConfig, RoutedLlamaForCausalLM),
    Qwen2ForCausalLM: (RoutedQwen2Config, RoutedQwen2ForCausalLM),
}
for _config, _model in FAMILIES.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
