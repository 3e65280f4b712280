"""A decoder layer that processes only some tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..tokens import put, take
from .attention import Rotary
from .cache import routed_layer
from .call import Call, Note
from .choice import QUANTILES, choose
from .gates import blend, weight
from .halves import AttentionHalf, Network
from .networks import Imitator
from .router import Look
from .routing import Routing
from .select import Chosen, everything, in_place
from .subset import Around, Subset
from .tokens import Tokens, mean_over


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
        memory = routed_layer(past_key_values, self.index, self.routing)
        around = Around(attention_mask, position_embeddings, memory, call.past, more)
        keep = None if attention_mask is None else call.keep
        stream = self._attended(hidden_states, keep, around) if self.routing.scope == "mlp" else hidden_states
        earlier = call.entering[self.index - 1] if self.router.looks_back else stream
        tokens = Tokens(stream, earlier, keep, call.rank, None if memory is None else memory.memory)
        look = self._look(call, tokens, around)
        logits = self._imitate(call, tokens)
        chosen = choose(self, call, look, logits, tokens, memory)
        output, losses = self._output(call, tokens, look, chosen, around)
        if call.training:
            losses |= self._losses(look, logits, chosen, keep)
        found = (None, None, {}) if look is None else (look.score.detach(), look.gate.detach(), look.details)
        note = Note(chosen.mask, found[0], None if logits is None else logits.detach(), found[1], losses, found[2])
        call.notes[self.index] = note
        return Network(self.layer).forward(output) if self.routing.scope == "attention" else output

    @property
    def subset(self) -> Subset | Network:
        """What is routed of the layer, on selected tokens."""
        if self.routing.scope == "mlp":
            return Network(self.layer)
        block = self.layer if self.routing.scope == "block" else AttentionHalf(self.layer)
        return Subset(block, self.routing.kv_scope)

    def _attended(self, stream: Tensor, keep: Tensor | None, around: Around) -> Tensor:
        """The stream behind the attention of all tokens that are no padding."""
        chosen = everything(stream[..., 0]) if keep is None else in_place(keep)
        return Subset(AttentionHalf(self.layer), "selected").run(stream, chosen, around, None, stream.shape[0])

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
            return self.subset.whole(tokens.stream, around.mask, around.rotary, None, around.more)

        return self.router.look(tokens, run)

    def _imitate(self, call: Call, tokens: Tokens) -> Tensor | None:
        """Ask the student, if there is one and it is to learn, to decide or to be calibrated."""
        if self.student is None or not (call.training or call.policy in ("student", "topk")):
            return None
        entering = tokens.earlier  # in front of the pair, where the router looks back
        before = tokens.previous(entering, "entered") if self.student.pair else entering
        logits: Tensor = self.student(entering, before)
        return logits

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
            self.subset.skip(stream, around)
            return aside, {}
        if self._narrow(chosen, stream):
            rows = chosen.mask[:, 0].nonzero()[:, 0]
            one = Chosen(chosen.index[rows], None, chosen.mask[rows])
            done = self.subset.run(stream[rows], one, around.of_rows(rows), rows, len(stream))
            return aside.index_put((rows,), blend(stream[rows], done, gate[rows]).to(aside.dtype)), {}
        before = take(stream, chosen.index)
        done = self.subset.run(stream, chosen, around, None, stream.shape[0])
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
