"""The methods by name, and what they ask of a configuration."""

from collections.abc import Mapping
from typing import Any

from .mod import MoD
from .routing import Routing
from .sdt import SDT
from .stt import STT

METHODS: Mapping[str, type[Routing]] = {"MoD": MoD, "SDT": SDT, "STT": STT}


def read_routing(data: Mapping[str, Any]) -> Routing:
    """The method that a configuration names.

    Raises:
        ValueError: this version does not know it, or some of its settings.
    """
    if data["method"] not in METHODS:
        raise ValueError(f"unknown method {data['method']!r} in config.routing; known: {', '.join(METHODS)}.")
    return METHODS[data["method"]].from_dict(data)


def check_layers(config: Any, indices: tuple[int, ...]) -> None:
    """Refuse layers that do not attend to the whole text.

    Raises:
        ValueError: one of them does not.
    """
    window = getattr(config, "sliding_window", None)
    uniform = f"a sliding window of {window} tokens" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [uniform] * config.num_hidden_layers
    for index in indices:
        if kinds[index] != "full_attention":
            raise ValueError(f"layer {index} has {kinds[index]}; routing is defined for full attention only.")
