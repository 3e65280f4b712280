"""Distil a model of emoji to few steps: one student draws in 4, in 2 and in 1, without guidance, with `LCMScheduler`.

It begins as its teacher, `emoji-unet` or `emoji-pixart` or a folder with such a pipeline, and learns where the teacher
ends that is guided with 3. The same line goes on with an interrupted run, and exports a finished one again:

    python recipes/emoji_student.py emoji-unet --budget 2100 --bfloat16 --compile --out runs/emoji-unet-lcm
    python recipes/emoji_student.py emoji-pixart --budget 2100 --bfloat16 --compile --out runs/emoji-pixart-lcm
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, LCMScheduler
from emoji import Emoji, Preview, export, options, read_batches
from emoji_pixart import told_pixart
from scenes import tokens
from torch import Tensor, nn

from whenwhere.bench.model import open_model
from whenwhere.finding import denoiser_of
from whenwhere.train.diffusion import DenoiserInput, Told, TrainConfig, learn, told_unet
from whenwhere.train.distil import DistilConfig, GuidedTeacher
from whenwhere.train.state import TrainState

READERS: dict[str, Callable[..., Told]] = {
    "StableDiffusionPipeline": told_unet,
    "PixArtAlphaPipeline": told_pixart,
}


@dataclass(frozen=True)
class Recipe:
    """What is taught, and how; how long is the command line's choice."""

    emoji: Emoji = field(default_factory=Emoji)
    steps: int = 4
    noisiest: float = 0.4  # of the answers: all that a single step uses
    guidance: float = 3.0
    teacher_steps: int = 12
    reuse: int = 12
    batch_size: int = 32
    learning_rate: float = 4e-4
    preview_every: float = 600.0  # seconds
    seed: int = 0


def main() -> None:
    parser = options(__doc__, "runs/emoji-unet-lcm")
    parser.add_argument("teacher", help="a name of the zoo, or the folder of a pipeline")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down
    train_student(Recipe(), args)


def train_student(recipe: Recipe, args: argparse.Namespace) -> None:
    """The teacher's network once more, which learns where the guided teacher ends; its text encoder stays."""
    teacher, student = (open_model(args.teacher, args.device, "float32").pipeline for _ in range(2))
    student.text_encoder.requires_grad_(False)
    student.scheduler = LCMScheduler.from_config(teacher.scheduler.config, original_inference_steps=recipe.steps)
    if args.compile:
        denoiser_of(teacher).compile(dynamic=False)
        denoiser_of(student).compile(dynamic=False)
    config = TrainConfig(
        budget=args.budget,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        bfloat16=args.bfloat16,
        seed=recipe.seed,
    )
    state = begin(student, config)
    lessons = ask(teacher, recipe, args.bfloat16)
    told = READERS[type(teacher).__name__]

    def answer(state: TrainState, given: DenoiserInput, input_ids: Tensor) -> Tensor:
        return told(state.denoiser, state.text_encoder, input_ids)(given.noisy, given.timesteps)

    watch = [Preview(student, recipe.preview_every, args.out, steps=steps, guidance=1.0) for steps in (recipe.steps, 1)]
    learn(state, lessons, config, args.out, answer=answer, watch=watch)
    export(state, student, args.out / "pipeline")


def begin(student: DiffusionPipeline, config: TrainConfig) -> TrainState:
    """The run of a student; Muon teaches the linear layers of its blocks."""
    denoiser: Any = denoiser_of(student)
    named = denoiser.named_modules()
    hidden = [module.weight for name, module in named if isinstance(module, nn.Linear) and "block" in name]
    return TrainState(
        denoiser, student.text_encoder, config.learning_rate, config.weight_decay, config.seed, hidden=hidden
    )


def ask(teacher: DiffusionPipeline, recipe: Recipe, bfloat16: bool) -> GuidedTeacher:
    """Lessons on the training pictures."""
    return GuidedTeacher(
        partial(READERS[type(teacher).__name__], denoiser_of(teacher), teacher.text_encoder),
        tokens(teacher.tokenizer, [""]),
        teacher.scheduler,
        read_batches(recipe.emoji, teacher.vae, teacher.tokenizer),
        DistilConfig(
            steps=recipe.steps,
            noisiest=recipe.noisiest,
            guidance=recipe.guidance,
            teacher_steps=recipe.teacher_steps,
            reuse=recipe.reuse,
            bfloat16=bfloat16,
        ),
    )


if __name__ == "__main__":
    main()
