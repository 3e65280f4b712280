"""What NAG costs in seconds, next to what it costs in multiply-adds: the models of the zoo, and three of middle size.

SDXL-, SD3- and Flux-shaped networks have random weights (speed only, never quality) and draw one picture; the zoo's
pipelines draw eight. No guidance. Runs are interleaved (plain, NAG, plain, NAG, ...), and the medians of paired ratios
are reported. Usage:

    python benchmarks/nag_overhead.py --runs 5 --out docs/results/nag-overhead.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from whenwhere import NAG, attach, zoo
from whenwhere.bench.drawing import draw
from whenwhere.bench.environment import Environment
from whenwhere.bench.prompts import builtin_prompts
from whenwhere.pricing.cost import count

STEPS, TEXT, WIDTH, POOLED = 4, 77, 768, 256


def sdxl() -> tuple[nn.Module, dict[str, Any]]:
    """SDXL's shape at a third of its width, on latents of 32 x 32."""
    model = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(96, 192, 384),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 5),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + POOLED,
    )
    added = {"text_embeds": torch.randn(1, POOLED), "time_ids": torch.zeros(1, 6)}
    return model, {"sample": torch.randn(1, 4, 32, 32), "added_cond_kwargs": added}


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    """SD3's shape, 8 blocks of width 512, on latents of 32 x 32."""
    model = SD3Transformer2DModel(
        sample_size=32,
        num_layers=8,
        num_attention_heads=8,
        attention_head_dim=64,
        joint_attention_dim=WIDTH,
        caption_projection_dim=512,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=64,
    )
    return model, {"hidden_states": torch.randn(1, 16, 32, 32), "pooled_projections": torch.randn(1, POOLED)}


def flux() -> tuple[nn.Module, dict[str, Any]]:
    """Flux's shape, 4 and 8 blocks of width 512, on 256 tokens of the image."""
    model = FluxTransformer2DModel(
        num_layers=4,
        num_single_layers=8,
        num_attention_heads=8,
        attention_head_dim=64,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(8, 28, 28),
    )
    inputs = {"hidden_states": torch.randn(1, 256, 64), "pooled_projections": torch.randn(1, POOLED)}
    return model, inputs | {"img_ids": torch.zeros(256, 3), "txt_ids": torch.zeros(TEXT, 3)}


def generation(model: nn.Module, inputs: dict[str, Any], scheduler: Any) -> Callable[[], None]:
    """A function that runs all steps of one generation, without a pipeline."""
    text, sample = torch.randn(1, TEXT, WIDTH), next(iter(inputs.values()))

    @torch.no_grad()
    def run() -> None:
        scheduler.set_timesteps(STEPS)
        for timestep in scheduler.timesteps:
            model(**inputs, encoder_hidden_states=text, timestep=timestep.expand(1))
            scheduler.step(sample, timestep, sample)

    return run


@dataclass(frozen=True)
class Case:
    """A network, one generation of it, and what guides it."""

    model: nn.Module
    run: Callable[[], object]
    guide: Callable[[], AbstractContextManager[Any]]


def shaped(make: Callable[[], tuple[nn.Module, dict[str, Any]]], negative: Tensor) -> Case:
    """A network of random weights."""
    model, inputs = make()
    model = model.eval().requires_grad_(False)
    scheduler: Any = DDIMScheduler() if isinstance(model, UNet2DConditionModel) else FlowMatchEulerDiscreteScheduler()
    method = NAG(negative_prompt_embeds=negative)
    return Case(
        model,
        generation(model, inputs, scheduler),
        lambda: attach(model, method, scheduler=scheduler, guidance=False),
    )


def trained(name: str) -> Case:
    """A pipeline of the zoo."""
    pipe, prompts = zoo.load(name), builtin_prompts(name)[:8]
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return Case(
        model,
        lambda: draw(pipe, prompts, range(8), STEPS, 1.0),
        lambda: attach(pipe, NAG(negative_prompt="red"), guidance=False),
    )


def measure(case: Case, runs: int) -> dict[str, float]:
    """Seconds and multiply-adds of a generation, plain and with NAG."""
    model, run = case.model, case.run
    times, macs = [], []
    for turn in range(runs + 1):
        pair = []
        for guided in (False, True):
            if guided:
                with case.guide():
                    pair.append(timed(run))
                    if turn == 0:
                        macs.append(count(run, model)[1].all)
            else:
                pair.append(timed(run))
                if turn == 0:
                    macs.append(count(run, model)[1].all)
        times.append(pair)
    plain, nag = (statistics.median(column) for column in zip(*times[1:], strict=True))
    ratio = statistics.median(guided / alone for alone, guided in times[1:])
    return {
        "parameters, M": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "plain, seconds": round(plain, 3),
        "NAG, seconds": round(nag, 3),
        "seconds ratio": round(ratio, 3),
        "MACs ratio": round(macs[1] / macs[0], 4),
    }


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs, plain and guided each")
    parser.add_argument("--quiet", action="store_true", help="say that nothing else ran on the machine")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    negative = torch.randn(1, TEXT, WIDTH)
    report: dict[str, Any] = {"environment": asdict(Environment.here(torch.device("cpu")))}
    report |= {"machine was quiet": arguments.quiet, "steps": STEPS, "runs": arguments.runs}
    cases = {make.__name__: partial(shaped, make, negative) for make in (sdxl, sd3, flux)}
    cases |= {name: partial(trained, name) for name in ("emoji-unet", "emoji-pixart")}
    for name, make_case in cases.items():
        report[name] = measure(make_case(), arguments.runs)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
