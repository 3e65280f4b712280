"""Surprise beyond language: patches skip every second layer of a vision Transformer where nothing new happens.

The Subjective Depth Transformer (see `sdt.py`) on a `ViTModel`. A picture is there as a whole, so the best tokens of it
are selected in evaluation as in training, without thresholds; the class token always runs. The moving average of
surprise goes over the patches row by row.
"""

import copy
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTModel

from ..tokens import put, take
from .call import Note
from .gates import blend, weight
from .sdt import SDT
from .select import top_k
from .tokens import Tokens


class Pair(nn.Module):
    """Two layers: the first changes every token, the second those that surprised.

    Args:
        first, second: layers of a vision Transformer.
        routing: the method; of its settings those of selection, surprise and gate count.
        index: of the second layer.
        width, eps: of the model, and of its norms.
    """

    def __init__(self, first: nn.Module, second: nn.Module, routing: SDT, index: int, width: int, eps: float) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.routing, self.index = routing, index
        self.router = routing.router(width, eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        routing_notes: MutableMapping[int, Note] | None = None,
        **more: Any,
    ) -> Tensor:
        """The stream behind both layers, (B, N, D); what was selected is written into `routing_notes`.

        Raises:
            ValueError: patches are masked.
        """
        if attention_mask is not None:
            raise ValueError("routed vision layers take whole pictures; leave attention_mask out.")
        after: Tensor = self.first(hidden_states, None, **more)
        rank = torch.arange(after.shape[1], device=after.device).expand(after.shape[:2])
        tokens = Tokens(after, hidden_states, None, rank, None)
        look = self.router.look(tokens, lambda: after)
        chosen = top_k(look.score, self._capacity(), always=rank == 0)
        before = take(after, chosen.index)
        gate = weight(self.routing.gate, look.gate).gather(1, chosen.index)
        if routing_notes is not None:
            losses = {name: loss * self.routing.weights[name] for name, loss in look.losses.items()}
            routing_notes[self.index] = Note(chosen.mask, look.score.detach(), None, look.gate, losses, look.details)
        return put(after, chosen.index, blend(before, self.second(before, None, **more), gate))

    def _capacity(self) -> float:
        capacity = self.routing.capacity
        return capacity[self.index // 2] if isinstance(capacity, tuple) else capacity


def route_vision(model: nn.Module, routing: SDT) -> Any:
    """A vision Transformer whose every second layer runs on surprising patches only; shares the dense parameters.

        routed, notes = lm.route_vision(vit, lm.SDT(surprise="relative")), {}
        output = routed(pixel_values=pictures, routing_notes=notes)
        notes[1].mask                                    # (B, N), the tokens that ran in layer 1; token 0 is the class
        loss = ... + sum(loss for note in notes.values() for loss in note.losses.values())

    Args:
        model: a `ViTModel`.
        routing: `SDT`, without `bypass`, a student and layers of its own choice.

    Raises:
        TypeError: the model is of another kind.
        ValueError: the method has settings that make no sense here.
    """
    if not isinstance(model, ViTModel):
        raise TypeError(f"{type(model).__name__} cannot be routed as a vision Transformer; give a ViTModel.")
    if routing.bypass != "identity" or routing.student != "none" or routing.routed_layers:
        raise ValueError("a vision Transformer takes SDT without bypass, student and routed_layers.")
    found: Any = model
    count, width, eps = len(found.layers), found.config.hidden_size, found.config.layer_norm_eps
    routing.capacities(count)
    routed = copy.deepcopy(found, {id(parameter): parameter for parameter in found.parameters()})
    layers = list(routed.layers)
    pairs = [Pair(layers[i - 1], layers[i], routing, i, width, eps) for i in range(1, count, 2)]
    fresh = nn.ModuleList([*pairs, *layers[2 * len(pairs) :]])
    routed.layers = fresh.to(device=found.device, dtype=found.dtype)
    return routed.train(found.training)
