"""Negative prompts on the emoji models: what each way of giving them takes away and leaves, in 20, 4 and 1 steps.

Pairs of prompt and negative text, and what is read from the pictures, are in `emoji_pairs.py`. Intervals are bootstraps
over pairs. Rows that are in the output file already are not run again, but for those that new ones are compared with.

    python benchmarks/nag_emoji.py emoji-unet emoji-pixart --out docs/results/nag-emoji.json
    python benchmarks/nag_emoji.py --sheet docs/images/nag-emoji.png emoji-unet
    python benchmarks/nag_emoji.py --table docs/results/nag-emoji.json
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from emoji_pairs import Judge, Pair, pairs
from torch import Tensor

from whenwhere import plan
from whenwhere.bench.drawing import attached, draw
from whenwhere.bench.environment import Environment
from whenwhere.bench.intervals import Case, Interval, Numbers, bootstrap, mean
from whenwhere.bench.model import open_model
from whenwhere.expression import parse
from whenwhere.picture import Column, as_image, draw_sheet

NAG_SCALES, NASA_SCALES, VSF_SCALES = (3, 5, 9), (0.5, 0.75), (1, 2)
CFG_SCALES = (1.5, 3)
BATCH = 33
SHOWN = (7, 8, 12, 24, 30, 40, 44, 53, 62)  # pairs of the sheet


@dataclass(frozen=True)
class Cell:
    """One setting: a model, its steps, and how the negative text is given."""

    model: str
    steps: int
    guidance: float  # of the pipeline; 1 is none
    method: str = ""  # an expression, {} for the negative text
    negative: bool = False  # whether the pipeline's own guidance gets the negative text

    @property
    def label(self) -> str:
        """What the table calls it."""
        own = f"CFG {self.guidance:g}" if self.guidance > 1 else "none"
        own += " with negative" if self.negative else ""
        method = self.method.replace(", negative_prompt={}", "")
        return method if own == "none" and method else f"{own} + {method}" if method else own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="*", help="names of the zoo; their students are called NAME-lcm")
    parser.add_argument("--pairs", type=int, default=22, help="of each kind")
    parser.add_argument("--seeds", type=int, default=2, help="of each pair")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/nag-emoji.json"))
    parser.add_argument("--sheet", type=Path, help="draw some pairs, and end")
    parser.add_argument("--table", type=Path, help="print the table of a finished run, and end")
    args = parser.parse_args()
    if args.sheet:
        show(args).save(args.sheet, optimize=True)
        return
    if not args.table:
        run(args)
    print(table(json.loads((args.table or args.out).read_text(encoding="utf-8"))["rows"]))


def cells(teacher: str) -> Iterator[Cell]:
    """All settings of a model and its student, the plain ones first."""
    yield Cell(teacher, 20, 3)
    yield Cell(teacher, 20, 3, negative=True)
    yield Cell(teacher, 20, 3, nag(5))
    for steps in (4, 1):
        yield Cell(f"{teacher}-lcm", steps, 1)
        yield from (Cell(f"{teacher}-lcm", steps, guidance, negative=True) for guidance in CFG_SCALES)
        yield from (Cell(f"{teacher}-lcm", steps, 1, method) for method in operators())


def nag(scale: float) -> str:
    return f"NAG(scale={scale:g}, negative_prompt={{}})"


def operators() -> list[str]:
    return [
        *map(nag, NAG_SCALES),
        *(f"NASA(phi={phi:g}, negative_prompt={{}})" for phi in NASA_SCALES),
        *(f"VSF(scale={scale:g}, negative_prompt={{}})" for scale in VSF_SCALES),
    ]


def run(args: argparse.Namespace) -> None:
    """Run what is not there yet; the file is written after every row."""
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": asdict(Environment.here(torch.device(args.device))),
        "rows": [],
    }
    if args.out.exists():
        report = json.loads(args.out.read_text(encoding="utf-8"))
    done = {json.dumps([row["cell"], row["pictures"]], sort_keys=True) for row in report["rows"]}
    chosen, judge = pairs(args.pairs), Judge()
    for teacher in args.teachers:
        plain: dict[tuple[str, int], dict[str, dict[Case, float]]] = {}
        new = [
            c for c in cells(teacher) if json.dumps([asdict(c), len(chosen) * args.seeds], sort_keys=True) not in done
        ]
        wanting = {(cell.model, cell.steps) for cell in new}
        for cell in cells(teacher):
            group = cell.model, cell.steps
            if cell not in new and (group not in wanting or group in plain):
                continue
            pipe = open_model(cell.model, args.device, "float32").pipeline
            began = time.perf_counter()
            pictures = torch.stack([paint(pipe, cell, chosen, seed) for seed in range(args.seeds)], dim=1)
            seconds = time.perf_counter() - began
            columns = judge(chosen, pictures)
            base = plain.setdefault(group, columns)
            methods = parse(cell.method.format("'red'")) if cell.method else ()
            cost = plan(pipe, *methods, steps=cell.steps, guidance=cell.guidance > 1).cost
            assert cost is not None
            row = {
                "cell": asdict(cell),
                "label": cell.label,
                **summary(chosen, columns, base),
                "pictures": len(chosen) * args.seeds,
                "seconds": round(seconds, 1),
                "MACs": cost.macs.all,
            }
            report["rows"] = [old for old in report["rows"] if old["cell"] != asdict(cell)] + [row]
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(cell.model, cell.steps, cell.label, entry(row["all"]), f"{seconds:.0f} s", flush=True)


def paint(pipe: Any, cell: Cell, chosen: list[Pair], seed: int) -> Tensor:
    """One picture (P, 3, H, W) in [0, 1] of every pair."""
    drawn = []
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        negatives = tuple(pair.negative for pair in part)
        methods = list(parse(cell.method.format(negatives))) if cell.method else []
        seeds = range(1000 * seed + start, 1000 * seed + start + len(part))
        with attached(pipe, methods, cell.guidance):
            prompts = [pair.prompt for pair in part]
            drawn.append(draw(pipe, prompts, seeds, cell.steps, cell.guidance, negatives if cell.negative else ""))
    return torch.cat(drawn)


def difference(new: Numbers, old: Numbers) -> Numbers:
    return mean(new) - mean(old)


def summary(
    chosen: list[Pair], columns: dict[str, dict[Case, float]], base: dict[str, dict[Case, float]]
) -> dict[str, dict[str, Any]]:
    """Means, and differences to the plain setting of the same model and steps, of all pairs and of each kind."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("all", *dict.fromkeys(pair.kind for pair in chosen)):
        labels = {pair.label for pair in chosen if kind in ("all", pair.kind)}
        found[kind] = {}
        for name, column in columns.items():
            own = {case: value for case, value in column.items() if case[0] in labels}
            old = {case: base[name][case] for case in own}
            value, change = bootstrap(mean, own), bootstrap(difference, own, old)
            found[kind][name] = {**rounded(value), "change": rounded(change)}
    return found


def rounded(interval: Interval) -> dict[str, float | None]:
    return {key: None if value is None else round(value, 4) for key, value in asdict(interval).items()}


def show(args: argparse.Namespace) -> Any:
    """A sheet of some pairs: none, the teacher's guidance, and NAG in four steps and in one."""
    every, columns = pairs(args.pairs), []
    chosen = [every[number] for number in SHOWN]
    for teacher in args.teachers:
        student = f"{teacher}-lcm"
        shown = {
            f"{teacher}: none": Cell(teacher, 20, 3),
            "CFG 3 with negative": Cell(teacher, 20, 3, negative=True),
            "student, 4 steps": Cell(student, 4, 1),
            "NAG, 4 steps": Cell(student, 4, 1, nag(5)),
            "student, 1 step": Cell(student, 1, 1),
            "NAG, 1 step": Cell(student, 1, 1, nag(5)),
        }
        for number, (heading, cell) in enumerate(shown.items()):
            pipe = open_model(cell.model, args.device, "float32").pipeline
            columns.append(Column(heading, [*map(as_image, paint(pipe, cell, chosen, 0))], apart=not number))
    return draw_sheet(columns, [pair.label for pair in chosen], "prompt - negative text", edge=64.0)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for every model, number of steps and setting, the plain one first."""
    lines = [
        "| model, steps | setting | MACs | word: gone, kept, both | style | colour | both, of all |",
        "|---" * 7 + "|",
    ]
    groups = list(dict.fromkeys((row["cell"]["model"], row["cell"]["steps"]) for row in rows))

    def place(row: dict[str, Any]) -> tuple[int, bool]:
        cell = row["cell"]
        return groups.index((cell["model"], cell["steps"])), bool(cell["method"] or cell["negative"])

    for row in sorted(rows, key=place):
        kinds = " | ".join(shares(row[kind]) for kind in ("word", "style", "colour"))
        model, macs = f"{row['cell']['model']}, {row['cell']['steps']}", f"{row['MACs'] / 1e6:,.0f} M"
        lines.append(f"| {model} | {row['label']} | {macs} | {kinds} | {entry(row['all'])} |")
    return "\n".join(lines)


def shares(found: dict[str, Any]) -> str:
    return ", ".join(f"{found[name]['value']:.0%}" for name in ("gone", "kept", "both"))


def entry(found: dict[str, Any]) -> str:
    """A share with its interval, in per cent."""
    both = found["both"]
    return f"**{both['value']:.0%}** ({100 * both['low']:.0f} to {both['high']:.0%})"


if __name__ == "__main__":
    main()
