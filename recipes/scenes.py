"""Train the controlled scenes: a small Stable Diffusion whose pictures can be read without error, and its students.

The teacher first, then students of 4 steps and of 1, which draw with `LCMScheduler` without guidance:

    python recipes/scenes.py --budget 3000 --out runs/scenes
    python recipes/scenes.py --student 4 --teacher runs/scenes/pipeline --budget 2400 --out runs/scenes-4
    python recipes/scenes.py --student 1 --teacher runs/scenes/pipeline --budget 2400 --out runs/scenes-1

The same line goes on with an interrupted run, and exports a finished one again.
"""

import argparse
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import emoji_unet
import torch
from diffusers import DDPMScheduler, LCMScheduler, StableDiffusionPipeline
from emoji import Emoji, export, options
from torch import nn
from transformers import CLIPTokenizer

from whenwhere.bench.drawing import draw
from whenwhere.bench.model import open_model
from whenwhere.models.patch_pca import PatchPCA
from whenwhere.train.diffusion import Batch, Draw, TrainConfig, learn, told_unet, train
from whenwhere.train.distil import DistilConfig, GuidedTeacher
from whenwhere.train.files import append_row
from whenwhere.train.latents import encode
from whenwhere.train.scenes import FACTORS, Reader, SceneOdds, draw_scenes
from whenwhere.train.state import TrainState
from whenwhere.train.words import learn_tokenizer


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on what; how long is the command line's choice."""

    network: emoji_unet.Recipe = field(
        default_factory=lambda: emoji_unet.Recipe(Emoji(text_width=128), widths=(32, 64, 96))
    )
    odds: SceneOdds = field(default_factory=SceneOdds)
    fitted: int = 2048  # pictures that the autoencoder is fitted to
    batch_size: int = 32
    least_weight: float = 1.0  # small things on a large ground: only where noise hides them does the text matter
    student_rate: float = 4e-4  # learning rate
    score_every: float = 300.0  # seconds
    scored: int = 96  # pictures
    seed: int = 0


def main() -> None:
    parser = options(__doc__, "runs/scenes")
    parser.add_argument("--student", type=int, default=0, metavar="STEPS", help="distil a student of this many steps")
    parser.add_argument("--teacher", type=Path, default=Path("runs/scenes/pipeline"))
    parser.add_argument("--start", type=Path, help="weights to start from; a student's are else the teacher's")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down
    if args.student:
        train_student(Recipe(), args)
    else:
        train_teacher(Recipe(), args)


def train_teacher(recipe: Recipe, args: argparse.Namespace) -> None:
    """A Stable Diffusion from scratch."""
    pixels = draw_scenes(recipe.fitted, torch.Generator().manual_seed(recipe.seed), recipe.odds).pixels
    pipeline = emoji_unet.build(recipe.network, PatchPCA.fit(pixels, 8), learn_words())
    pipeline.to(args.device)
    config = TrainConfig(
        budget=args.budget,
        batch_size=recipe.batch_size,
        least_weight=recipe.least_weight,
        bfloat16=args.bfloat16,
        seed=recipe.seed,
    )
    if args.start:
        begun = open_model(str(args.start), args.device, "float32").pipeline
        pipeline.unet.load_state_dict(begun.unet.state_dict())
        pipeline.text_encoder.load_state_dict(begun.text_encoder.state_dict())
    networks = (pipeline.unet, pipeline.text_encoder)
    linear = [module.weight for n in networks for module in n.modules() if isinstance(module, nn.Linear)]
    state = TrainState(*networks, config.learning_rate, config.weight_decay, config.seed, hidden=linear)
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    score = Score(pipeline, recipe, args.out, steps=20, guidance=3.0)
    train(state, noising, read_batches(pipeline, recipe), config, args.out, watch=[score])
    export(state, pipeline, args.out / "pipeline")


def train_student(recipe: Recipe, args: argparse.Namespace) -> None:
    """The teacher's U-Net once more, which learns where the guided teacher ends."""
    teacher, pipeline = (
        open_model(str(folder), args.device, "float32").pipeline
        for folder in (args.teacher, args.start or args.teacher)
    )
    pipeline.text_encoder.requires_grad_(False)
    pipeline.scheduler = LCMScheduler.from_config(teacher.scheduler.config, original_inference_steps=args.student)
    config = TrainConfig(
        budget=args.budget,
        batch_size=recipe.batch_size,
        learning_rate=recipe.student_rate,
        bfloat16=args.bfloat16,
        seed=recipe.seed,
    )
    state = TrainState(pipeline.unet, pipeline.text_encoder, config.learning_rate, config.weight_decay, config.seed)
    lessons = GuidedTeacher(
        partial(told_unet, teacher.unet, teacher.text_encoder),
        tokens(teacher.tokenizer, [""]),
        teacher.scheduler,
        read_batches(teacher, recipe),
        DistilConfig(steps=args.student, bfloat16=args.bfloat16),
    )
    score = Score(pipeline, recipe, args.out, steps=args.student, guidance=1.0)
    learn(state, lessons, config, args.out, watch=[score])
    export(state, pipeline, args.out / "pipeline")


def learn_words() -> CLIPTokenizer:
    """A tokenizer that holds every word of the captions whole."""
    return learn_tokenizer([value for values in FACTORS.values() for value in values] * 2, size=512, length=16)


def read_batches(pipeline: StableDiffusionPipeline, recipe: Recipe) -> Draw:
    """Fresh scenes in every batch."""

    def batch(size: int, generator: torch.Generator) -> Batch:
        scenes = draw_scenes(size, generator, recipe.odds)
        pixels = ((scenes.pixels + 1) * 127.5).round().byte()
        latents = encode(pipeline.vae, pixels)
        return Batch(latents, tokens(pipeline.tokenizer, scenes.captions).to(latents.device))

    return batch


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (B, T)."""
    ids: torch.Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


class Score:
    """Reads some pictures of the running mean from time to time, into `scores.jsonl`."""

    def __init__(
        self, pipeline: StableDiffusionPipeline, recipe: Recipe, out: Path, *, steps: int, guidance: float
    ) -> None:
        self.pipeline, self.every, self.out = pipeline, recipe.score_every, out
        self.steps, self.guidance = steps, guidance
        self.scenes = draw_scenes(recipe.scored, torch.Generator().manual_seed(recipe.seed + 1), recipe.odds)
        self.reader, self.last = Reader(), 0.0

    def __call__(self, state: TrainState) -> None:
        if state.seconds - self.last < self.every:
            return
        self.last = state.seconds
        self.pipeline.set_progress_bar_config(disable=True)
        seeds = range(len(self.scenes.stated))
        with state.mean.held():
            pictures = draw(
                self.pipeline, self.scenes.captions, seeds, steps=self.steps, guidance=self.guidance
            )  # in [0, 1]
        reading = self.reader(pictures * 2 - 1)
        right = (reading.factors == self.scenes.factors)[self.scenes.stated].float().mean()
        row = {
            "step": state.step,
            "seconds": round(state.seconds, 1),
            "stated factors right": round(float(right), 3),
            "error": round(float(reading.error.mean()), 4),
        }
        append_row(row, self.out / "scores.jsonl")
        print(row, flush=True)


if __name__ == "__main__":
    main()
