"""All methods at about 1.3, 1.6, 2.0 and 2.5 times fewer multiply-adds, beside the plain ways to compute as little.

`python benchmarks/methods.py` runs both models of the zoo that take many steps, and rewrites its part of
docs/comparison.md, between its marks; names of models run only these. Settings are chosen by their plans, nothing is
tuned on pictures; a method that cannot come near a target is not listed there. Rows go to runs/methods-MODEL.jsonl, and
a run that was stopped goes on.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from methods_table import NEAR, TARGETS, Setting, page_with, section

from whenwhere import AdaptiveTGate, BlockCaching, Method, TGate, attach, calibrate
from whenwhere.bench.bench import bench
from whenwhere.bench.drawing import draw
from whenwhere.bench.judges import at_hand
from whenwhere.bench.model import Model, open_model
from whenwhere.bench.order import Order
from whenwhere.bench.prompts import builtin_prompts
from whenwhere.expression import parse, write
from whenwhere.planning import Planner

MODELS = ("emoji-pixart", "emoji-unet")
# What may vary, for every method; `m` are steps of the gate, `n` intervals, `b` blocks.
GRID = {
    "T-GATE": ["tgate(gate_step={m},sp_interval=1)"],
    "T-GATE, self-attention too": ["tgate(gate_step={m},sp_interval=3,fi_interval=2)"],
    "DeepCache": [
        "deepcache(interval={n},branch=0)",
        "deepcache(interval={n},branch=1)",
        "deepcache(interval={n},branch=2)",
    ],
    "FORA": ["fora(interval={n})"],
    "Δ-DiT": ["deltadit(interval={n},blocks={b})"],
    "ToCa": ["toca(interval={n},fresh_ratio=0.1)", "toca(interval={n},fresh_ratio=0.3)"],
    "ToCa, as on PixArt": ["toca(interval={n},fresh_ratio=0.3,score='cross_attention',schedule='pixart')"],
    "Faster Diffusion": ["fasterdiffusion(every={n},alpha=0)"],
    "T-GATE + DeepCache": ["tgate(gate_step={m},sp_interval=1,warm_up=0)+deepcache(interval={n})"],
    "T-GATE + FORA": [
        "tgate(gate_step={m},sp_interval=1,warm_up=0)+fora(interval={n},branches=('mlp','self-attention'))"
    ],
}
ADAPTED = TARGETS[:2]  # more than T-GATE saves is out of reach for one that decides by itself, too
AROUND = 1  # fixed gates on both sides of the one at a target
CALIBRATION = ("green apple", "bear", "wine glass, noto style", "t-shirt", "key", "tent", "sun", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="of the zoo; both that have many steps without")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--page", type=Path, default=Path("docs/comparison.md"))
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        measure(name, args)


def measure(name: str, args: argparse.Namespace) -> None:
    """Run what is missing of one model, and rewrite its section."""
    model = open_model(name)
    settings = choose(model, args.steps, args.runs)
    order = Order(
        model=name,
        methods=tuple(dict.fromkeys(setting.expression for setting in settings)),
        prompts=tuple(builtin_prompts(name)[: args.prompts]),
        seeds=(0,),
        steps=args.steps,
        judging=at_hand(True),
        pictures=0,
    )
    rows = args.runs / f"methods-{name}.jsonl"
    bench(order, rows, args.workers, watch=lambda text: print(f"{name}: {text}", flush=True))
    text = page_with(args.page.read_text(encoding="utf-8"), name, section(rows, settings))
    args.page.write_text(text, encoding="utf-8")


def choose(model: Model, steps: int, runs: Path) -> list[Setting]:
    """What is measured: by target the settings nearest to it, and the gates around those that decide by themselves."""
    costs = price(model, steps)
    chosen = [setting for target in TARGETS for setting in nearest(costs, target)]
    chosen += [found for target in TARGETS for found in block_caching(model, target, steps, runs)]
    rates = converging(model, steps)
    for target in ADAPTED:
        gate = parse(min(costs["T-GATE"], key=lambda text: abs(costs["T-GATE"][text] - target)))[0]
        assert isinstance(gate, TGate)
        middle = int(gate.gate_step)
        chosen.append(Setting(None, "adaptive T-GATE", write([closing_at(rates, middle, steps)])))
        around = range(max(2, middle - AROUND), min(steps - 1, middle + AROUND) + 1)
        chosen += [Setting(None, "T-GATE", f"tgate(gate_step={m},sp_interval=1)") for m in around]
    return chosen


def price(model: Model, steps: int) -> dict[str, dict[str, float]]:
    """How many times fewer multiply-adds every setting of every method plans, by name and expression."""
    planner = Planner(model.pipeline, steps)
    return {
        name: {text: ratio for text in written(forms, steps) if (ratio := planned(planner, text))}
        for name, forms in GRID.items()
    }


def nearest(costs: dict[str, dict[str, float]], target: float) -> Iterable[Setting]:
    """For every method the setting whose planned multiply-adds are nearest to the target, if any is near."""
    for name, priced in costs.items():
        near = [text for text, ratio in priced.items() if abs(ratio / target - 1) <= NEAR]
        if near:
            yield Setting(target, name, min(near, key=lambda text: abs(priced[text] - target)))


def written(forms: Iterable[str], steps: int) -> Iterable[str]:
    """All settings of a method, written out."""
    for form in forms:
        for m in range(2, steps) if "{m}" in form else (0,):
            for n in range(2, 7) if "{n}" in form else (0,):
                for b in range(2, 29) if "{b}" in form else (0,):
                    yield form.format(m=m, n=n, b=b)


def planned(planner: Planner, text: str) -> float | None:
    """How many times fewer multiply-adds, or `None` where the method does not fit the model or the steps."""
    try:
        cost = planner.plan(*(item for item in parse(text) if isinstance(item, Method))).cost
    except ValueError:
        return None
    return cost.ratio if cost else None


def block_caching(model: Model, target: float, steps: int, runs: Path) -> Iterable[Setting]:
    """Block Caching at the threshold for the target, from a calibration on prompts that the table does not use."""
    file = runs / f"blockcaching-{model.name}-{steps}.json"
    if not file.exists():
        calibrate(model.pipeline, lambda: calibration_run(model, steps)).save(file)
    try:
        method = BlockCaching.for_speedup(model.pipeline, file, target)
    except ValueError:
        return
    yield Setting(target, "Block Caching", f"blockcaching(calibration='{file}',threshold={method.threshold})")


def calibration_run(model: Model, steps: int) -> None:
    for seed, prompt in enumerate(CALIBRATION):
        draw(model.pipeline, [prompt], [1000 + seed], steps, model.guidance)


def converging(model: Model, steps: int) -> list[list[float]]:
    """By prompt of the calibration, how fast cross-attention changes at every step; infinite where nobody measured."""
    found = []
    for seed, prompt in enumerate(CALIBRATION):
        with attach(model.pipeline, AdaptiveTGate(threshold=0.0, min_step=2, max_step=steps)) as attached:
            draw(model.pipeline, [prompt], [1000 + seed], steps, model.guidance)
        rates = attached.notes()["rates"]
        found.append([rates[s][0] if s in rates else float("inf") for s in range(steps)])
    return found


def closing_at(rates: list[list[float]], gate: int, steps: int) -> AdaptiveTGate:
    """Half the prompts of the calibration close their gates at this one or before."""
    low, high = 3, min(steps, 2 * gate)
    threshold = median(min(own[low - 1 : gate]) for own in rates)
    return AdaptiveTGate(threshold=float(f"{threshold:.3g}"), min_step=low, max_step=high)


if __name__ == "__main__":
    main()
