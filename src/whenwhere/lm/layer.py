"""A decoder layer that processes only some tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..tokens import put, take
from .attention import (
    AllKeys,
    Rotary,
    among_keys,
    among_selected,
    as_allowed,
    as_mask,
    repeated,
    take_rotary,
    take_rows,
)
from .cache import Keys, RoutedLayer, routed_layer
from .call import Call, Note, of_layer
from .gates import blend, weight
from .networks import Imitator
from .routing import Look, Routing
from .select import Chosen, everything, in_place, of_mask, top_k
from .tokens import Tokens, mean_over

QUANTILES = 101


@dataclass(frozen=True, slots=True)
class Around:
    """What a decoder layer is called with beside the stream.

    Attributes:
        mask: (1 or B, 1, T, S), boolean or added to scores; or `None` for causal attention without padding.
        rotary: cosines and sines, (1 or B, T, D).
        memory: the layer's keys and values of earlier calls, or `None`.
        past: how many tokens came in earlier calls.
        more: further arguments, handed on.
    """

    mask: Tensor | None
    rotary: Rotary
    memory: RoutedLayer | None
    past: int
    more: dict[str, Any]

    def of_rows(self, rows: Tensor) -> "Around":
        """The same for some sequences; memory stays whole."""
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows]
        cos, sin = (table if len(table) == 1 else table[rows] for table in self.rotary)
        return Around(mask, (cos, sin), self.memory, self.past, self.more)


class Routed(nn.Module):
    """A decoder layer behind a router; takes and returns what the layer does.

    Skipped tokens stay as they are, or get a guess of what the layer would have added.

    Args:
        layer: of a Llama-like model.
        routing: the method.
        index: of the layer, counted from 0.
        capacity: γ of this layer.
        width, eps: of the model, and of its norms.
    """

    quantiles: Tensor
    student_quantiles: Tensor

    def __init__(self, layer: nn.Module, routing: Routing, index: int, capacity: float, width: int, eps: float) -> None:
        super().__init__()
        self.layer = layer
        self.routing = routing
        self.index = index
        self.capacity = capacity
        self.router = routing.router(width, eps)
        self.bypass = routing.bypass_network(width, eps)
        self.student = None
        self.register_buffer("quantiles", torch.zeros(QUANTILES))
        if routing.student != "none":
            self.student = Imitator(width, routing.student, self.router.runs_block, capacity, eps)
            self.register_buffer("student_quantiles", torch.zeros(QUANTILES))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Rotary | None = None,
        routing_call: Call | None = None,
        **more: Any,
    ) -> Tensor:
        """The stream behind the layer, (B, T, D)."""
        del position_ids, use_cache
        if routing_call is None or position_embeddings is None:
            raise TypeError("a routed layer runs within its causal language model; call that, not its parts.")
        call = routing_call
        memory = routed_layer(past_key_values, self.index, self.routing.kv_scope)
        around = Around(attention_mask, position_embeddings, memory, call.past, more)
        earlier = call.entering[self.index - 1] if self.router.looks_back else hidden_states
        keep = None if attention_mask is None else call.keep
        tokens = Tokens(hidden_states, earlier, keep, call.rank, None if memory is None else memory.memory)
        look = self._look(call, tokens, around)
        logits = self._imitate(call, tokens)
        chosen = self._choose(call, look, logits, tokens)
        output, losses = self._output(call, tokens, look, chosen, around)
        if call.training:
            losses |= self._losses(look, logits, chosen, keep)
        found = (None, None, {}) if look is None else (look.score.detach(), look.gate.detach(), look.details)
        note = Note(chosen.mask, found[0], None if logits is None else logits.detach(), found[1], losses, found[2])
        call.notes[self.index] = note
        return output

    def _look(self, call: Call, tokens: Tokens, around: Around) -> Look | None:
        """Ask the router, where it is needed: to select, to weigh, or to learn."""
        weighs = self.routing.gate not in ("ste", "hard") and not self.router.runs_block
        if not (call.training or call.policy in ("topk", "router") or weighs):
            return None
        if self.router.runs_block and tokens.memory is not None:
            raise ValueError(
                f"{type(self.routing).__name__} scores a token by running the layer on it, which saves nothing in "
                "decoding; use policy='student', or score a text with use_cache=False."
            )

        def run() -> Tensor:
            return self._block(tokens.stream, around.mask, around.rotary, None, around.more)

        return self.router.look(tokens, run)

    def _imitate(self, call: Call, tokens: Tokens) -> Tensor | None:
        """Ask the student, if there is one and it is to learn, to decide or to be calibrated."""
        if self.student is None or not (call.training or call.policy in ("student", "topk")):
            return None
        entering = tokens.earlier  # in front of the pair, where the router looks back
        before = tokens.previous(entering, "entered") if self.student.pair else entering
        logits: Tensor = self.student(entering, before)
        return logits

    def _choose(self, call: Call, look: Look | None, logits: Tensor | None, tokens: Tokens) -> Chosen:
        shape, keep = tokens.stream[..., 0], tokens.keep
        always = self.routing.always(tokens)
        given = call.knob.selection.get(self.index)
        dynamic = self.routing.score_threshold
        if given is not None:
            mask = given.to(device=shape.device, dtype=torch.bool).expand_as(shape)
        elif call.policy == "topk" and dynamic is None:
            assert look is not None
            return top_k(look.score, of_layer(call.knob.capacity, self.index) or self.capacity, keep, always)
        elif call.policy in ("all", "none"):
            mask = torch.full_like(shape, call.policy == "all", dtype=torch.bool)
        else:
            scores = logits if call.policy == "student" else None if look is None else look.score
            assert scores is not None
            mask = scores >= (self.threshold(call) if call.policy != "topk" or dynamic is None else dynamic)
            mask = mask if always is None else mask | always
        if call.policy == "all" and keep is None and given is None:
            return everything(mask)
        mask = mask if keep is None else mask & keep
        return in_place(mask) if call.training or self.routing.decode_compute == "masked" else of_mask(mask)

    def threshold(self, call: Call) -> Tensor | float:
        """θ in this call.

        Raises:
            ValueError: nothing tells which.
        """
        asked = of_layer(call.knob.threshold, self.index)
        if asked is not None:
            return asked
        capacity = of_layer(call.knob.capacity, self.index)
        if capacity == 1 or (capacity is None and self.capacity == 1):
            return float("-inf")
        student = call.policy == "student"
        if call.calibrated:
            return quantile(self.student_quantiles if student else self.quantiles, 1 - (capacity or self.capacity))
        # Trained without the rest of the text in view, 0 is the border of the selection.
        if capacity is None and (student or self.routing.weights.get("aux")):
            return 0.0
        raise ValueError(
            f"layer {self.index} has no quantiles for a threshold; run whenwhere.lm.calibrate(model, batches), "
            "or score whole texts with policy='topk', which is not causal."
        )

    def _output(
        self, call: Call, tokens: Tokens, look: Look | None, chosen: Chosen, around: Around
    ) -> tuple[Tensor, dict[str, Tensor]]:
        stream = tokens.stream
        soft = torch.ones_like(stream[..., 0]) if look is None else look.gate
        gate = weight(self.routing.gate, soft)
        kind = self.routing.training_output
        if call.training and kind != "gated" and look is not None and look.dense is not None:
            if kind == "dense":
                return look.dense, {}
            return torch.where(chosen.mask[..., None], blend(stream, look.dense, gate), stream), {}
        guessed = None if self.bypass is None else self.bypass(stream)[0]
        aside = stream if guessed is None else stream + guessed
        if not chosen.places:
            self._skip(stream, around)
            return aside, {}
        if self._narrow(chosen, stream):
            rows = chosen.mask[:, 0].nonzero()[:, 0]
            one = Chosen(chosen.index[rows], None, chosen.mask[rows])
            done = self._process(stream[rows], one, around.of_rows(rows), rows, len(stream))
            return aside.index_put((rows,), blend(stream[rows], done, gate[rows]).to(aside.dtype)), {}
        before = take(stream, chosen.index)
        done = self._process(stream, chosen, around, None, len(stream))
        after = blend(before, done, gate.gather(1, chosen.index))
        if chosen.valid is not None:
            after = torch.where(chosen.valid[..., None], after, take(aside, chosen.index))
        losses = {}
        if guessed is not None and call.training:
            missed = take(guessed, chosen.index) - (done - before).detach()
            losses["bypass"] = mean_over(missed.float().square().mean(-1), chosen.valid)
        return put(aside, chosen.index, after), losses

    def _narrow(self, chosen: Chosen, stream: Tensor) -> bool:
        """Whether only some sequences of a decoding step are processed, and the others are worth leaving out."""
        single = stream.shape[1] == 1 and chosen.valid is not None
        return single and self.routing.decode_compute == "gather" and self.routing.kv_scope != "all"

    def _process(self, stream: Tensor, chosen: Chosen, around: Around, rows: Tensor | None, batch: int) -> Tensor:
        """The block's output for selected tokens, (R, k, D)."""
        index = chosen.index
        rotary, before = take_rotary(around.rotary, index), take(stream, index)
        if self.routing.kv_scope == "all":
            whole = self._all_keys(stream, index, around)
            return self._block(before, self._mask_all(chosen, around), rotary, whole, around.more)
        position = around.past + index
        if around.memory is None:
            return self._block(before, self._mask(position, chosen, around, None), rotary, None, around.more)
        begun = around.memory.get_seq_length() > 0
        keys = around.memory.expect(batch, position, chosen.valid, rows)
        if not begun and chosen.valid is None and rows is None:
            mask = self._mask(position, chosen, around, None)
        else:
            mask = self._mask(position, chosen, around, keys)
        return self._block(before, mask, rotary, _Only(around.memory), around.more)

    def _mask(self, position: Tensor, chosen: Chosen, around: Around, keys: Keys | None) -> Tensor | None:
        reuse = self.routing.kv_scope == "reuse"
        if keys is None and around.mask is None and chosen.valid is None and not reuse:
            return None
        if keys is not None and around.memory is not None and around.memory.even and chosen.places == 1 and not reuse:
            return None
        allowed = among_selected(chosen, around.mask) if keys is None else among_keys(position, keys)
        if keys is None and reuse:
            keys = Keys(position, torch.ones_like(position, dtype=torch.bool) if chosen.valid is None else chosen.valid)
        added = repeated(position, keys) if reuse and keys is not None else None
        return self._as_mask(allowed, added)

    def _mask_all(self, chosen: Chosen, around: Around) -> Tensor | None:
        """Selected tokens look at all tokens before them."""
        tokens = chosen.mask.shape[1]
        if around.mask is not None:
            allowed = take_rows(as_allowed(around.mask), chosen.index)
        elif chosen.places == tokens and chosen.valid is None and not around.past:
            return None
        else:
            order = torch.arange(around.past + tokens, device=chosen.index.device)
            allowed = (order <= around.past + chosen.index[..., None])[:, None]
        return self._as_mask(allowed | ~allowed.any(-1, keepdim=True), None)

    def _as_mask(self, allowed: Tensor, added: Tensor | None) -> Tensor:
        parameter = next(self.layer.parameters())
        return as_mask(allowed, added, self._implementation() == "eager", parameter.dtype)

    def _implementation(self) -> str:
        attention: Any = self.layer.self_attn
        return str(attention.config._attn_implementation)

    def _all_keys(self, stream: Tensor, index: Tensor, around: Around) -> AllKeys:
        if around.memory is not None:
            place = torch.arange(stream.shape[1], device=stream.device).expand(len(stream), -1)
            around.memory.expect(len(stream), around.past + place, None)
        return AllKeys(self.layer, stream, around.rotary, index, around.memory)

    def _skip(self, stream: Tensor, around: Around) -> None:
        """No token is processed; with keys and values of all tokens, these are still kept."""
        if self.routing.kv_scope == "all" and around.memory is not None:
            nobody = torch.zeros(len(stream), 0, dtype=torch.long, device=stream.device)
            whole = self._all_keys(stream, nobody, around)
            keys, values = whole.project(nobody)
            whole.update(keys, values)

    def _block(self, stream: Tensor, mask: Tensor | None, rotary: Rotary, cache: Any, more: dict[str, Any]) -> Tensor:
        """Run the layer. Not as a module: what is recorded as hidden states is the whole stream behind this one."""
        run: Callable[..., Any] = self.layer.forward
        output = run(
            stream,
            attention_mask=mask,
            position_embeddings=rotary,
            past_key_values=cache,
            use_cache=cache is not None,
            **more,
        )
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _losses(
        self, look: Look | None, logits: Tensor | None, chosen: Chosen, keep: Tensor | None
    ) -> dict[str, Tensor]:
        assert look is not None
        losses = {**look.losses, **self.router.losses(look, chosen.mask, keep)}
        if logits is not None and self.student is not None:
            missed = binary_cross_entropy_with_logits(logits, chosen.mask.float(), reduction="none")
            losses["student"] = mean_over(missed, keep)
            self.student.trained.fill_(True)
        return losses


@dataclass(slots=True)
class _Only:
    """A cache of one layer, as attention sees it."""

    memory: RoutedLayer

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.memory.update(keys, values)


def quantile(table: Tensor, share: float) -> Tensor:
    """The value below which a share of the scores lies, between the entries of a table of 0 %, 1 %, ... 100 %."""
    place = min(max(share, 0.0), 1.0) * (QUANTILES - 1)
    low = min(int(place), QUANTILES - 2)
    return torch.lerp(table[low].float(), table[low + 1].float(), place - low)
