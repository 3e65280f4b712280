"""How much of the saved multiply-adds of a routed language model is saved time: prefill and decoding, dense and routed.

Random weights (speed only, never quality), a Llama of medium size. A prefill selects the best half of the prompt; in
decoding the routers score, and a coin says which half of the steps a layer runs, so that budgets are those of the
ceiling. Runs are interleaved (dense, MoD, SDT, dense, MoD, SDT, ...) and medians are reported, next to the ceiling: the
ratio of multiply-adds by `whenwhere.lm.cost`, the output head included, and the share of tokens that really ran. Usage:

    OMP_NUM_THREADS=1 python benchmarks/language.py --runs 5 --out docs/results/language-speed.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from whenwhere import lm

CAPACITY = 0.5
LENGTHS = (256, 512, 1024, 2048, 4096)
BATCHES = (1, 4, 8)
CONTEXT, NEW = 512, 32
METHODS = {
    "MoD": lm.MoD(capacity=CAPACITY, prefill_routing="topk"),
    "SDT": lm.SDT(capacity=CAPACITY, prefill_routing="topk", surprise="relative"),
}


@dataclass(frozen=True)
class Row:
    """One setting: `seconds` of a whole prefill, or of one step of decoding."""

    task: str
    tokens: int
    batch: int
    model: str
    seconds: float
    speedup: float
    ceiling: float
    realised: float


def now() -> float:
    """Seconds: of this process where it has one thread, so that other work on the machine counts less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def models() -> dict[str, Any]:
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )
    dense = LlamaForCausalLM(config).eval()
    found: dict[str, Any] = {"dense": dense}
    return found | {name: lm.route(dense, routing) for name, routing in METHODS.items()}


def texts(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 2048, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def prefill(model: Any, ids: Tensor) -> tuple[float, float]:
    """Seconds until the first token is known and the cache is filled, and the share of tokens that ran."""
    start = now()
    model(ids, use_cache=True, logits_to_keep=1)
    seconds = now() - start
    return seconds, share(model)


def decode(model: Any, ids: Tensor) -> tuple[float, float]:
    """Seconds of one step after the context, and the share of tokens that ran in the steps."""
    cache = DynamicCache()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    coin, shares, seconds = torch.Generator().manual_seed(0), [], 0.0
    for _ in range(NEW):
        chosen = {}
        if hasattr(model, "routed"):
            draws = torch.rand(len(model.routed), len(ids), 1, generator=coin) < CAPACITY
            chosen["selection"] = {layer.index: draw for layer, draw in zip(model.routed, draws, strict=True)}
        start = now()
        token = model(token, past_key_values=cache, **chosen).logits[:, -1:].argmax(-1)
        seconds += now() - start
        shares.append(share(model))
    return seconds / NEW, statistics.mean(shares)


def share(model: Any) -> float:
    return statistics.mean(model.realised.values()) if hasattr(model, "realised") else 1.0


def macs(config: Any, routing: lm.Routing | None, tokens: int, steps: int) -> float:
    """Of a prefill, or of one of so many steps behind a context, the output head included."""
    head = config.hidden_size * config.vocab_size
    if not steps:
        return lm.cost(config, routing, tokens).macs + head
    more = lm.cost(config, routing, tokens + steps).macs - lm.cost(config, routing, tokens).macs
    return more / steps + head


def measured(
    found: dict[str, Any], task: str, tokens: int, batch: int, run: Callable[..., tuple[float, float]], runs: int
) -> list[Row]:
    ids, steps = texts(batch, tokens), NEW if task == "decode" else 0
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for turn in range(runs + 1):
        for name, model in found.items():
            once = run(model, ids)
            if turn:  # the first is warm-up
                times[name].append(once)
    plain, rows = [seconds for seconds, _ in times["dense"]], []
    config = found["dense"].config
    for name, values in times.items():
        seconds = [value for value, _ in values]
        ceiling = macs(config, None, tokens, steps) / macs(config, METHODS.get(name), tokens, steps)
        speedup = statistics.median(p / s for p, s in zip(plain, seconds, strict=True))
        realised = statistics.mean(ran for _, ran in values)
        rows.append(Row(task, tokens, batch, name, statistics.median(seconds), speedup, ceiling, realised))
    return rows


def as_table(rows: list[Row]) -> str:
    lines = [
        "| | tokens | batch | | milliseconds | speed-up | ceiling | tokens that ran |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = f"{row.seconds * 1000:,.1f} | {row.speedup:.2f} | {row.ceiling:.2f} | {row.realised:.0%}"
        lines.append(f"| {row.task} | {row.tokens:,} | {row.batch} | {row.model} | {numbers} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each setting")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="longest prefill, in tokens")
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found, rows = models(), []
    for batch in BATCHES:
        rows += measured(found, "decode", CONTEXT, batch, decode, arguments.runs)
    for tokens in (length for length in LENGTHS if length <= arguments.longest):
        rows += measured(found, "prefill", tokens, 1, prefill, arguments.runs)
    report = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread",
        "clock": "seconds of the process" if torch.get_num_threads() == 1 else "seconds of the wall",
        "note": arguments.note,
        "torch": torch.__version__,
        "runs": arguments.runs,
        "capacity": CAPACITY,
        "model": "Llama, width 512, 8 layers, 8 heads and 4 of keys, float32, random weights",
        "rows": [asdict(row) for row in rows],
    }
    print(as_table(rows))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
