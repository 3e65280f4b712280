"""Decisions that reuse what a site put out, but run it anew on the tokens that need it most."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..decision import Call, Compute, Decision, Output, Slot, map_tensors, outline, room
from ..pricing.unit import Macs, Unit
from ..site import Kind
from ..tokens import favour, grid_of, highest, many, put, take
from .importance import normalised
from .scoring import run_and_score

_FLOAT = 4  # bytes of a score, and of a step


@dataclass(frozen=True, slots=True)
class Full(Decision):
    """Run the site and keep its output; also its tokens' scores and ages, where they are needed.

    Attributes:
        branches: guidance branches of the batch.
        block: number of the block, which names its scores.
        score: which score this attention's own projections tell; empty for none.
        tracked: whether ages are kept: the step, since the last full one, at which every token was computed.
        age: of this step; 0 at a full one.
        outlined: whether the shape alone of the output is kept, as for what only a projection reads.
    """

    branches: int
    block: int
    score: str = ""
    tracked: bool = False
    age: int = 0
    outlined: bool = False

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run, remember, score."""
        output, score = run_and_score(call, self.score) if self.score else (call.run(), None)
        kept = {"output": outline.of(output, None) if self.outlined else output}
        if self.tracked:
            if call.method.constants.bonus:
                grid_of(call.tokens.shape[1], call.method.grid)  # refuses now what could not be spread later
            kept["since"] = torch.full(call.tokens.shape[:2], self.age, dtype=torch.int32, device=call.tokens.device)
        slot.put(kept, call)
        if score is not None:
            slot.beside(f"score {self.block}").put(score, call)
        return output

    def recalled(self, kept: Output) -> Output:
        """What is handed on in place of the output: what was kept, or room for its shape."""
        return map_tensors(kept, room) if self.outlined else kept

    @property
    def keeps(self) -> bool:
        """Always."""
        return True

    def bare(self) -> Decision:
        """Run the site, nothing else."""
        return Compute()

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:
        """The output, and a number a token for scores and for ages."""
        tokens, features = unit.tokens, sum(unit.bytes)
        if not tokens and unit.attended:  # joint attention puts out two tensors
            tokens = features // (unit.itemsize * unit.attended.width)
        notes = _FLOAT * tokens * (bool(self.score) + self.tracked)
        return (notes if self.outlined else features + notes) * branches * samples

    def extra(self, unit: Unit, samples: int) -> Macs:
        """Scores that need the attention map cost one of attention's two products again."""
        product = (unit.macs.all - unit.macs.papers) // 2 if self.score in ("attention", "cross_attention") else 0
        return Macs(product * self.branches * samples)


@dataclass(frozen=True, slots=True)
class Recall(Decision):
    """Return what was kept."""

    whole: Full

    symbol: ClassVar[str] = "."
    name: ClassVar[str] = "reused"
    recalls: ClassVar[bool] = True
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall."""
        return self.whole.recalled(slot.get(call)["output"])

    @property
    def hollow(self) -> bool:
        """Where the shape alone was kept."""
        return self.whole.outlined

    def fresh(self) -> Decision:
        """Run and keep."""
        return self.whole


@dataclass(frozen=True, slots=True)
class Refresh(Decision):
    """Return what was kept, with the tokens that need it most computed anew and kept in their turn.

    Attributes:
        ratio: share of the tokens, rounded down to whole ones.
        whole: what is done instead where nothing is kept.
    """

    ratio: float
    whole: Full

    symbol: ClassVar[str] = "o"
    name: ClassVar[str] = "some tokens refreshed"
    recalls: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Choose, run on the chosen, put them back."""
        kept, tokens = slot.get(call), call.tokens
        count = many(self.ratio, tokens.shape[1])
        if count == 0:
            return self.whole.recalled(kept["output"])
        chosen = self._chosen(call, slot, kept, count)
        output = put(kept["output"], chosen, _run_on(call, take(tokens, chosen)))
        now = {"output": kept["output"] if self.whole.outlined else output}
        if self.whole.tracked:
            now["since"] = kept["since"].scatter(1, chosen, self.whole.age)
        slot.put(now, call)
        return output

    def _chosen(self, call: Call, slot: Slot, kept: Mapping[str, Tensor], count: int) -> Tensor:
        """The tokens that need it most, (B, count); a projection takes those that the MLP before it chose.

        They stay in their order: where all are chosen, text is still before the picture.
        """
        handed = f"chosen {self.whole.block}"
        chosen: Tensor | None
        if call.site.kind is Kind.PROJECTION:
            chosen = call.notes.pop(handed, None)  # of this step; what an earlier one left would be another choice
            if chosen is None:
                raise ValueError(f"{call.method}: another method stopped the MLP of {call.site}; take one of the two.")
            return chosen
        chosen = highest(self._scores(call, slot, kept["since"]), count).sort(1).values
        if call.site.kind is Kind.EXPANSION:
            call.notes[handed] = chosen
        return chosen

    def _scores(self, call: Call, slot: Slot, since: Tensor) -> Tensor:
        """S of the paper, (B, N): the base score, the weighted age, and the bonus for the best of every cell."""
        method, fixed = call.method, call.method.constants
        if method.score == "norm":
            base = normalised(call.tokens.float().norm(dim=-1))
        elif method.score == "random":
            base = _random(call, since)
        else:
            base = slot.beside(f"score {self.whole.block}").value
        if base is None:
            raise ValueError(
                f"{method}: another method reused the attention that tells the scores of tokens at the last full step; "
                "let it compute there, or use score='norm'."
            )
        if base.shape[1] != (count := since.shape[1]):  # of text and picture together, the text first
            base = base[:, :count] if call.site.text else base[:, -count:]
        if fixed.shared and call.branches is not None:
            base = call.branches.mean(base).repeat(len(call.branches.roles), 1)
        reused = self.whole.age - 1 - since  # steps in which a token was reused since it was computed
        scores = base + method.frequency_weight * reused / method.interval
        return favour(scores, grid_of(scores.shape[1], method.grid), fixed.cell, fixed.bonus) if fixed.bonus else scores

    @property
    def reads(self) -> bool:
        """Always: the chosen tokens are kept anew."""
        return True

    @property
    def hollow(self) -> bool:
        """Where the shape alone was kept."""
        return self.whole.outlined

    def fresh(self) -> Decision:
        """Run on all tokens, and keep."""
        return self.whole

    def share(self) -> float:
        """Nothing of the whole; see `extra`."""
        return 0.0

    def extra(self, unit: Unit, samples: int) -> Macs:
        """The chosen tokens' part; the text's keys and values are projected whatever is chosen."""
        count = many(self.ratio, unit.tokens)
        if count == 0:
            return Macs()
        text = unit.part("to_k", "to_v") if unit.attended and unit.attended.text else Macs()
        spent = text + (unit.macs - text).times(count / unit.tokens)
        return spent.times(self.whole.branches * samples)


def _run_on(call: Call, tokens: Tensor) -> Tensor:
    """Run on other tokens, every other argument as it is."""
    if call.args:
        output: Tensor = call.forward(tokens, *call.args[1:], **call.kwargs)
    else:
        output = call.forward(**call.kwargs | {"hidden_states": tokens})
    return output


def _random(call: Call, like: Tensor) -> Tensor:
    """The same for all rows, and for every run."""
    generator = torch.Generator().manual_seed(call.step.index * 1009 + (call.site.block or 0))
    return torch.rand(1, like.shape[1], generator=generator).to(like.device).expand(like.shape[0], -1)
