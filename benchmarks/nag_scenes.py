"""Negative prompts on controlled scenes: what each way of giving them suppresses, keeps and costs.

Captions leave one factor out, and the negative text names its most frequent value. Pictures are read exactly, so every
number is a share of pictures with an interval. The teacher runs with and without guidance, its students in 1, 2 and 4
steps. Rows that are in the output file already are not run again. Usage:

    python benchmarks/nag_scenes.py --teacher runs/scenes/pipeline --four runs/scenes-4/pipeline \\
        --one runs/scenes-1/pipeline --samples 1000 --out docs/results/nag-scenes.json
    python benchmarks/nag_scenes.py --table docs/results/nag-scenes.json
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from whenwhere import plan
from whenwhere.bench.drawing import attached, draw
from whenwhere.bench.environment import Environment
from whenwhere.bench.model import open_model
from whenwhere.expression import parse
from whenwhere.metrics.suppression import Success, success
from whenwhere.train.scenes import COUNTS, FACTORS, NAMES, Reader, Scenes, draw_scenes

PROBES = {"red": "colour", "with halo": "accessory"}  # negative text -> the factor of which it is the likeliest value
NAG_SCALES = (2, 3, 5, 9)
NASA_SCALES = (0.25, 0.5, 0.75)
VSF_SCALES = (1, 2, 3.5)
CFG_SCALES = (1.5, 2, 3, 5)


@dataclass(frozen=True)
class Cell:
    """One setting: a model, its steps, and how the negative text is given."""

    model: str
    steps: int
    guidance: float  # of the pipeline; 1 is none
    method: str  # an expression, {} for the negative text; empty for none
    negative: bool  # whether the pipeline's own guidance gets the negative text

    @property
    def label(self) -> str:
        """What the table calls it."""
        own = f"CFG {self.guidance:g}" if self.guidance > 1 else "none"
        own += " with negative" if self.negative else ""
        method = self.method.replace(", negative_prompt='{}'", "")
        return method if own == "none" and method else f"{own} + {method}" if method else own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "four", "one"):
        parser.add_argument(f"--{name}", type=Path, help="folder of a pipeline")
    parser.add_argument("--samples", type=int, default=1000, help="pictures of every setting and negative text")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/nag-scenes.json"))
    parser.add_argument("--table", type=Path, help="print the table of a finished run, and end")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))["rows"]))
        return
    folders = {name: getattr(args, name) for name in ("teacher", "four", "one") if getattr(args, name)}
    run(folders, args)
    print(table(json.loads(args.out.read_text(encoding="utf-8"))["rows"]))


def cells(model: str) -> Iterator[Cell]:
    """All settings of a model, the plain ones first."""
    if model == "teacher":
        yield from (Cell(model, 20, guidance, "", negative=False) for guidance in (1, 3))
        yield from (Cell(model, 20, guidance, "", negative=True) for guidance in CFG_SCALES)
        yield from (Cell(model, 20, 1, method, negative=False) for method in operators(NAG_SCALES[1:3]))
        yield from (Cell(model, 20, 3, nag(scale), negative=False) for scale in NAG_SCALES)
        for gate in ("TGate(gate_step=6, sp_interval=1)", "TGate(gate_step=10, sp_interval=1)"):
            yield Cell(model, 20, 3, gate, negative=True)
            yield Cell(model, 20, 3, f"{gate}+{nag(5)}", negative=False)
        return
    for steps in (4, 2) if model == "four" else (1,):
        yield Cell(model, steps, 1, "", negative=False)
        yield from (Cell(model, steps, guidance, "", negative=True) for guidance in CFG_SCALES)
        yield from (Cell(model, steps, 1, method, negative=False) for method in operators(NAG_SCALES))
    if model == "four":
        gates = [f"TGate(gate_step={gate}, sp_interval=1, warm_up=0)" for gate in (1, 2, 3)]
        for gate in gates:
            yield Cell(model, 4, 1, gate, negative=False)
            yield Cell(model, 4, 1, f"{gate}+{nag(5)}", negative=False)


def nag(scale: float) -> str:
    return f"NAG(scale={scale:g}, negative_prompt='{{}}')"


def operators(scales: tuple[int, ...]) -> list[str]:
    """The operators, without the pipeline's guidance."""
    return [
        *map(nag, scales),
        *(f"NASA(phi={phi:g}, negative_prompt='{{}}')" for phi in NASA_SCALES),
        *(f"VSF(scale={scale:g}, negative_prompt='{{}}')" for scale in VSF_SCALES),
    ]


def run(folders: dict[str, Path], args: argparse.Namespace) -> None:
    """Run what is not there yet; the file is written after every row."""
    report: dict[str, Any] = {"environment": asdict(Environment.here(torch.device(args.device))), "rows": []}
    if args.out.exists():
        report = json.loads(args.out.read_text(encoding="utf-8"))
    done = {json.dumps([row["cell"], row["negative text"], row["pictures"]], sort_keys=True) for row in report["rows"]}
    reader = Reader()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for model, folder in folders.items():
        pipe = open_model(str(folder), args.device, "float32").pipeline
        for cell in cells(model):
            for text in PROBES:
                if json.dumps([asdict(cell), text, args.samples], sort_keys=True) in done:
                    continue
                row = measure(pipe, cell, text, reader, args.samples, args.batch)
                report["rows"].append(row)
                args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                print(f"{model} {cell.steps} steps, {cell.label}, {text}: {row['joint']['value']:.3f}", flush=True)


def measure(pipe: Any, cell: Cell, text: str, reader: Reader, samples: int, batch: int) -> dict[str, Any]:
    """Draw, read and count one setting; the captions and seeds are the same for all."""
    factor = NAMES.index(PROBES[text])
    scenes = probes(samples, factor)
    methods = list(parse(cell.method.format(text))) if cell.method else []
    began, parts = time.perf_counter(), []
    with attached(pipe, methods, cell.guidance):
        for start in range(0, samples, batch):
            seeds = range(start, min(start + batch, samples))
            captions = scenes.captions[seeds.start : seeds.stop]
            negative = text if cell.negative else ""
            parts.append(draw(pipe, captions, seeds, cell.steps, cell.guidance, negative))
    seconds = time.perf_counter() - began
    reading = reader(torch.cat(parts) * 2 - 1)
    value = FACTORS[NAMES[factor]].index(text)
    found: Success = success(
        reading.factors, scenes.factors, scenes.stated, reading.error, counts=COUNTS, factor=factor, value=value
    )
    cost = plan(pipe, *methods, steps=cell.steps, guidance=cell.guidance > 1).cost
    assert cost is not None
    shares = {name: getattr(found, name)._asdict() for name in ("suppressed", "retained", "joint", "readable")}
    rest = {"diversity": found.diversity, "pictures": found.pictures, "seconds": seconds, "MACs": cost.macs.all}
    return {"cell": asdict(cell), "label": cell.label, "negative text": text, **shares, **rest}


def probes(samples: int, factor: int) -> Scenes:
    """Scenes whose captions state a shape and perhaps more, but never this factor."""
    scenes = draw_scenes(samples, torch.Generator().manual_seed(1234))
    stated = scenes.stated.clone()
    stated[:, NAMES.index("shape")] = True
    stated[:, factor] = False
    return scenes._replace(stated=stated)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for every model, number of steps and setting; the two negative texts side by side."""
    lines = [
        "| model, steps | setting | MACs | "
        + " | ".join(f"{text}: gone, kept, both, spread" for text in PROBES)
        + " |",
        "|---" * (3 + len(PROBES)) + "|",
    ]
    groups: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cell = row["cell"]
        groups.setdefault((cell["model"], cell["steps"], row["label"]), {})[row["negative text"]] = row
    for (model, steps, label), found in groups.items():
        macs = next(iter(found.values()))["MACs"] / 1e6
        results = [entry(found[text]) if text in found else "" for text in PROBES]
        lines.append(f"| {model}, {steps} | {label} | {macs:,.0f} M | " + " | ".join(results) + " |")
    return "\n".join(lines)


def entry(row: dict[str, Any]) -> str:
    """Percentages; half the interval behind the one that counts."""
    both = row["joint"]
    half = (both["high"] - both["low"]) / 2
    return (
        f"{row['suppressed']['value']:.1%}, {row['retained']['value']:.1%}, "
        f"**{both['value']:.1%}** ± {half:.1%}, {row['diversity']:.2f}"
    )


if __name__ == "__main__":
    main()
