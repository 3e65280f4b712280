"""T-GATE and its parts where guidance is a second call of the denoiser: the mean of both, then one call for both."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from naive import Gate, distance, rows_seen
from pipelines import build, run
from torch import Tensor, nn

from whenwhere import AdaptiveTGate, CrossAttentionFreeze, GuidanceStop, TGate, attach, plan

GATES = [Gate(1), Gate(3), Gate(4, k=3, w=0), Gate(2, f=3, w=0), Gate(5, k=2, f=2, w=1)]


class Calls:
    """Which evaluation it is, and which of its two calls; the conditional one comes first."""

    def __init__(self) -> None:
        self.begun = 0

    @property
    def now(self) -> tuple[int, int]:
        return divmod(self.begun - 1, 2)


@contextmanager
def gated_by_hand(model: nn.Module, gate: Gate, anchor: str) -> Iterator[None]:
    """T-GATE by replaced forwards and two counters; what the second call is answered with is what the first gave."""
    calls, answer = Calls(), []
    modules = {name: m for name, m in model.named_modules() if name.endswith((".attn1", ".attn2"))}
    whole = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.begun += 1
        s, second = calls.now
        if second and s >= gate.m:
            return answer[-1]
        answer.append(whole(*args, **kwargs))
        return answer[-1]

    model.forward = forward
    for name, module in modules.items():
        module.forward = replacement(module.forward, name.endswith("attn2"), gate, anchor, calls)
    try:
        yield
    finally:
        for module in (model, *modules.values()):
            del module.forward


def replacement(original: Callable[..., Tensor], crossed: bool, gate: Gate, anchor: str, calls: Calls):
    stored: dict[Any, Tensor] = {}

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        s, second = calls.now
        action = gate.actions(s)[0 if crossed else 1]
        place = second if s < gate.m - 1 else "kept"
        if action == "reuse":
            return stored[place]
        y = original(*args, **kwargs)
        if action == "store" or (action == "average" and not second):
            stored[place] = y
        elif action == "average":
            c, u = stored[place], y
            stored[place] = {"mean": (c + u) / 2, "cond": c, "uncond": u}[anchor if crossed else "mean"]
        return y

    return forward


@pytest.mark.parametrize(
    ("gate", "anchor"), [*((gate, "mean") for gate in GATES), (GATES[0], "cond"), (GATES[0], "uncond")], ids=str
)
def test_a_loop_by_hand_agrees(gate, anchor):
    pipe = build("wan")
    with gated_by_hand(pipe.transformer, gate, anchor):
        expected = run("wan", pipe, prompts=2)
    with attach(pipe, TGate(gate.m, gate.k, gate.f, gate.w, anchor)) as attachment:
        latents = run("wan", pipe, prompts=2)
    assert distance(latents, expected) <= 1e-6
    assert distance(latents, run("wan", pipe, prompts=2)) > 1e-4
    assert attachment.trace.rows == attachment.plan.rows
    assert attachment.trace.held == attachment.trace.cost.bytes


def test_guidance_is_dropped_at_the_gate():
    pipe = build("wan")
    branches = rows_seen(pipe.transformer.blocks[0].attn1.to_q)
    crossed = rows_seen(pipe.transformer.blocks[0].attn2.to_q)
    with attach(pipe, TGate(gate_step=4, sp_interval=1)) as attachment:
        run("wan", pipe)
    assert (len(branches), len(crossed)) == (2 * 4 + 2, 2 * 4)
    assert dict(attachment.trace.groups) == {
        "model": "#########.#.",
        "self-attention x3": "######### # ",
        "cross-attention x3": "########. . ",
    }


def test_without_guidance_there_is_one_call_and_nothing_is_averaged():
    pipe = build("wan")
    with attach(pipe, TGate(gate_step=2, sp_interval=1)) as attachment:
        latents = run("wan", pipe, guidance=False)
    with attach(pipe, CrossAttentionFreeze(2)):
        assert torch.equal(run("wan", pipe, guidance=False), latents)
    assert dict(attachment.trace.groups)["model"] == "######"


def test_frozen_means_and_stopped_guidance_are_t_gate():
    pipe = build("wan")
    with attach(pipe, TGate(3, sp_interval=1)):
        gated = run("wan", pipe)
    with attach(pipe, CrossAttentionFreeze(3, "mean"), GuidanceStop(3)):
        assert torch.equal(run("wan", pipe), gated)
    with attach(pipe, CrossAttentionFreeze(3, "each"), GuidanceStop(3)):
        assert distance(run("wan", pipe), gated) > 1e-5


def test_a_frozen_mean_serves_both_calls():
    pipe = build("wan")
    seen: list[Tensor] = []
    pipe.transformer.blocks[1].attn2.register_forward_hook(lambda *call: seen.append(call[-1]))
    with attach(pipe, CrossAttentionFreeze(2, "mean")):
        run("wan", pipe, steps=4)
    assert len(seen) == 8
    assert all(torch.equal(later, (seen[2] + seen[3]) / 2) for later in seen[4:])


def test_a_second_network_begins_with_its_own_cross_attention():
    pipe = build("wan-two")  # the second network has all but the first two of six steps
    crossed = rows_seen(pipe.transformer_2.blocks[0].attn2.to_q)
    with attach(pipe, TGate(gate_step=1, sp_interval=1)):
        run("wan-two", pipe)
    assert len(crossed) == 1


def test_a_gate_that_decides_refuses_separate_calls_and_names_what_fits():
    pipe = build("wan")
    plain = run("wan", pipe)
    words = "guides by separate calls of its denoiser. TGate works on it"
    with pytest.raises(ValueError, match=words):
        plan(pipe, AdaptiveTGate(), steps=6)
    with attach(pipe, AdaptiveTGate(0, 2, 3)):
        with pytest.raises(ValueError, match=words):
            run("wan", pipe)
        assert run("wan", pipe, guidance=False).isfinite().all()
    assert torch.equal(run("wan", pipe), plain)
