"""All methods at about 1.3, 1.6, 2.0 and 2.5 times fewer multiply-adds, beside the plain ways to compute as little.

Run `python benchmarks/methods.py emoji-unet`. Settings are chosen by their plans, nothing is tuned on pictures; a
method that cannot come near a target is not listed there. Rows go to runs/methods-MODEL.jsonl, and a run that was
stopped goes on; the table goes to docs/comparison.md, between its marks.
"""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whenwhere import BlockCaching, Method, calibrate, plan
from whenwhere.bench.bench import bench
from whenwhere.bench.drawing import draw
from whenwhere.bench.evidence import Evidence, Finding, gather
from whenwhere.bench.intervals import Interval
from whenwhere.bench.judges import at_hand
from whenwhere.bench.model import Model, open_model
from whenwhere.bench.order import Order
from whenwhere.bench.prompts import builtin_prompts
from whenwhere.expression import parse

TARGETS = (1.3, 1.6, 2.0, 2.5)
NEAR = 0.12  # how far from its target a setting may be, relatively

# What may vary, for every method; `m` are steps of the gate, `n` intervals.
GRID = {
    "T-GATE": ["tgate(gate_step={m},sp_interval=1)"],
    "T-GATE, self-attention too": ["tgate(gate_step={m},sp_interval=3,fi_interval=2)"],
    "adaptive T-GATE": ["adaptivetgate()"],
    "DeepCache": [
        "deepcache(interval={n},branch=0)",
        "deepcache(interval={n},branch=1)",
        "deepcache(interval={n},branch=2)",
    ],
    "FORA": ["fora(interval={n})"],
    "Δ-DiT": ["deltadit(interval={n},blocks={b})"],
    "ToCa": ["toca(interval={n},fresh_ratio=0.1)", "toca(interval={n},fresh_ratio=0.3)"],
    "Faster Diffusion": ["fasterdiffusion(every={n},alpha=0)"],
    "T-GATE + DeepCache": ["tgate(gate_step={m},sp_interval=1,warm_up=0)+deepcache(interval={n})"],
    "T-GATE + FORA": [
        "tgate(gate_step={m},sp_interval=1,warm_up=0)+fora(interval={n},branches=('mlp','self-attention'))"
    ],
}


@dataclass(frozen=True)
class Setting:
    """One row of the table before it is measured."""

    target: float
    name: str
    expression: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--page", type=Path, default=Path("docs/comparison.md"))
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    model, prompts = open_model(args.model), builtin_prompts("emoji-unet")[: args.prompts]
    costs = price(model, args.steps)
    settings = [
        setting
        for target in TARGETS
        for setting in (*choose(costs, target), *block_caching(model, target, args.steps, args.runs))
    ]
    order = Order(
        model=args.model,
        methods=tuple(dict.fromkeys(setting.expression for setting in settings)),
        prompts=tuple(prompts),
        seeds=(0,),
        steps=args.steps,
        judging=at_hand(True),
        pictures=0,
    )
    path = args.runs / f"methods-{args.model}.jsonl"
    bench(order, path, args.workers, watch=lambda text: print(text, flush=True))
    write(args.page, args.model, table(gather(path), settings))


def price(model: Model, steps: int) -> dict[str, dict[str, float]]:
    """How many times fewer multiply-adds every setting of every method plans, by name and expression."""
    return {
        name: {text: ratio for text in written(forms, steps) if (ratio := planned(model.pipeline, text, steps))}
        for name, forms in GRID.items()
    }


def choose(costs: dict[str, dict[str, float]], target: float) -> Iterable[Setting]:
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


def planned(pipeline: Any, text: str, steps: int) -> float | None:
    """How many times fewer multiply-adds, or `None` where the method does not fit the model or the steps."""
    try:
        methods = [item for item in parse(text) if isinstance(item, Method)]
        cost = plan(pipeline, *methods, steps=steps).cost
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
    for seed, prompt in enumerate(
        ("green apple", "bear", "wine glass, noto style", "t-shirt", "key", "tent", "sun", "")
    ):
        draw(model.pipeline, [prompt], [1000 + seed], steps, model.guidance)


def table(evidence: Evidence, settings: Iterable[Setting]) -> str:
    """Markdown: by target, every method and then its baselines."""
    found = {finding.listing.method: finding for finding in evidence.findings}
    names = {expression: str(parse(expression)) for expression in {setting.expression for setting in settings}}
    by_text = {str(parse_listed(finding)): finding for finding in found.values() if not finding.plain}
    setting, here = evidence.setting, evidence.environment
    lines = [
        f"{setting.steps} steps of {setting.scheduler}, guidance {setting.guidance:g}, one seed for each of "
        f"{len(evidence.prompts)} prompts; {evidence.unit} are resampled for the 95 % intervals. {here.processor}, "
        f"{here.threads} thread, torch {here.torch}, {here.date[:10]}.",
        "",
        "| | setting | fewer MACs | speed-up | remembered | PSNR, dB | SSIM | prompt agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = next(finding for finding in evidence.findings if finding.plain)
    lines.append(line("**plain**", plain))
    for target in TARGETS:
        lines.append(f"| **about {target}x** | | | | | | | |")
        own = [entry for entry in settings if entry.target == target]
        lines += [line(entry.name, by_text[names[entry.expression]]) for entry in own]
        kin = {method for entry in own for method in by_text[names[entry.expression]].listing.baselines}
        baselines = [found[method] for method in kin if abs(found[method].macs_ratio / target - 1) <= NEAR]
        lines += [line("*baseline*", finding) for finding in sorted(baselines, key=lambda f: f.listing.label)]
    return "\n".join(lines)


def parse_listed(finding: Finding) -> Any:
    return parse(finding.listing.method)


def line(name: str, finding: Finding) -> str:
    scores = [finding.scores.get(key) for key in ("psnr", "ssim", "agreement")]
    cells = [
        name,
        "" if finding.plain else f"`{re.sub('calibration=[^,]*, ', '', finding.listing.label)}`",
        f"{finding.macs_ratio:.2f}x",
        interval(finding.speed_up, 2) + "x" if not finding.plain else "",
        f"{finding.held / 1024:.0f} KiB" if finding.held else "",
        *(interval(score, digits) for score, digits in zip(scores, (1, 3, 3), strict=True)),
    ]
    return f"| {' | '.join(cells)} |"


def interval(score: Interval | None, digits: int) -> str:
    if score is None:
        return ""
    if score.low is None or score.high is None:
        return f"{score.value:.{digits}f}"
    return f"{score.value:.{digits}f} ({score.low:.{digits}f} to {score.high:.{digits}f})"


def write(page: Path, model: str, text: str) -> None:
    """Put the table between the marks of its model."""
    marks = re.compile(rf"(<!-- methods: {re.escape(model)} -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(marks.sub(lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
