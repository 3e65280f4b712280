"""What long skips buy, measured on models that `recipes/skip_dit.py` trained: four experiments, as JSON and a table.

    python recipes/skip_experiments.py runs/skip-dit --out docs/results

The folder holds one run per folder: `dit`, `skip`, `wide`; other seeds as `skip-1`, `skip-2`; and what was recovered
from `dit`: `two-stage`, `one-stage`, `residual-zero`, `continued`. Missing runs are left out.

1. convergence: losses at equal steps, and after how many steps a run reaches the last validation loss of `dit`
2. smoothness: the survey of `whenwhere diagnose smoothness` on every model
3. quality: pictures at nearly equal multiply-adds, by every cache that fits, and by fewer steps
4. timesteps: where in the run Skip-Cache may be partial
"""

import argparse
import json
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from whenwhere import FORA, BlockCaching, DeltaDiT, SkipCache, calibrate, planning
from whenwhere.bench.drawing import attached, draw
from whenwhere.bench.model import open_model
from whenwhere.bench.survey import Extent, default_prompts, survey
from whenwhere.bench.variant import PLAIN, Variant
from whenwhere.methods import FewerSteps, SkipForecast, SkipOffset
from whenwhere.metrics.features import PictureFeatures, kernel_distance
from whenwhere.metrics.images import psnr, ssim
from whenwhere.train.data import read_pictures, read_tiles

ZOO = ("dit", "skip", "wide")
WINDOWS = ((1000, 0), (1000, 500), (500, 0), (950, 300), (900, 50), (800, 50), (700, 50))
BESIDE = (13, 14, 15)  # steps of 20


@dataclass(frozen=True)
class Size:
    """How much is drawn; the command line changes it."""

    pictures: int = 192  # of every variant
    batch: int = 64
    steps: int = 20
    guidance: float = 2.0
    intervals: tuple[int, ...] = (2, 3)  # of Skip-Cache, which set the costs that the others are held to
    subset: int = 96  # of the pictures, for the kernel distance
    extent: Extent = field(default_factory=partial(Extent, grid=7, iterations=20))
    surveyed: int = 16  # pictures
    window: int = 200  # steps over which a training loss is averaged
    data: Path = Path("data/emoji")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for skip-dit.json and skip-dit.md")
    parser.add_argument("--only", nargs="+", choices=tuple(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--pictures", type=int, default=Size.pictures)
    parser.add_argument("--steps", type=int, default=Size.steps)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # of methods in unusual settings, once for every plan
    size = Size(pictures=args.pictures, steps=args.steps, subset=min(Size.subset, args.pictures // 2))
    runs = {folder.name: folder for folder in sorted(args.runs.iterdir()) if (folder / "run.json").exists()}
    if not runs:
        raise SystemExit(f"{args.runs} holds no finished run of recipes/skip_dit.py")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "skip-dit.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found["size"] = json.loads(json.dumps(asdict(size), default=str))
    for name in args.only:
        began = time.perf_counter()
        found[name] = EXPERIMENTS[name](runs, size)
        found.setdefault("seconds", {})[name] = round(time.perf_counter() - began)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = "\n\n".join(table(title, rows) for title, rows in tables(found))
    (args.out / "skip-dit.md").write_text(text + "\n", encoding="utf-8")
    print(text)


# -- 1 ---------------------------------------------------------------------------------------------------------------


def convergence(runs: dict[str, Path], size: Size) -> list[dict[str, Any]]:
    """Losses of every run at some steps, and the steps to the last validation loss of the plain DiT."""
    target = validations(runs["dit"])[-1][1] if "dit" in runs and validations(runs["dit"]) else None
    found = []
    for name, folder in runs.items():
        lines, about = read_log(folder), json.loads((folder / "run.json").read_text(encoding="utf-8"))
        checks = validations(folder)
        marks = sorted({round(about["steps"] * share / 4) for share in range(1, 5)})
        found.append(
            {
                "run": name,
                "start": bool(about["start"]),
                "fusion": about["recipe"]["fusion"] if about["model"] == "skip" else "",
                "stage one": about["training"]["skips_first"],
                "seed": about["training"]["seed"],
                "steps": about["steps"],
                "seconds": round(about["seconds"]),
                "training loss": {step: mean_loss(lines, step, size.window) for step in marks},
                "validation loss": dict(checks),
                "steps to the plain run's": next((s for s, v in checks if target is not None and v <= target), None),
                "clipped": round(fmean(line["clipped"] for line in lines), 3) if lines else None,
                "KID of snapshots": snapshots(folder, size),
            }
        )
    return found


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a training's log; where an interrupted run repeated steps, the later ones count."""
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]


def validations(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["validation"]) for line in read_log(folder) if "validation" in line]


def mean_loss(lines: Iterable[dict[str, Any]], step: int, window: int) -> float | None:
    """The training loss averaged over the steps up to this one."""
    losses = [line["loss"] for line in lines if step - window < line["step"] <= step]
    return round(fmean(losses), 5) if losses else None


def snapshots(folder: Path, size: Size) -> dict[int, float]:
    """Kernel distance to the real pictures after every snapshot of a run."""
    files = sorted((folder / "snapshots").glob("*.safetensors"))
    if not files:
        return {}
    pipe = open_model(str(folder / "pipeline"), "cpu", "float32").pipeline
    real, found = real_features(size), {}
    for file in files:
        pipe.transformer.load_state_dict({key: value.float() for key, value in load_file(file).items()})
        found[int(file.stem)] = round(distance(pictures(pipe, size, PLAIN), real, size)[0], 4)
    return found


# -- 2 ---------------------------------------------------------------------------------------------------------------


def smoothness(runs: dict[str, Path], size: Size) -> list[dict[str, Any]]:
    """The survey of every model of the zoo, with Skip-Cache where it fits and with FORA where not, and in short."""
    found = []
    for name, folder in of_the_zoo(runs):
        pipe = open_model(str(folder / "pipeline"), "cpu", "float32").pipeline
        prompts = default_prompts(pipe, size.surveyed)
        row: dict[str, Any] = {"run": name}
        result = survey(pipe, prompts, size.extent, Variant((FORA(interval=2),)))
        row["worst 1 - cos with FORA"] = 1 - min(result["similarity"]["mean"])
        if has_skips(pipe):
            little = replace(size.extent, pairs=1, grid=2, iterations=0)
            other = survey(pipe, prompts, little, Variant((SkipCache(2, 1, 1000, 0),)))
            row["worst 1 - cos with SkipCache"] = 1 - min(other["similarity"]["mean"])
        row |= {
            "1 - cos of perturbed": [round(part["mean"], 6) for part in result["surface"]],
            "of every pair": [part["means"] for part in result["surface"]],
            "mean change": result["change"]["mean"],
            "early share": result["change"]["early share"],
            "early steps": result["change"]["early steps"],
            "mean Jacobian norm": [fmean(part["norms"]) for part in result["jacobians"]],
            "survey": result,
        }
        found.append(row)
    return found


# -- 3, 4 ------------------------------------------------------------------------------------------------------------


def quality(runs: dict[str, Path], size: Size) -> list[dict[str, Any]]:
    """Pictures of the plain and the skip model by every cache that fits, at the costs that Skip-Cache has."""
    pipes = {
        name: open_model(str(runs[name] / "pipeline"), "cpu", "float32").pipeline
        for name in ("skip", "dit")
        if name in runs
    }
    targets = [cost(pipes["skip"], SkipCache(n, 1, 1000, 0), size) for n in size.intervals if "skip" in pipes]
    found = []
    for name, pipe in pipes.items():
        reference, real = pictures(pipe, size, PLAIN), real_features(size)
        found.append({"run": name} | compared(pipe, PLAIN, reference, reference, real, size))
        for variant in dict.fromkeys(v for target in targets for v in rivals(pipe, target, size)):
            drawn = pictures(pipe, size, variant)
            found.append({"run": name} | compared(pipe, variant, drawn, reference, real, size))
    return found


def timesteps(runs: dict[str, Path], size: Size) -> list[dict[str, Any]]:
    """Skip-Cache in several windows of timesteps, and fewer steps of about their cost."""
    if "skip" not in runs:
        return []
    pipe = open_model(str(runs["skip"] / "pipeline"), "cpu", "float32").pipeline
    reference, real = pictures(pipe, size, PLAIN), real_features(size)
    found = []
    for start, stop in WINDOWS:
        variant = Variant((SkipCache(2, 1, start, stop),))
        row = compared(pipe, variant, pictures(pipe, size, variant), reference, real, size)
        found.append({"run": "skip", "window": f"{start}-{stop}"} | row)
    for steps in BESIDE:
        variant = Variant((FewerSteps(steps),))
        row = compared(pipe, variant, pictures(pipe, size, variant), reference, real, size)
        found.append({"run": "skip", "window": ""} | row)
    return found


def rivals(pipe: Any, target: int, size: Size) -> list[Variant]:
    """Of every kind of cache the one whose multiply-adds are nearest to the target, and as many steps as cost so."""
    whole = cost(pipe, None, size)
    kinds: list[list[Any]] = [
        [FORA(interval=n) for n in range(2, 8)],
        [DeltaDiT(n, blocks, mode="middle") for n in range(2, 6) for blocks in range(2, 12, 2)],
        [FewerSteps(n) for n in range(2, size.steps)],
    ]
    if has_skips(pipe):
        forms = (SkipCache, SkipOffset, SkipForecast)
        kinds += [[form(n, 1, 1000, 0) for n in range(2, 8)] for form in forms]
    else:
        kinds.append([DeltaDiT(n, blocks) for n in range(2, 6) for blocks in range(2, 12, 2)])
    chosen = [min(kind, key=lambda item: abs(cost(pipe, item, size) - target)) for kind in kinds]
    if whole / target > 1:
        prompts = default_prompts(pipe, 16)
        measured = calibrate(pipe, lambda: draw(pipe, prompts, range(16), size.steps, size.guidance))
        chosen.append(BlockCaching.for_speedup(pipe, measured, whole / target))
    return [Variant((item,)) for item in chosen]


def cost(pipe: Any, item: Any, size: Size) -> int:
    """Planned multiply-adds of one picture."""
    steps = item.steps if isinstance(item, FewerSteps) else size.steps
    pipe.scheduler.set_timesteps(steps)
    methods = () if item is None or isinstance(item, FewerSteps) else (item,)
    planned = planning.plan(pipe, *methods, steps=steps, guidance=size.guidance > 1, scheduler=pipe.scheduler)
    return planned.cost.macs.all


def has_skips(pipe: Any) -> bool:
    return any(hasattr(module, "skip_linear") for module in pipe.transformer.modules())


def of_the_zoo(runs: dict[str, Path]) -> list[tuple[str, Path]]:
    """The three models and their other seeds."""
    return [(name, folder) for name, folder in runs.items() if re.sub(r"-\d+$", "", name) in ZOO]


# -- pictures --------------------------------------------------------------------------------------------------------


def pictures(pipe: Any, size: Size, variant: Variant) -> Tensor:
    """Pictures (B, 3, 32, 32) in [0, 1] of all classes in turn, each from its own seed."""
    classes, parts = len(pipe.labels), []
    for start in range(0, size.pictures, size.batch):
        numbers = range(start, min(start + size.batch, size.pictures))
        prompts = [str(number % classes) for number in numbers]
        with attached(pipe, variant.methods, size.guidance):
            parts.append(draw(pipe, prompts, numbers, variant.steps(size.steps), size.guidance))
    return torch.cat(parts)


def compared(pipe: Any, variant: Variant, drawn: Tensor, reference: Tensor, real: Tensor, size: Size) -> dict[str, Any]:
    """A variant's cost and its pictures, against those of the plain run and against real ones."""
    kernel, spread = distance(drawn, real, size)
    row: dict[str, Any] = {
        "variant": title(variant),
        "GMACs": round(cost(pipe, variant.items[0] if variant.items else None, size) / 1e9, 3),
        "KID": round(kernel, 4),
        "KID spread": round(spread, 4),
    }
    if variant != PLAIN:
        ratios = psnr(drawn, reference)
        row |= {"PSNR": round(fmean(ratios), 2), "PSNR error": round(stdev(ratios) / len(ratios) ** 0.5, 2)}
        row["SSIM"] = round(fmean(ssim(drawn, reference)), 4)
    return row


def title(variant: Variant) -> str:
    """Its expression, without the measurements of a calibration."""
    for item in variant.items:
        if isinstance(item, BlockCaching):
            return f"BlockCaching(threshold={item.threshold:.3g})"
    return variant.label


def distance(drawn: Tensor, real: Tensor, size: Size) -> tuple[float, float]:
    """KID (EfficientNet-Lite0), mean and spread."""
    features = network()((drawn * 255).round().byte())
    return kernel_distance(real, features, subset_size=size.subset, generator=torch.Generator().manual_seed(0))


network = cache(PictureFeatures)


@cache
def real_features(size: Size) -> Tensor:
    labels = (size.data / "clear.txt").read_text(encoding="utf-8").split("\n")[:-1]
    return network()(read_tiles(size.data, read_pictures(size.data, labels)))


# -- tables ----------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Every experiment as rows for readers."""
    out = []
    if "convergence" in found:
        rows = [
            {key: row[key] for key in ("run", "fusion", "stage one", "seed", "steps", "seconds", "clipped")}
            | {"validation": last(row["validation loss"]), "training": last(row["training loss"])}
            | {"KID": last(row["KID of snapshots"]), "steps to dit's": row["steps to the plain run's"]}
            for row in found["convergence"]
        ]
        out.append(("Convergence", rows))
        for title, recovered in (("Validation loss by steps", False), ("Recovery: validation loss by steps", True)):
            curves = validation_curves([row for row in found["convergence"] if row["start"] == recovered])
            out += [(title, curves)] if curves else []
    if "smoothness" in found:
        hidden = ("survey", "of every pair")
        out.append(("Smoothness", [{k: v for k, v in row.items() if k not in hidden} for row in found["smoothness"]]))
    for name, title in (("quality", "Quality at equal multiply-adds"), ("timesteps", "Which timesteps")):
        if name in found:
            out.append((title, found[name]))
    return out


def validation_curves(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for every kind of run: at every step that all its seeds have, their mean and standard deviation."""
    kinds: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        losses = {str(step): loss for step, loss in row["validation loss"].items()}
        kinds.setdefault(re.sub(r"-\d+$", "", row["run"]), []).append(losses)
    found = []
    for name, curves in kinds.items():
        line: dict[str, Any] = {"run": name, "seeds": len(curves)}
        for step in curves[0]:
            values = [curve[step] for curve in curves if step in curve]
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            line[step] = f"{fmean(values):.4f}{spread}" + (f" ({len(values)})" if len(values) < len(curves) else "")
        found.append(line)
    return found


def last(values: dict[Any, Any]) -> Any:
    return list(values.values())[-1] if values else None


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table in Markdown; keys that a row lacks are left empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return "" if value is None else str(value).replace("|", "\\|")


EXPERIMENTS = {
    "convergence": convergence,
    "smoothness": smoothness,
    "quality": quality,
    "timesteps": timesteps,
}

if __name__ == "__main__":
    main()
