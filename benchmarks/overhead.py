"""What attaching costs, and how much of the saved multiply-adds is saved time.

Two questions, on random weights (speed and exactness only, never quality):

* overhead: a neutral plan against no plan on the same pipeline, and the price of one wrapped call;
* efficiency: the measured speed-up of T-GATE and DeepCache divided by the planned ratio of multiply-adds, on a U-Net
and a
  PixArt of at least 2 GMACs per evaluation and row.

Runs are interleaved (plain, A, B, plain, A, B, ...) and medians are reported. Usage:

    python benchmarks/overhead.py --runs 9 --out docs/results/overhead.json
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn

from whenwhere import DeepCache, Method, TGate, attach, plan, zoo
from whenwhere.families import UNET

STEPS = 10
TEXT, WIDTH = 77, 256


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(96, 192, 256),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    ).eval()


def pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        sample_size=32,
        num_layers=12,
        num_attention_heads=6,
        attention_head_dim=48,
        cross_attention_dim=288,
        caption_channels=WIDTH,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    ).eval()


def sd_pipeline() -> DiffusionPipeline:
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(vae, None, None, unet(), scheduler, None, None, requires_safety_checker=False)


def pixart_pipeline() -> DiffusionPipeline:
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    return PixArtAlphaPipeline(None, None, vae, pixart(), DDIMScheduler())


def caller(pipe: DiffusionPipeline) -> Callable[[], object]:
    """One generation of one image with guidance, up to the latents."""
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "tokenizer", None) is not None:
        return lambda: pipe(
            "red apple", num_inference_steps=STEPS, output_type="latent", generator=torch.Generator().manual_seed(0)
        )
    text = torch.randn(1, TEXT, WIDTH)
    kwargs = {"prompt_embeds": text, "negative_prompt_embeds": text, "num_inference_steps": STEPS}
    if isinstance(pipe, PixArtAlphaPipeline):
        mask = torch.ones(1, TEXT, dtype=torch.long)
        kwargs |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
        kwargs |= {"use_resolution_binning": False}
    return lambda: pipe(**kwargs, height=32, width=32, output_type="latent", generator=torch.Generator().manual_seed(0))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    pipe: DiffusionPipeline, settings: dict[str, tuple[Method, ...]], runs: int
) -> dict[str, dict[str, float]]:
    """Median seconds of the plain run and of each setting, and the median of the paired ratios plain / setting."""
    run = caller(pipe)
    times: dict[str, list[float]] = {name: [] for name in ("plain", *settings)}
    for turn in range(runs + 1):
        times["plain"].append(seconds(run))
        for name, methods in settings.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a neutral setting says that it changes nothing
                with attach(pipe, *methods):
                    times[name].append(seconds(run))
        if turn == 0:
            times = {name: [] for name in times}  # warm-up
    return {
        name: {
            "seconds": statistics.median(values),
            "speedup": statistics.median(p / v for p, v in zip(times["plain"], values, strict=True)),
        }
        for name, values in times.items()
    }


class Nothing(nn.Module):
    """A module whose forward costs nothing, so that only the wrapping is timed."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class Row(nn.Module):
    """A denoiser of empty layers, shaped like a U-Net's list of layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        stage = nn.Module()
        stage.resnets = nn.ModuleList(Nothing() for _ in range(layers))
        self.down_blocks = nn.ModuleList([stage])

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        for layer in self.down_blocks[0].resnets:
            sample = layer(sample)
        return sample


def evaluate(model: nn.Module, sample: torch.Tensor, scheduler: DDIMScheduler, steps: int) -> list[float]:
    """Seconds of every evaluation of a generation."""
    scheduler.set_timesteps(steps)
    values = []
    for t in scheduler.timesteps:
        values.append(seconds(lambda: model(sample)))
        scheduler.step(sample, t, sample)
    return values


def microseconds_per_call(layers: int = 200, runs: int = 200) -> dict[str, float]:
    """The price of one wrapped call: without an opinion, and with one that recalls an outline."""
    model, sample, scheduler = Row(layers), torch.zeros(2, 4), DDIMScheduler()
    results = {}
    for name, interval in (("without an opinion", 1), ("with a decision", 1000)):
        plain = statistics.median(seconds(lambda: model(sample)) for _ in range(runs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with attach(model, DeepCache(interval=interval), scheduler=scheduler, anatomy=UNET):
                values = evaluate(model, sample, scheduler, runs + 1)
        results[name] = (statistics.median(values[1:]) - plain) / layers * 1e6
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="counted runs of each setting")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument(
        "--only", default="", help="measure this model alone; the file keeps what it says of the others"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, object] = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "runs": arguments.runs,
        "steps": STEPS,
        "microseconds per wrapped call": microseconds_per_call(),
    }
    pipelines = {
        "emoji-unet": (zoo.load("emoji-unet"), {"T-GATE": (TGate(4, sp_interval=1),), "DeepCache": (DeepCache(3),)}),
        "U-Net": (sd_pipeline(), {"T-GATE": (TGate(4, sp_interval=1),), "DeepCache": (DeepCache(3),)}),
        "PixArt": (
            pixart_pipeline(),
            {"T-GATE": (TGate(4, sp_interval=1),), "T-GATE, k=2": (TGate(5, sp_interval=2, warm_up=0),)},
        ),
    }
    if arguments.only:
        pipelines = {arguments.only: pipelines[arguments.only]}
    for name, (pipe, methods) in pipelines.items():
        neutral = {"neutral T-GATE": (TGate(STEPS, sp_interval=1),)}
        if name != "PixArt":
            neutral["neutral DeepCache"] = (DeepCache(1),)
        rows = interleaved(pipe, {**neutral, **methods}, arguments.runs)
        costs = {label: plan(pipe, *chosen, steps=STEPS).cost for label, chosen in methods.items()}
        for label, cost in costs.items():
            assert cost is not None
            rows[label]["macs ratio"] = cost.ratio
            rows[label]["realised / macs ratio"] = rows[label]["speedup"] / cost.ratio
        single = plan(pipe, steps=1, guidance=False).cost
        assert single is not None
        report[name] = {"GMACs per evaluation and row": single.macs.all / 1e9, "rows": rows}
    if arguments.only and arguments.out and arguments.out.exists():
        measured = {key: report[key] for key in ("date", "runs")}
        report = json.loads(arguments.out.read_text()) | {arguments.only: report[arguments.only] | measured}
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
