"""Which pairs of methods compose on which family: attached and run on the tiny pipelines.

`python tests/compositions.py` rewrites `docs/compositions.md`; a test compares. Only what is between the marks is
written.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import PyramidAttentionBroadcastConfig
from pipelines import build, run
from test_nag import text
from torch import Tensor

import whenwhere
from whenwhere import Method, attach, decision
from whenwhere.decisions import refresh

PAGE = Path(__file__).parent.parent / "docs" / "compositions.md"
MARKED = re.compile(r"(<!-- composes: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

FAMILIES = ("sd-deep", "svd", "pixart-sigma", "dit", "hunyuan-dit", "latte", "sd3", "flux")

UNTOLD = ("dit", "pixart-sigma")  # whose pipelines do not say that they guide

METHODS: tuple[Method, ...] = (
    whenwhere.TGate(3, sp_interval=2, warm_up=0),
    whenwhere.AdaptiveTGate(2.0, 2, 4),
    whenwhere.CrossAttentionFreeze(3),
    whenwhere.TextStreamFreeze(3),
    whenwhere.GuidanceStop(3),
    whenwhere.DeepCache(3),
    whenwhere.FORA(3),
    whenwhere.DeltaDiT(interval=2, blocks=1),
    whenwhere.SkipCache(2, 1, 900, 100),
    whenwhere.FasterDiffusion(every=3, alpha=0),
    whenwhere.ToCa(3),
    whenwhere.Upstream(PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)),
    whenwhere.NAG(scale=5.0),
)

SUITED = {  # settings of a family's own
    ("flux", "ToCa"): whenwhere.ToCa(3, 0.3, schedule="flux"),
    ("flux", "NAG"): whenwhere.NAG(scale=5.0, negative_prompt_embeds=text("flux")),
}


@dataclass(frozen=True)
class Outcome:
    """What becomes of methods on a pipeline: a sign for the table, and why, where there is something to say."""

    sign: str
    reason: str = ""


@contextmanager
def poisoned() -> Iterator[None]:
    """What a skipped site hands on for its shape alone is no number, so that whoever reads it is found out."""

    def room(tensor: Tensor) -> Tensor:
        return torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)

    with patch.object(decision, "room", room), patch.object(refresh, "room", room):
        yield


def name(method: Method) -> str:
    return type(method).__name__


def outcome(case: str, methods: Sequence[Method]) -> Outcome:
    """Attach and run; what was planned must be what was done, unless it is decided while running."""
    pipe = _pipe(case)
    methods = [SUITED.get((case, name(method)), method) for method in methods]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with poisoned(), attach(pipe, *methods, guidance=True if case in UNTOLD else None) as attachment:
                latents = run(case, pipe)
                trace, plan = attachment.trace, attachment.plan
        except ValueError as error:
            return Outcome("refused", _first_sentence(str(error)))
        except Exception as error:
            return Outcome("**fails**", f"{type(error).__name__}: {_first_sentence(str(error))}")
    if not latents.isfinite().all():
        return Outcome("**fails**", "the latents are not finite")
    if trace.rows != plan.rows and not any(method.adaptive or method.observes for method in methods):
        return Outcome("**fails**", "what was done is not what was planned")
    idle = any("changed nothing" in str(warning.message) for warning in said)
    return Outcome("idle" if idle else "yes")


@cache
def _pipe(case: str):
    return build(case)


def _first_sentence(text: str) -> str:
    text = _without_fields(text)
    return re.split(r"(?<=[a-z)])[.;] ", text)[0].rstrip(".")


def _without_fields(text: str) -> str:
    """Methods in a message by their names alone."""
    for known in map(name, METHODS):
        while (start := text.find(f"{known}(")) >= 0:
            end, depth = start + len(known), 0
            for end in range(start + len(known), len(text)):
                depth += (text[end] == "(") - (text[end] == ")")
                if depth == 0:
                    break
            text = text[: start + len(known)] + text[end + 1 :]
    return text


def table(case: str) -> str:
    """One family's methods against each other, the row attached first, with reasons below."""
    alone = {method: outcome(case, (method,)) for method in METHODS}
    fitting = [method for method in METHODS if alone[method].sign in ("yes", "idle")]
    reasons: list[str] = []
    cells = {pair: _cell(outcome(case, pair), reasons) for pair in combinations(fitting, 2)}
    lines = ["| | " + " | ".join(map(name, fitting[1:])) + " |", "|---|" + "---|" * (len(fitting) - 1)]
    for i, row in enumerate(fitting[:-1]):
        found = [cells[row, column] if j > i else "" for j, column in enumerate(fitting) if j > 0]
        lines.append(f"| {name(row)} | " + " | ".join(found) + " |")
    lines += ["", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1)), ""] if reasons else [""]
    without = [f"{name(method)} ({alone[method].reason})" for method in METHODS if method not in fitting]
    return "\n".join([*lines, "Not on this family: " + "; ".join(without) + "."] if without else lines)


def _cell(found: Outcome, reasons: list[str]) -> str:
    if not found.reason:
        return found.sign
    if found.reason not in reasons:
        reasons.append(found.reason)
    return f"{found.sign} ({reasons.index(found.reason) + 1})"


def refreshed(page: str, cases: Sequence[str] = FAMILIES) -> str:
    """The text of the page with the tables of some families anew."""

    def anew(found: re.Match[str]) -> str:
        opening, case, closing = found.groups()
        return f"{opening}{table(case)}\n{closing}" if case in cases else found[0]

    return MARKED.sub(anew, page)


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
