"""From a dense model to a routed one, with every tensor accounted for."""

import copy
from typing import Any

import torch
from torch import nn

from .causal import RoutedCausalLM
from .layer import Routed
from .methods import check_layers
from .models import FAMILIES
from .routing import Routing


def route(model: nn.Module, routing: Routing) -> Any:
    """A routed model that shares the parameters of a dense one.

    The dense model stays as it is, and trains along if the routed one is trained. With a capacity of 1 and the gate
    "ste" or "hard" both compute the same, bit for bit.

    Args:
        model: a `LlamaForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM` or `MistralForCausalLM`.
        routing: `MoD`, `SDT` or `STT`.

    Returns:
        a causal language model of `transformers`; see `whenwhere.lm`.

    Raises:
        TypeError: the model is of another kind.
        ValueError: it does not fit, or a tensor would be left without a place.
    """
    if isinstance(model, RoutedCausalLM):
        raise TypeError("the model is routed already; route the dense one, or change its knob.")
    if type(model) not in FAMILIES:
        known = ", ".join(family.__name__ for family in FAMILIES)
        raise TypeError(
            f"{type(model).__name__} cannot be routed: its layers must take (hidden_states, attention_mask, "
            f"position_embeddings, past_key_values) and rotate keys by position, as those of {known} do. "
            "Adapters come after routing."
        )
    dense: Any = model
    if getattr(dense, "hf_quantizer", None) is not None:
        raise ValueError("a quantised model cannot be routed; route first, and quantise what is saved.")
    config_type, model_type = FAMILIES[type(model)]
    check_layers(dense.config, routing.layers(dense.config.num_hidden_layers))
    settings = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = config_type(**settings, routing=routing.to_dict())
    config._attn_implementation = dense.config._attn_implementation
    with torch.device("meta"):
        routed = model_type(config)
    _move_in(routed, dense)
    routed.generation_config = copy.deepcopy(dense.generation_config)
    return routed.train(dense.training)


def _move_in(routed: Any, dense: Any) -> None:
    """Give the routed model, which has no storage yet, the dense one's tensors and new routers.

    Raises:
        ValueError: names on both sides do not match one to one.
    """
    state = dense.state_dict(keep_vars=True)
    places = {name: _place(name, routed) for name in state}
    own = {name for name in routed.state_dict() if not _is_new(name, routed)}
    if own != set(places.values()):
        odd = sorted(own ^ set(places.values()))
        raise ValueError(f"tensors without a counterpart: {', '.join(odd[:5])}; the model was changed after loading?")
    frozen = [tensor for tensor in state.values() if not tensor.requires_grad]
    routed.load_state_dict({places[name]: tensor for name, tensor in state.items()}, strict=False, assign=True)
    for tensor in frozen:  # loading makes every tensor like the one whose place it takes, which is not frozen
        tensor.requires_grad_(False)
    routed.model.rotary_emb = dense.model.rotary_emb
    for layer in routed.routed:
        width, eps = routed.config.hidden_size, routed.config.rms_norm_eps
        fresh = Routed(layer.layer, layer.routing, layer.index, layer.capacity, width, eps)
        fresh = fresh.to(device=dense.device, dtype=dense.dtype)
        routed.model.layers[layer.index] = fresh


def _place(name: str, routed: Any) -> str:
    """Where a tensor of the dense model goes."""
    for layer in routed.routed:
        prefix = f"model.layers.{layer.index}."
        if name.startswith(prefix):
            return f"{prefix}layer.{name.removeprefix(prefix)}"
    return name


def _is_new(name: str, routed: Any) -> bool:
    """Whether a tensor of the routed model has no counterpart in a dense one."""
    prefixes = {f"model.layers.{layer.index}." for layer in routed.routed}
    return any(name.startswith(prefix) and not name.startswith(f"{prefix}layer.") for prefix in prefixes)
