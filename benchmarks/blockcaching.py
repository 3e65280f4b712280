"""Block Caching beside FORA: how far the latents drift, by multiply-adds, on the small text-to-image model of the zoo.

`python benchmarks/blockcaching.py` calibrates on eight prompts with two seeds each, measures on eight others, and
rewrites the plan and the table of docs/methods/blockcaching.md, between their marks.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from whenwhere import FORA, BlockCaching, Method, attach, calibrate, plan, zoo
from whenwhere.bench.prompts import builtin_prompts
from whenwhere.train.scaleshift import train_scale_shift

MODEL = "emoji-unet"
LAYER, BRANCH = (0.15, 0.2, 0.3, 0.5), (0.15, 0.3, 0.5)  # thresholds, by granularity
INTERVALS = (2, 3, 4)
ADJUSTED = (0.3, 0.5)  # thresholds of layers that get a scale and shift


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--generations", type=int, default=100, help="at most, of training a scale and shift")
    parser.add_argument("--page", type=Path, default=Path("docs/methods/blockcaching.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, prompts, guidance = zoo.load(MODEL), builtin_prompts(MODEL), zoo.entry(MODEL).guidance

    def generate() -> None:
        for seed in (0, 1):
            latents(pipe, prompts[:8], seed, args.steps, guidance)

    with TemporaryDirectory() as folder:
        files = {granularity: Path(folder) / f"{granularity}.json" for granularity in ("layer", "branch")}
        calibrate(pipe, generate, "layer").save(files["layer"])
        calibrate(pipe, generate, "branch").save(files["branch"])
        rows = [(f"`FORA(interval={n})`", FORA(interval=n)) for n in INTERVALS]
        rows += [(name("layer", t), BlockCaching(files["layer"], threshold=t)) for t in LAYER]
        rows += [(name("branch", t), BlockCaching(files["branch"], threshold=t)) for t in BRANCH]
        for threshold in ADJUSTED:
            method = BlockCaching(files["layer"], threshold=threshold)
            adjusted = adjust(pipe, method, prompts[:8] + prompts[16:], args.steps, guidance, args.generations)
            rows.append((f"{name('layer', threshold)}, scale and shift", adjusted))
        plain = latents(pipe, prompts[8:16], 2, args.steps, guidance)
        found = [(text, *measure(pipe, method, prompts[8:16], plain, args.steps, guidance)) for text, method in rows]
        printed = str(plan(pipe, BlockCaching(files["layer"], threshold=0.5), steps=args.steps))
    lines = ["| setting | multiply-adds | distance |", "|---|---|---|"]
    lines += [f"| {text} | {ratio:.2f}x fewer | {distance:.3f} |" for text, ratio, distance in found]
    page = args.page.read_text(encoding="utf-8")
    page = between(page, "plan", f"```text\n{printed}\n```")
    args.page.write_text(between(page, "distances", "\n".join(lines)), encoding="utf-8")


def name(granularity: str, threshold: float) -> str:
    return f'`BlockCaching`, "{granularity}", δ = {threshold:g}'


def adjust(
    pipe: Any, method: BlockCaching, prompts: Sequence[str], steps: int, guidance: float, generations: int
) -> BlockCaching:
    """The method with a scale and shift that were trained on four random prompts a generation."""

    def generate(number: int) -> None:
        seed = number + 1000
        picks = torch.randint(len(prompts), (4,), generator=torch.Generator().manual_seed(seed))
        latents(pipe, [prompts[pick] for pick in picks.tolist()], seed, steps, guidance)

    found = train_scale_shift(
        pipe, method, generate, generations=generations, held_out=2, watch=lambda *told: print(*told, flush=True)
    )
    return replace(method, scale_shift=found)


def measure(
    pipe: Any, method: Method, prompts: Sequence[str], plain: Tensor, steps: int, guidance: float
) -> tuple[float, float]:
    """How many times fewer multiply-adds, and the distance of the latents relative to the plain ones, in the mean."""
    with attach(pipe, method) as attached:
        own = latents(pipe, prompts, 2, steps, guidance)
    cost = attached.plan.cost
    assert cost is not None  # a pipeline's own denoiser is always priced
    return cost.ratio, fmean(float((a - b).norm() / b.norm()) for a, b in zip(own, plain, strict=True))


def latents(pipe: Any, prompts: Sequence[str], seed: int, steps: int, guidance: float) -> Tensor:
    """The final latents (B, C, H, W), every prompt from this seed."""
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    found: Tensor = pipe(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="latent",
    ).images
    return found


def between(page: str, mark: str, text: str) -> str:
    """The page with a text between its marks."""
    marks = re.compile(rf"(<!-- measured: {mark} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marks.search(page):
        raise ValueError(f"the page has no place for it: write <!-- measured: {mark} --> and <!-- end --> into it.")
    return marks.sub(lambda m: f"{m[1]}{text}\n{m[2]}", page)


if __name__ == "__main__":
    main()
