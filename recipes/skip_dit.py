"""Train class-conditional emoji: a DiT, a Skip-DiT, or a wider DiT that costs what the skips cost.

The same line goes on with an interrupted run, and exports a finished one again. `accelerate launch` in place of
`python` uses all GPUs. Runs with one seed see the same pictures, noise and timesteps at every step.

    python recipes/skip_dit.py dit --budget 3600 --steps 8000 --out runs/dit
    python recipes/skip_dit.py skip --budget 3600 --steps 8000 --out runs/skip
    python recipes/skip_dit.py wide --budget 3600 --steps 8000 --out runs/wide
    python recipes/skip_dit.py skip --start runs/dit/pipeline --skips-first 500 --budget 1200 --out runs/two-stage
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from emoji import add_speed, halve
from PIL import Image
from torch import nn

from whenwhere.models import SkipDiTTransformer2DModel
from whenwhere.models.patch_pca import PatchPCA
from whenwhere.train.class_diffusion import ClassTraining, train_classes
from whenwhere.train.class_run import ClassRun
from whenwhere.train.classes import class_numbers, label, labelled_drawer
from whenwhere.train.data import Split, read_pictures, read_tiles, to_unit, withhold
from whenwhere.train.latents import encode
from whenwhere.train.skip import initialise


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on what; the command line changes it."""

    data: Path = Path("data/emoji")
    concepts: Path = Path("data/emoji/clear.txt")  # the classes; all styles are examples of a class
    withheld: int = 30  # concepts that lose one style, for validation
    latent_channels: int = 8
    layers: int = 12
    heads: int = 4
    head_width: int = 32
    # Six skips of 12 blocks add 8.3 % to the products with weights; 132 for 128 adds 6.3 %, and more weights. Positions
    # need a multiple of 4, and 136 would add 12.9 %.
    wide_head_width: int = 33
    skip_pairs: int | None = None  # all of them
    fusion: str = "replace"
    learned_variance: bool = False  # DiT's loss: noise and variance on linear betas, instead of a velocity
    seed: int = 0


def main() -> None:
    args = arguments()
    recipe = Recipe(fusion=args.fusion, skip_pairs=args.skip_pairs, learned_variance=args.learned_variance)
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down
    labels = recipe.concepts.read_text(encoding="utf-8").split("\n")[:-1]
    split = withhold(read_pictures(recipe.data, labels), recipe.withheld, recipe.seed)
    pixels = [read_tiles(recipe.data, part) for part in split]
    vae = PatchPCA.fit(to_unit(pixels[0]), recipe.latent_channels)
    pipeline = build(args.model, recipe, vae, args.seed, args.start, class_numbers(split.training))
    config = ClassTraining(
        budget=args.budget,
        steps=args.steps,
        batch_size=args.batch,
        learning_rate=args.learning_rate,
        least_weight=args.least_weight,
        skips_first=args.skips_first,
        patience=args.patience,
        fusion_limit=args.fusion_limit,
        fusion_weight=args.fusion_weight,
        bfloat16=args.bfloat16,
        checkpointing=args.checkpointing,
        validate_every=args.validate,
        snapshot_every=args.snapshots,
        seed=args.seed,
    )
    if args.compile:
        pipeline.transformer.compile(dynamic=False)
    run = fit(pipeline, split, pixels, config, args.out)
    if not run.accelerator.is_main_process:
        return
    export(run, pipeline, args.out / "pipeline")
    notes = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(recipe).items()}
    about = {"model": args.model, "start": str(args.start or ""), "recipe": notes, "training": asdict(config)}
    for key, value in about["training"].items():  # JSON knows no infinity
        about["training"][key] = None if value == float("inf") else value
    about |= {"steps": run.step, "seconds": run.seconds, "stage": run.stage}
    (args.out / "run.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    draw(args.out / "pipeline", args.out / "preview.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("dit", "skip", "wide"))
    parser.add_argument("--budget", type=float, required=True, help="seconds of training, over all resumed runs")
    parser.add_argument("--steps", type=float, default=float("inf"), help="steps after which it ends in any case")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    add_speed(parser)
    parser.add_argument("--least-weight", type=float, default=ClassTraining.least_weight, help="of noisy timesteps")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--validate", type=int, default=500, help="steps from one validation loss to the next")
    parser.add_argument("--snapshots", type=int, default=0, help="keep the mean of the weights every so many steps")
    parser.add_argument("--learned-variance", action="store_true", help="DiT's own loss")
    parser.add_argument("--start", type=Path, help="pipeline folder of a trained DiT to go on from, or to add skips to")
    parser.add_argument("--fusion", choices=("replace", "residual_zero"), default="replace")
    parser.add_argument("--skip-pairs", type=int, help="outermost pairs only")
    parser.add_argument("--skips-first", type=int, default=0, help="steps of a first stage that trains the skips alone")
    parser.add_argument("--patience", type=int, default=0, help="validations without improvement that end it earlier")
    parser.add_argument("--fusion-limit", type=float, default=0.0, help="ours: penalise larger spectral norms")
    parser.add_argument("--fusion-weight", type=float, default=0.01, help="of the penalty; inf makes it a hard limit")
    return parser.parse_args()


def build(
    model: str, recipe: Recipe, vae: PatchPCA, seed: int, start: Path | None, numbers: dict[str, int]
) -> DiTPipeline:
    """The pipeline to be trained; its weights come from the seed, or from a trained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = convert(start, recipe, model == "skip") if start else new(model, recipe, seed)
    betas = {} if recipe.learned_variance else {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    scheduler = DDIMScheduler(
        clip_sample=False,
        timestep_spacing="trailing",  # the first step then starts at pure noise, as in training
        **({"beta_start": 1e-4} | betas),
    )
    names = {number: label for label, number in numbers.items()}
    pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler, id2label=names)
    pipeline.register_to_config(id2label=names)  # so that a saved pipeline knows its classes
    return pipeline


def new(model: str, recipe: Recipe, seed: int) -> DiTTransformer2DModel:
    """An untrained network with DiT's initialisation."""
    size = {
        "num_attention_heads": recipe.heads,
        "attention_head_dim": recipe.wide_head_width if model == "wide" else recipe.head_width,
        "in_channels": recipe.latent_channels,
        "out_channels": recipe.latent_channels * (2 if recipe.learned_variance else 1),
        "num_layers": recipe.layers,
        "sample_size": 16,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,  # more than there are classes: DiTPipeline takes number 1000 for none
    }
    skips = {"skip_pairs": recipe.skip_pairs, "fusion": recipe.fusion}
    network = SkipDiTTransformer2DModel(**size, **skips) if model == "skip" else DiTTransformer2DModel(**size)
    initialise(network, torch.Generator().manual_seed(seed))
    return network


def convert(start: Path, recipe: Recipe, skips: bool) -> DiTTransformer2DModel:
    """A trained DiT, as it is or with new long skips."""
    trained = DiTTransformer2DModel.from_pretrained(start / "transformer", dtype=torch.float32)
    return SkipDiTTransformer2DModel.from_dit(trained, recipe.skip_pairs, recipe.fusion) if skips else trained


def fit(pipeline: DiTPipeline, split: Split, pixels: list[torch.Tensor], config: ClassTraining, out: Path) -> ClassRun:
    """Train the transformer of a pipeline in place."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline.vae.to(device)
    numbers = class_numbers(split.training)
    known, apart = (
        label(part, encode(pipeline.vae, values), numbers) for part, values in zip(split, pixels, strict=True)
    )
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    return train_classes(pipeline.transformer, noising, labelled_drawer(known), apart, config, out)


def export(run: ClassRun, pipeline: DiTPipeline, folder: Path) -> None:
    """Save the pipeline with the running mean as its weights, in half precision."""
    run.model.eval()
    with run.mean.held():
        forget_unused(pipeline.to("cpu").transformer, len(pipeline.labels))
        pipeline.save_pretrained(folder, safe_serialization=True)
    halve(folder)


def forget_unused(model: nn.Module, classes: int) -> None:
    """Zeros for the classes that were never shown, so that files shrink when packed; the last row is that of none."""
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.embedding_table.weight.data[classes:-1] = 0


def draw(folder: Path, file: Path, classes: int = 48) -> None:
    """A grid of samples from a saved pipeline, with the last weights of the running mean."""
    pipeline = DiTPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(list(range(classes)), num_inference_steps=20, guidance_scale=3.0, generator=generator).images
    sheet = Image.new("RGB", (8 * 64, (classes + 7) // 8 * 64))
    for number, image in enumerate(images):
        sheet.paste(image.resize((64, 64), Image.Resampling.NEAREST), (number % 8 * 64, number // 8 * 64))
    sheet.save(file)


if __name__ == "__main__":
    main()
