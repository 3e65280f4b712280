"""What a routed causal language model adds to those of `transformers`: a knob, a record, and refusals.

Its forward is upstream's, unchanged; what a call selects travels with the arguments that upstream hands to every layer.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .call import Call, Knob, Note, PerLayer, Policy, turn
from .layer import Routed
from .losses import share_of_update, total, with_loss
from .methods import check_layers, read_routing
from .policy import begin, check_texts
from .routing import Routing


class RoutedCausalLM:
    """What routed models add to those of `transformers`.

    Attributes:
        routing: the method and its parameters.
        knob: the trade of speed against quality where a call asks for nothing else.
        call: the last forward call, or `None`.
        stepped: whether `set_step` has told where training is.
    """

    _is_stateful = True  # refuses assisted decoding: entries of routed layers cannot be taken back
    config: Any
    model: Any
    routing: Routing
    knob: Knob
    call: Call | None
    stepped: bool

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As upstream's, for a checkpoint that has every tensor of the model, and no other.

        Raises:
            ValueError: it was saved by another method, or with other parts.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing, more = (sorted(info[f"{kind}_keys"])[:3] for kind in ("missing", "unexpected"))
        if missing or more:
            raise ValueError(
                f"the checkpoint does not fit {model.routing}: it lacks {missing} and has {more} beside. Load it with "
                "the routing it was saved with; a dense model is converted by whenwhere.lm.route."
            )
        return (model, info) if output_loading_info else model

    def _build(self, backbone: type[nn.Module]) -> None:
        """Upstream's parts, around a stack with routed layers."""
        config: Any = self.config
        if not config.routing:
            raise ValueError(
                f"{type(self).__name__} needs config.routing; convert a dense model by whenwhere.lm.route."
            )
        self.routing = read_routing(config.routing)
        self.model = backbone(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.knob, self.call, self.stepped = Knob(), None, False
        self._add_routers()

    def _add_routers(self) -> None:
        """Put the chosen layers behind new routers."""
        routing, layers = self.routing, self.model.layers
        indices = routing.layers(len(layers))
        check_layers(self.config, indices)
        for index, capacity in zip(indices, routing.capacities(len(layers)), strict=True):
            width, eps = self.config.hidden_size, self.config.rms_norm_eps
            layers[index] = Routed(layers[index], routing, index, capacity, width, eps)
            if layers[index].router.looks_back:
                layers[index - 1].register_forward_pre_hook(_Enters(index - 1), with_kwargs=True)

    @property
    def routed(self) -> list[Routed]:
        """The routed layers, in order."""
        return [layer for layer in self.model.layers if isinstance(layer, Routed)]

    @property
    def notes(self) -> Mapping[int, Note]:
        """By layer, what was selected in the last call."""
        return {} if self.call is None else self.call.notes

    @property
    def realised(self) -> dict[int, float]:
        """By layer, the share of tokens that the last call processed; waits for the device."""
        keep = None if self.call is None else self.call.keep
        return {
            index: float((note.mask.float().mean() if keep is None else note.mask.sum() / keep.sum()).item())
            for index, note in self.notes.items()
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        policy: Policy | None = None,
        capacity: PerLayer | None = None,
        threshold: PerLayer | None = None,
        speed: float | None = None,
        selection: Mapping[int, Tensor] | None = None,
        **more: Any,
    ) -> Any:
        """As upstream's, with a knob for this call; `generate` takes it as well.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache, logits_to_keep:
                as upstream. In training the loss includes that of the routers.
            policy, capacity, threshold, selection: see `Knob`.
            speed: in [0, 1], for a capacity of 1 - speed.
            more: handed to upstream.

        Raises:
            ValueError: what is asked for cannot be: see the message.
        """
        turned = turn(self.knob, policy, capacity, threshold, speed, selection)
        entering = input_ids if input_ids is not None else inputs_embeds
        check_texts(entering, labels)
        training: bool = self.training  # type: ignore[attr-defined]
        if past_key_values is None and use_cache is None and (training or labels is not None):
            use_cache = False  # nothing follows a text that is scored
        call = begin(self, turned, entering, attention_mask, position_ids, past_key_values, use_cache)
        output = super().forward(  # type: ignore[misc]
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            routing_call=call,
            **more,
        )
        call.entering.clear()
        self.call = call
        if training and labels is not None:
            return with_loss(output, total(self.routing, call) * share_of_update(labels, more))
        return output

    def init_continuous_batching(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "continuous batching pages keys by position; routed layers have fewer. Use generate()."
        )


class _Enters:
    """In front of a layer: note the stream that enters it."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        call = kwargs.get("routing_call")
        if call is not None:
            call.entering[self.layer] = args[0] if args else kwargs["hidden_states"]
