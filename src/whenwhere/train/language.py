"""A plain training loop for language models, dense or routed, that ends with its steps or its budget of seconds.

AdamW in the groups that routed models want, a learning rate on a cosine, random windows of one long text. A run saves
itself and goes on where it stopped.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..lm import Note, parameter_groups, routing_loss, set_step
from ..lm.tokens import Tokens
from .diffusion import precision, rate
from .files import append_row, save_whole

Prepare = Callable[[Any, Tensor, torch.Generator], None]  # the model, its batch (B, T)
Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]  # a batch and its labels, (B, T)
_SCALE = 1000  # β and its warm-up follow the run as if it had so many steps


@dataclass(frozen=True)
class LanguageConfig:
    """How long and how to train. The run ends with the budget or with the steps, whichever comes first."""

    budget: float  # seconds of wall-clock, over all resumed runs
    steps: float = math.inf  # optimiser steps
    batch_size: int = 16
    context: int = 128  # tokens of a window
    learning_rate: float = 2e-3
    network_rate: float = 2e-3  # of the routers' networks
    scalar_rate: float = 1e-2  # of the scalars of SDT and STT
    weight_decay: float = 0.1
    warm_up: float = 0.05  # share of the run in which the learning rate rises
    clip: float = 1.0  # largest norm of the gradient
    bfloat16: bool = False  # autocast; weights and the optimiser stay in float32
    log_every: int = 10  # steps
    save_every: float = 60.0  # seconds
    seed: int = 0


@dataclass
class LanguageState:
    """One run, changed in place by the loop."""

    model: Any
    config: LanguageConfig
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    optimiser: torch.optim.AdamW = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        groups = parameter_groups(self.model, c.learning_rate, c.network_rate, c.scalar_rate, c.weight_decay)
        for group in groups:
            group["peak"] = group["lr"]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.generator = torch.Generator().manual_seed(c.seed)

    @property
    def progress(self) -> float:
        """The share of the run that is over, in [0, 1] or a little more."""
        return max(self.seconds / self.config.budget, self.step / self.config.steps)

    def save(self, path: Path) -> None:
        """Write the run to one file."""
        numbers = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        states = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        save_whole(numbers | states | {"generator": self.generator.get_state()}, path)

    def load(self, path: Path) -> None:
        """Go back to what `save` wrote; the model must have the same shape."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.generator.set_state(saved["generator"])
        self.step, self.tokens, self.seconds = saved["step"], saved["tokens"], saved["seconds"]


def learn_language(
    model: Any,
    ids: Tensor | Draw,
    config: LanguageConfig,
    out: Path,
    *,
    prepare: Prepare | None = None,
    tell: Callable[[str], object] = print,
    clock: Callable[[], float] = time.monotonic,
) -> LanguageState:
    """Train until the budget is used or the steps are done; continues from `out/state.pt`, appends to `out/loss.jsonl`.

    Args:
        model: dense or routed; parameters without gradient stay as they are.
        ids: (N,), the text as token numbers; or what draws a batch, whose labels are -100 where nothing is asked for.
        config: how.
        out: a directory, made if missing.
        prepare: called before every step.
        tell: is given a line now and then.
        clock: seconds.

    Raises:
        ValueError: the text is shorter than a window.
    """
    if isinstance(ids, Tensor) and len(ids) <= config.context:
        raise ValueError(f"the text has {len(ids)} tokens, a window {config.context}; give more text.")
    out.mkdir(parents=True, exist_ok=True)
    state, checkpoint = LanguageState(model, config), out / "state.pt"
    if checkpoint.exists():
        state.load(checkpoint)
    model.train()
    since, saved, losses = clock() - state.seconds, state.seconds, []
    while state.progress < 1:
        losses.append(_advance(state, ids, prepare))
        state.seconds = clock() - since
        if state.step % config.log_every == 0:
            tell(_record(out / "loss.jsonl", state, sum(losses) / len(losses)))
            losses.clear()
        if state.seconds - saved >= config.save_every:
            state.save(checkpoint)
            saved = state.seconds
    state.save(checkpoint)
    model.eval()
    return state


def _advance(state: LanguageState, ids: Tensor | Draw, prepare: Prepare | None) -> float:
    """One optimiser step; returns the loss of the language alone."""
    model, config, progress = state.model, state.config, min(state.progress, 1.0)
    if isinstance(ids, Tensor):
        batch = labels = windows(ids, config.batch_size, config.context, state.generator).to(model.device)
    else:
        batch, labels = (drawn.to(model.device) for drawn in ids(state.generator))
    routed = hasattr(model, "routing")
    if routed:
        set_step(model, round(progress * _SCALE), _SCALE)
    if prepare is not None:
        prepare(model, batch, state.generator)
    with precision(model.device.type, config.bfloat16):
        loss = model(input_ids=batch, labels=labels).loss
        loss.backward()
    own = loss.detach() - routing_loss(model).detach() if routed else loss.detach()
    parameters = [parameter for group in state.optimiser.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    for group in state.optimiser.param_groups:
        group["lr"] = group["peak"] * rate(progress, config.warm_up)
    state.optimiser.step()
    state.optimiser.zero_grad()
    state.step += 1
    state.tokens += batch.numel()
    return float(own.item())


def windows(ids: Tensor, rows: int, context: int, generator: torch.Generator) -> Tensor:
    """Windows (rows, context) from random places of a text (N,)."""
    starts = torch.randint(len(ids) - context + 1, (rows,), generator=generator)
    found: Tensor = ids[starts[:, None] + torch.arange(context)]
    return found


def shift(notes: Mapping[int, Note]) -> float | None:
    """corr(u, CE) - corr(u, CU) over the tokens of every text, the mean of texts and routed layers.

    Above 0 the scores follow expected change, below 0 unexpected change; `None` where there is no surprise.
    """
    found = [
        _correlation(note.score, note.details["expected"]) - _correlation(note.score, note.details["unexpected"])
        for note in notes.values()
        if note.score is not None and "expected" in note.details
    ]
    return float(torch.stack(found).mean().item()) if found else None


def staying(model: Any) -> dict[str, float]:
    """By criterion, "expected" and "unexpected", the share of selected tokens that it alone would have selected.

    Of the last call; the mean of texts and routed layers. Both are near the capacity where a criterion says nothing
    about the selection, and 1 where it makes it; the other criterion could then be removed. Empty without surprise.
    """
    found: dict[str, list[Tensor]] = {"expected": [], "unexpected": []}
    for note in model.notes.values():
        for criterion, shares in found.items():
            if criterion in note.details:
                values = note.details[criterion]
                always = model.routing.always(Tokens(values, values, None, model.call.rank, None))
                shares.append(_kept(values, note.mask, always))
    return {criterion: float(torch.stack(shares).mean()) for criterion, shares in found.items() if shares}


def _kept(values: Tensor, mask: Tensor, always: Tensor | None) -> Tensor:
    """The share of the selected tokens (B, T) that are among as many highest values; the mean over the texts."""
    values = values if always is None else values.masked_fill(always, math.inf)
    alone = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < mask.sum(1, keepdim=True)
    return ((alone & mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over the tokens (B, T), the mean over the texts."""
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (a, b))
    lengths: Tensor = a.norm(dim=1) * b.norm(dim=1)
    return ((a * b).sum(1) / lengths.clamp(min=1e-12)).mean()


def _record(path: Path, state: LanguageState, loss: float) -> str:
    """Append one JSON line: step, tokens, seconds, the mean loss since the last line, both halves of the shift."""
    row = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1), "loss": round(loss, 5)}
    if hasattr(state.model, "routing"):
        moved = shift(state.model.notes)
        row |= {} if moved is None else {"shift": round(moved, 5)}
        row |= {f"{criterion} alone": round(share, 5) for criterion, share in staying(state.model).items()}
    append_row(row, path)
    return f"step {state.step}  {state.tokens} tokens  {state.seconds:.0f} s  loss {loss:.4f}"
