"""Decisions that stop the text's stream through a transformer in which text and image share one attention.

There the image attends to keys and values of the text that every block makes anew, from a stream of its own. If they
are kept, nothing of that stream is needed any more: its projections, its output and its MLP are left out, and image
queries attend to the present image and to the text as it was. Projections are tapped for the length of one call, so no
block and no processor is copied. Text tokens still ask in the attention, to no purpose: its two products are spent.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..anatomy import Role
from ..decision import Call, Compute, Decision, Output, Slot
from ..pricing.unit import Macs, Unit
from ..taps import Forward, Tap, projections, tapped
from .branches import each_branch

_ALONE = "computed for the image alone"
# Of a block that has weights of its own for the text, and of one that has not.
_DOUBLE, _SINGLE = ("add_k_proj", "add_v_proj", "to_added_qkv"), ("to_k", "to_v", "to_qkv")


@dataclass(frozen=True, slots=True)
class KeepText(Decision):
    """Run a joint attention and keep the text's keys and values, (R, T, D) each, of every guidance branch."""

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run, remember."""
        kept: dict[str, Tensor] = {}
        attn = _attention(call)
        names, text = (_DOUBLE, None) if _double(attn) else (_SINGLE, call.notes["text"])

        def note(name: str) -> Tap:
            def tap(original: Forward) -> Forward:
                def forward(tokens: Tensor) -> Tensor:
                    output: Tensor = original(tokens)
                    kept.setdefault(name, output[:, :text])  # of the first run, where guidance adds another
                    return output

                return forward

            return tap

        with tapped({module: note(name) for name, module in projections(attn, *names).items()}):
            output = call.run()
        slot.put(each_branch.of(kept, call.branches), call, each_branch.folds_by(call.branches))
        if call.branches is None:
            slot.memory.unsettled.append((slot, each_branch, call))
        return output

    @property
    def keeps(self) -> bool:
        """Always."""
        return True

    def bare(self) -> Decision:
        """Run, nothing else."""
        return Compute()

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:
        """Keys and values; with fused projections the queries too."""
        assert unit.attended is not None
        fused = any(name in unit.parts for name in ("to_added_qkv", "to_qkv"))
        return (3 if fused else 2) * unit.attended.text * unit.attended.width * unit.itemsize * branches * samples


@dataclass(frozen=True, slots=True)
class FrozenText(Decision):
    """Run a joint attention for the image, with the keys and values of the text that are kept."""

    symbol: ClassVar[str] = "i"
    name: ClassVar[str] = _ALONE
    recalls: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall, run."""
        roles = (Role.CONDITIONAL,) if call.branches is None else call.branches.roles
        value = slot.get(replace(call, args=(call.tokens[: len(call.tokens) // len(roles)],)))
        kept = {name: torch.cat([value[role][name] for role in roles]) for name in value[roles[0]]}
        attn = _attention(call)
        with tapped(_double_taps(attn, kept) if _double(attn) else _single_taps(attn, kept)):
            return call.run()

    def fresh(self) -> Decision:
        """Run and keep."""
        return KeepText()

    def saved(self, unit: Unit) -> Macs:
        """The text's projections."""
        own = unit.part("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv", "to_add_out")
        return own if own.all else _text_share(unit, "to_q", "to_k", "to_v", "to_qkv")


@dataclass(frozen=True, slots=True)
class LeaveOut(Decision):
    """Give nothing instead of running the text's MLP: zeros that occupy one number."""

    symbol: ClassVar[str] = "-"
    name: ClassVar[str] = "left out"
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """The input's shape is the output's."""
        return call.tokens.new_zeros(()).expand(call.tokens.shape)


@dataclass(frozen=True, slots=True)
class TextBlock(Decision):
    """Run a block and tell its attention how many tokens are text.

    Attributes:
        alone: whether what has one set of weights for both streams is run on the image's tokens alone.
    """

    alone: bool

    name: ClassVar[str] = _ALONE

    @property
    def symbol(self) -> str:  # type: ignore[override]
        """As the attention inside."""
        return FrozenText.symbol if self.alone else Compute.symbol

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Run."""
        assert call.module is not None
        text = call.notes["text"] = int(call.kwargs["encoder_hidden_states"].shape[1])
        shared = [getattr(call.module, name, None) for name in ("proj_mlp", "proj_out")]
        if not self.alone:
            return call.run()
        taps = {module: _image_only(text) for module in shared if isinstance(module, nn.Module)}
        with tapped({**taps, call.module.get_submodule("attn"): _once(call)}):
            return call.run()

    def saved(self, unit: Unit) -> Macs:
        """The text's share of projections that serve both streams."""
        return _text_share(unit, "proj_mlp", "proj_out") if self.alone else Macs()


def _attention(call: Call) -> Any:
    return call.module


def _double(attn: Any) -> bool:
    return getattr(attn, "added_kv_proj_dim", None) is not None


def _text_share(unit: Unit, *names: str) -> Macs:
    """The share of projections of both streams that is the text's."""
    sizes = unit.attended
    return unit.part(*names).times(sizes.text / sizes.queries) if sizes else Macs()


def _double_taps(attn: nn.Module, kept: dict[str, Tensor]) -> dict[nn.Module, Tap]:
    """Kept keys and values; queries and output of the text are zeros."""
    taps = {module: _given(kept[name]) for name, module in projections(attn, *_DOUBLE).items()}
    like = next(iter(kept.values()))
    queries = projections(attn, "add_q_proj") if "add_k_proj" in kept else {}
    taps |= {module: _given(torch.zeros_like(like)) for module in queries.values()}
    out = getattr(attn, "to_add_out", None)
    return taps | ({out: _zeros} if isinstance(out, nn.Module) else {})


def _single_taps(attn: nn.Module, kept: dict[str, Tensor]) -> dict[nn.Module, Tap]:
    """Kept keys and values before those of the image; queries of the text are zeros."""
    taps = {module: _before(kept[name]) for name, module in projections(attn, *_SINGLE).items()}
    queries = {} if "to_qkv" in kept else projections(attn, "to_q")
    return taps | {module: _before(torch.zeros_like(next(iter(kept.values())))) for module in queries.values()}


def _given(output: Tensor) -> Tap:
    return lambda _original: lambda _tokens: output


def _zeros(_original: Forward) -> Callable[[Tensor], Tensor]:
    return lambda tokens: tokens.new_zeros(()).expand(tokens.shape)


def _before(text: Tensor) -> Tap:
    return lambda original: lambda tokens: torch.cat([text, original(tokens[:, text.shape[1] :])], 1)


def _once(call: Call) -> Tap:
    """A tap that refuses a second run of the block, for another text."""
    seen: list[int] = []

    def tap(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if seen:
                raise ValueError(
                    f"{call.method}: another method runs the blocks for a second text, whose keys are not frozen; let "
                    f"it end before step {call.step.index}."
                )
            seen.append(call.step.index)
            return original(*args, **kwargs)

        return forward

    return tap


def _image_only(text: int) -> Tap:
    def tap(original: Forward) -> Forward:
        def forward(tokens: Tensor) -> Tensor:
            image: Tensor = original(tokens[:, text:])
            return torch.cat([image.new_zeros(len(image), text, image.shape[-1]), image], 1)

        return forward

    return tap
