"""Routed causal language models: configurations, classes, and their registration with `transformers`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaPreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer, MistralPreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3PreTrainedModel

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


class RoutedQwen3Config(Qwen3Config):  # type: ignore[misc]
    """A `Qwen3Config`, with `routing`, the method and its parameters, and whether its quantiles were measured."""

    model_type = "whenwhere_qwen3"
    routing: dict[str, Any] | None = None
    routing_calibrated: bool = False


class RoutedMistralConfig(MistralConfig):  # type: ignore[misc]
    """A `MistralConfig`, with `routing`, the method and its parameters, and whether its quantiles were measured."""

    model_type = "whenwhere_mistral"
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


class RoutedQwen3Model(Qwen3Model):  # type: ignore[misc]
    """Qwen3's stack; what is recorded of a routed layer is the whole stream behind it."""

    config_class = RoutedQwen3Config
    _can_record_outputs: ClassVar = {"hidden_states": [Qwen3DecoderLayer, Routed], "attentions": Qwen3Attention}


class RoutedMistralModel(MistralModel):  # type: ignore[misc]
    """Mistral's stack; what is recorded of a routed layer is the whole stream behind it."""

    config_class = RoutedMistralConfig
    _can_record_outputs: ClassVar = {"hidden_states": [MistralDecoderLayer, Routed], "attentions": MistralAttention}


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


class RoutedQwen3ForCausalLM(RoutedCausalLM, Qwen3ForCausalLM):  # type: ignore[misc]
    """A Qwen3 with routed layers."""

    config_class = RoutedQwen3Config

    def __init__(self, config: RoutedQwen3Config) -> None:
        Qwen3PreTrainedModel.__init__(self, config)
        self._build(RoutedQwen3Model)
        self.post_init()


class RoutedMistralForCausalLM(RoutedCausalLM, MistralForCausalLM):  # type: ignore[misc]
    """A Mistral with routed layers."""

    config_class = RoutedMistralConfig

    def __init__(self, config: RoutedMistralConfig) -> None:
        MistralPreTrainedModel.__init__(self, config)
        self._build(RoutedMistralModel)
        self.post_init()


FAMILIES: Mapping[type, tuple[Any, Any]] = {
    LlamaForCausalLM: (RoutedLlamaConfig, RoutedLlamaForCausalLM),
    Qwen2ForCausalLM: (RoutedQwen2Config, RoutedQwen2ForCausalLM),
    Qwen3ForCausalLM: (RoutedQwen3Config, RoutedQwen3ForCausalLM),
    MistralForCausalLM: (RoutedMistralConfig, RoutedMistralForCausalLM),
}
for _config, _model in FAMILIES.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
