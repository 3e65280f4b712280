"""What compiling inside of sites brings, with T-GATE, DeepCache and FORA, and that nothing is compiled anew.

Random weights; the models of `overhead.py` at a small size. Eager and compiled take turns. Run
`python benchmarks/compiled.py --runs 3`; the table goes to docs/compile.md, between its marks.
"""

import argparse
import re
import statistics
import warnings
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import overhead
import peers
import torch
from torch import _dynamo as dynamo
from torch._dynamo.utils import counters

from whenwhere import FORA, DeepCache, Method, TGate, attach, compile_inside
from whenwhere.bench.environment import Environment

CASES: dict[str, tuple[str, tuple[Method, ...]]] = {
    "FORA": ("tiny PixArt", (FORA(interval=3),)),
    "DeepCache": ("tiny U-Net", (DeepCache(interval=3),)),
    "T-GATE": ("tiny U-Net", (TGate(gate_step=4, sp_interval=2, warm_up=1),)),
}


def pipeline(model: str) -> object:
    torch.manual_seed(0)
    if model == "tiny U-Net":
        pipe = peers.models()[model]()
    else:
        pipe = overhead.pixart_pipeline()
        pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:4]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--page", type=Path, default=Path("docs/compile.md"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dynamo.config.recompile_limit = 64
    here = Environment.here(torch.device("cpu"))
    lines = [
        f"{datetime.now(UTC).date()}, {here.processor}, 1 thread of {here.cores} cores, torch {here.torch}, backend "
        f"{args.backend}, {peers.STEPS} steps, median of {args.runs} turns after a warm-up.",
        "",
        "| | model | plain | method | method, compiled | compiled modules | graphs | compiled anew after the first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (model, methods) in CASES.items():
        lines.append(measure(name, model, methods, args.runs, args.backend))
        print(lines[-1], flush=True)
        marks = re.compile(r"(<!-- compiled -->\n).*?(<!-- end -->)", re.DOTALL)
        page, table = args.page.read_text(encoding="utf-8"), "\n".join(lines)
        args.page.write_text(marks.sub(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", page), encoding="utf-8")


def measure(name: str, model: str, methods: tuple[Method, ...], runs: int, backend: str) -> str:
    """A line of the table."""
    dynamo.reset()
    counters.clear()
    plain, eager, compiled = (pipeline(model) for _ in range(3))
    with ExitStack() as stack:
        stack.enter_context(attach(eager, *methods))
        count = stack.enter_context(compile_inside(compiled, *methods, backend=backend, dynamic=False))
        stack.enter_context(attach(compiled, *methods))
        own = {
            "plain": run_of(plain),
            "method": run_of(eager),
            "compiled": run_of(compiled),
        }
        for run in own.values():
            run()
        warm = graphs()
        seconds: dict[str, list[float]] = {key: [] for key in own}
        for _ in range(runs):
            for key, run in own.items():
                seconds[key].append(overhead.seconds(run))
        anew = graphs() - warm
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    base = medians["plain"]
    cells = [f"{base:.2f} s", *(f"{medians[key]:.2f} s ({base / medians[key]:.2f}x)" for key in ("method", "compiled"))]
    return f"| {name} | {model} | {' | '.join(cells)} | {count} | {warm} | {anew} |"


def run_of(pipe: object) -> object:
    common = peers.arguments(pipe)
    call = peers.latents_of(pipe)
    return lambda: peers.draw(call, common)


if __name__ == "__main__":
    main()
