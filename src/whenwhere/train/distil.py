"""Few-step students by regression on a guided teacher: the end of the teacher's way is asked for in one step.

Real latents are noised to one of the student's timesteps. From there the teacher goes to the end in several guided DDIM
steps; the student learns the velocity that leads there at once, as a consistency model does (Luo et al., 2023,
https://arxiv.org/abs/2310.04378, with the solver's whole way in place of one step of it). `LCMScheduler` draws with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from whenwhere.train.diffusion import DenoiserInput, Draw, Lesson, Told, precision

Tell = Callable[[Tensor], Told]  # captions (B, T) -> a denoiser that has read them


@dataclass(frozen=True)
class DistilConfig:
    """What the teacher does, and how often its answers are used."""

    steps: int = 4  # of the student
    noisiest: float = 0.25  # share of the answers at the noisiest timestep, all that one step uses; the rest in turn
    guidance: float = 3.0  # of the teacher, fixed in the student
    teacher_steps: int = 16  # from pure noise; in proportion from other timesteps
    chunk: int = 128  # answers made at a time
    reuse: int = 8  # how often an answer is learned from, on average
    capacity: int = 16384  # answers kept; the oldest go
    bfloat16: bool = False


class GuidedTeacher:
    """Lessons for a student, from a pool of the teacher's answers."""

    def __init__(
        self,
        tell: Tell,
        null_ids: Tensor,  # (1, T), the empty caption
        scheduler: DDIMScheduler,
        draw: Draw,
        config: DistilConfig,
    ) -> None:
        self.tell, self.null_ids = tell, null_ids
        self.draw, self.config = draw, config
        self.noising = DDPMScheduler.from_config(scheduler.config)
        self.timesteps = student_timesteps(self.noising.config.num_train_timesteps, config.steps)
        self.pool: list[Lesson] = []  # one of each answer
        self.made, self.left = 0, 0

    def __call__(self, size: int, generator: torch.Generator) -> Lesson:
        """Random answers out of the pool; new ones come in when the present ones were used often enough."""
        while self.left < size:
            self.refill(generator)
        self.left -= size
        picks = torch.randint(len(self.pool), (size,), generator=generator).tolist()
        return stack([self.pool[pick] for pick in picks])

    def refill(self, generator: torch.Generator) -> None:
        """Add one chunk of answers at the next of the student's timesteps."""
        timestep = self.timesteps[turn(self.made, len(self.timesteps), self.config.noisiest)]
        lesson = self.answer(self.config.chunk, timestep, generator)
        self.pool += split(lesson)
        del self.pool[: -self.config.capacity]
        self.made += 1
        self.left += self.config.chunk * self.config.reuse

    @torch.no_grad()
    def answer(self, size: int, timestep: int, generator: torch.Generator) -> Lesson:
        """Noise pictures to a timestep, and follow the teacher from there."""
        batch = self.draw(size, generator)
        latents, device = batch.latents, batch.latents.device
        noise = torch.randn(latents.shape, generator=generator).to(device)
        timesteps = torch.full((size,), timestep, device=device)
        noisy = self.noising.add_noise(latents, noise, timesteps)
        with precision(device.type, self.config.bfloat16):
            end = self.follow(noisy, batch.input_ids, timestep)
        kept = self.noising.alphas_cumprod[timestep].to(device)
        return Lesson(
            DenoiserInput(
                noisy=noisy,
                timesteps=timesteps,
                velocity=(kept.sqrt() * noisy - end) / (1 - kept).sqrt(),
                weights=(1 - kept).expand(size),  # the loss is then that of the picture
            ),
            batch.input_ids,
        )

    def follow(self, noisy: Tensor, input_ids: Tensor, timestep: int) -> Tensor:
        """The end of the teacher's guided way from noisy latents (B, C, H, W)."""
        size, total = len(noisy), self.noising.config.num_train_timesteps
        ids = torch.cat([self.null_ids.to(input_ids.device).expand(size, -1), input_ids])
        told = self.tell(ids)
        count = max(2, round(self.config.teacher_steps * (timestep + 1) / total))
        levels = torch.linspace(timestep, -1, count + 1).round().long().tolist()
        kept = [*self.noising.alphas_cumprod[levels[:-1]].tolist(), 1.0]
        for level, (now, then) in zip(levels[:-1], pairwise(kept), strict=True):
            timesteps = torch.full((2 * size,), level, device=noisy.device)
            without, with_caption = told(noisy.repeat(2, 1, 1, 1), timesteps).float().chunk(2)
            velocity = without + self.config.guidance * (with_caption - without)
            picture = now**0.5 * noisy - (1 - now) ** 0.5 * velocity
            noise = (1 - now) ** 0.5 * noisy + now**0.5 * velocity
            noisy = then**0.5 * picture + (1 - then) ** 0.5 * noise
        return noisy


def student_timesteps(total: int, steps: int) -> list[int]:
    """Where `LCMScheduler(original_inference_steps=steps)` evaluates: 999, 749, 499, 249 for 4 of 1000."""
    return [total * (steps - number) // steps - 1 for number in range(steps)]


def turn(made: int, count: int, noisiest: float) -> int:
    """Which of `count` timesteps is next after `made` ones: the first in its share of turns, the others in order."""
    first = math.ceil(made * noisiest)  # turns of the first so far
    if count == 1 or math.ceil((made + 1) * noisiest) > first:
        return 0
    return 1 + (made - first) % (count - 1)


def split(lesson: Lesson) -> list[Lesson]:
    """One lesson for each row."""
    rows = zip(*lesson.given, lesson.input_ids, strict=True)
    return [Lesson(DenoiserInput(*given), ids) for *given, ids in rows]


def stack(lessons: list[Lesson]) -> Lesson:
    """The rows together."""
    given = [torch.stack(part) for part in zip(*(lesson.given for lesson in lessons), strict=True)]
    return Lesson(DenoiserInput(*given), torch.stack([lesson.input_ids for lesson in lessons]))
