"""Rewrite what the pages quote from the library: `python docs/refresh.py`.

Between `<!-- prints: EXPRESSION -->` and `<!-- end -->` stands what the expression prints, evaluated with the public
names of whenwhere and `ddim(steps)`, a DDIMScheduler whose timesteps are set; for language models with `lm`, a tiny
Llama with random weights, `tiny(routing)`, its tokenizer, `words`, and a `sentence`. Between `<!-- rows: NAME -->` and
`<!-- end -->` stand the published multiply-adds of `tests/published.py` called NAME, beside the planned ones. Between
`<!-- families: all -->` and `<!-- end -->` stands the table of families, and for `architectures` that of networks.
"""

import re
import sys
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

import whenwhere
from whenwhere import architectures, lm
from whenwhere.families import FAMILIES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import published  # noqa: E402
import tiny_language  # noqa: E402

MARKED = re.compile(r"(<!-- (prints|rows|families|architectures): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
SEPARATE = ", in separate calls"
UNITS = {"T": published.TERA, "G": published.GIGA}


def refreshed(page: str) -> str:
    """The text of a page with all quotations anew."""
    return MARKED.sub(_quotation, page)


def _quotation(found: re.Match[str]) -> str:
    opening, kind, what, closing = found.groups()
    if kind in ("families", "architectures"):
        text = _families() if kind == "families" else _architectures()
    else:
        text = _printed(what) if kind == "prints" else _table(getattr(published, what))
    return f"{opening}{text}\n{closing}"


def _printed(expression: str) -> str:
    with published.built_and_priced_once():
        text = str(eval(expression, vars(whenwhere) | HELPERS))
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return f"```python\n>>> print({expression})\n```\n\n```text\n{lines}\n```"


def _ddim(steps: int) -> DDIMScheduler:
    """A scheduler for methods that go by timesteps."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


def _tiny(routing: lm.Routing) -> Any:
    """A routed Llama of eight layers, whose weights are the same every time."""
    return tiny_language.routed(routing, num_hidden_layers=8)


HELPERS = {
    "ddim": _ddim,
    "lm": lm,
    "tiny": _tiny,
    "words": tiny_language.words(),
    "sentence": tiny_language.SENTENCE,
}


def _families() -> str:
    lines = ["| denoiser | roles of a guidance batch | sites | long skips |", "|---|---|---|---|"]
    for family in FAMILIES:
        roles = " | ".join(
            (f"`{family.model}`", ", ".join(family.passes or family.roles) + bool(family.passes) * SEPARATE)
        )
        kinds = ", ".join(dict.fromkeys(part.kind for part in family.parts if part.path))
        skips = "mirrored blocks" if family.mirrored else "U-Net" if any(p.rung for p in family.parts) else ""
        lines.append(f"| {roles} | {kinds} | {skips} |")
    return "\n".join(lines)


def _architectures() -> str:
    lines = ["| name | denoiser | steps | guidance | published at |", "|---|---|---|---|---|"]
    separate = {family.model for family in FAMILIES if family.passes}
    for row in map(architectures.architecture, architectures.names()):
        guidance = "separate calls" if row.model in separate else "one batch"
        guidance = guidance if row.guided else "distilled"
        page = row.source.partition(": ")[0]
        lines.append(f"| `{row.name}` | `{row.model}` | {row.steps} | {guidance} | <{page}> |")
    return "\n".join(lines)


def _table(rows: tuple[published.Row, ...]) -> str:
    explained = any(row.reason for row in rows)
    lines = [
        "| source | network | steps | setting | published | planned | difference |" + " why |" * explained,
        "|---|---|---|---|---|---|---|" + "---|" * explained,
    ]
    return "\n".join([*lines, *(_line(row) for row in rows)])


def _line(row: published.Row) -> str:
    number, unit = row.figure.split()
    places = len(number.partition(".")[2])
    planned = f"{row.planned / UNITS[unit]:.{places}f} {unit}"
    difference = f"{100 * (row.planned / row.value - 1):+.3f} %"
    cells = [row.table, row.architecture, str(row.steps), f"`{row.setting}`", row.figure, planned, difference]
    return f"| {' | '.join(cells + [row.reason] * bool(row.reason))} |"


if __name__ == "__main__":
    for path in sorted((ROOT / "docs").rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        path.write_text(refreshed(page), encoding="utf-8")
