"""Convert SmolLM2-135M to MoD, SDT and STT: routers first with the language model frozen, then adapters as well.

    whenwhere lm fetch smollm2 --out ./smollm2
    python recipes/language_smollm2.py --model ./smollm2 --corpus data/corpus --threads 1 --out runs/smollm2

The dense model gets the same adapters, because it learns from the text too. Perplexity is causal, of held-out text, at
several capacities by the thresholds of decoding. Finished models are read when the same line runs again; `--write`
puts them into `docs/results/language-smollm2.json` and onto `docs/language.md`. Needs the extra `peft`.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from language_experiments import DOCS
from language_tables import Row, between, conversion
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from whenwhere import lm
from whenwhere.lm.within import find
from whenwhere.train.diffusion import precision
from whenwhere.train.language import LanguageConfig, learn_language

ROUTINGS: dict[str, lm.Routing | None] = {
    "dense": None,
    "mod": lm.MoD(always_run="first"),
    "sdt-relative": lm.SDT.recommended(),
    "stt": lm.STT.recommended(),
}
CAPACITIES = (0.5, 0.75, 0.9, 1.0)
WINDOW = 256


@dataclass(frozen=True)
class Conversion:
    """How much is learned and scored."""

    routers: int = 60  # steps with the language model frozen
    adapters: int = 30  # steps after that
    batch_size: int = 2
    context: int = 128
    calibration: int = 2048  # tokens
    evaluation: int = 2048  # tokens of held-out text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the directory of whenwhere lm fetch")
    parser.add_argument("--corpus", type=Path, required=True, help="train.txt and held-out.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--methods", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="collect finished runs in docs, train nothing")
    args = parser.parse_args()
    if args.write:
        write(args.out)
        return
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {part: read(args.corpus / f"{part}.txt", tokenizer) for part in ("train", "held-out")}
    for method in args.methods:
        if not (args.out / f"{method}.json").exists():
            rows = convert(Conversion(), method, args.model, texts, args.out)
            (args.out / f"{method}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def read(file: Path, tokenizer: Any) -> Tensor:
    """Pages of 5,000 letters from all parts of a text, as token numbers (N,)."""
    whole = file.read_text(encoding="utf-8")
    far = max(len(whole) // 40, 5000)
    pages = "".join(whole[start : start + 5000] for start in range(0, len(whole), far))
    return tokenizer(pages, return_tensors="pt", verbose=False).input_ids[0]


def spaced(ids: Tensor, tokens: int) -> Tensor:
    """So many tokens of a text, in windows from all parts of it."""
    whole = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    count = tokens // WINDOW
    return whole[:: len(whole) // count][:count].flatten()


def convert(task: Conversion, method: str, folder: Path, texts: dict[str, Tensor], out: Path) -> list[Row]:
    """Train and score one model: before, after the routers, after the adapters."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    routing = ROUTINGS[method]
    model = dense if routing is None else lm.route(dense, routing)
    rows = [scored(task, method, "new", model, texts)]
    if routing is not None:
        for group in lm.parameter_groups(model):
            for parameter in group["params"]:
                parameter.requires_grad_(not group["name"].startswith("base"))
        seconds = learn(task, task.routers, model, texts["train"], out / f"{method}-routers")
        rows.append(scored(task, method, "routers", model, texts) | {"seconds": seconds})
    model = adapted(model)
    seconds = learn(task, task.adapters, model, texts["train"], out / f"{method}-adapters")
    return [*rows, scored(task, method, "adapters", model, texts) | {"seconds": seconds}]


def adapted(model: Any) -> Any:
    """Low-rank adapters on all projections; the routers go on learning."""
    new = [] if not hasattr(model, "routed") else ["router", "student"] if model.routed[0].student else ["router"]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=new, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


def learn(task: Conversion, steps: int, model: Any, ids: Tensor, out: Path) -> float:
    """Train so many steps; gives the seconds of the process."""
    rates = {"learning_rate": 5e-4, "network_rate": 2e-3, "scalar_rate": 1e-2}
    config = LanguageConfig(
        1e9, steps, task.batch_size, task.context, **rates, bfloat16=True, save_every=1e9, log_every=5
    )
    return learn_language(model, ids, config, out, clock=time.process_time).seconds


def scored(task: Conversion, method: str, stage: str, model: Any, texts: dict[str, Tensor]) -> Row:
    """Held-out loss by capacity."""
    row: Row = {"method": method, "stage": stage, "curve": []}
    inner = model if method == "dense" else find(model)
    knobs: list[tuple[str, lm.Knob | None]] = [("dense", None)]
    ids = spaced(texts["held-out"], task.evaluation)
    with precision("cpu", True):
        if method != "dense":
            sample = spaced(texts["train"], task.calibration)
            lm.calibrate(model, torch.split(sample.view(-1, WINDOW), 4))
            shares = CAPACITIES if stage != "new" else CAPACITIES[:-1]
            knobs = [(f"{share:g}", lm.Knob(capacity=share)) for share in shares]
            if stage == "adapters":
                knobs.append(("0.5 topk", lm.Knob("topk", 0.5)))
        for name, knob in knobs:
            found = lm.score(inner, ids, WINDOW, 4, knob)
            row["curve"].append({"capacity": name, "nats": found.nats, "realised": found.realised})
            print(method, stage, name, f"{found.perplexity:.1f}", f"{found.realised:.1%}", flush=True)
    return row


def write(folder: Path) -> None:
    """Put finished runs into one file of numbers, and their table onto the page."""
    files = [folder / f"{method}.json" for method in ROUTINGS]
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text(encoding="utf-8"))]
    (DOCS / "results" / "language-smollm2.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    page = (DOCS / "language.md").read_text(encoding="utf-8")
    (DOCS / "language.md").write_text(between(page, "smollm2", conversion(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
