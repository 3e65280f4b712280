"""Pictures with class numbers, as a class-conditional model learns from them: no words, only which concept it is."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from whenwhere.train.data import Picture


class LabelledBatch(NamedTuple):
    """What one step learns from."""

    latents: Tensor  # (B, C, H, W), unit variance
    labels: Tensor  # (B,)


DrawLabelled = Callable[[int, torch.Generator], LabelledBatch]


def class_numbers(pictures: Sequence[Picture]) -> dict[str, int]:
    """A number for every label, from 0, in the order in which the labels first occur."""
    return {label: number for number, label in enumerate(dict.fromkeys(picture.label for picture in pictures))}


def label(pictures: Sequence[Picture], latents: Tensor, numbers: dict[str, int]) -> LabelledBatch:
    """All pictures at once; `latents` (B, C, H, W) are theirs, in their order.

    Raises:
        ValueError: another number of latents than of pictures.
        KeyError: a picture of a concept that has no number.
    """
    if len(pictures) != len(latents):
        raise ValueError(f"{len(pictures)} pictures, but {len(latents)} latents")
    return LabelledBatch(latents, torch.tensor([numbers[picture.label] for picture in pictures], device=latents.device))


def labelled_drawer(known: LabelledBatch) -> DrawLabelled:
    """A function that draws random batches of these pictures, with replacement."""

    def draw(size: int, generator: torch.Generator) -> LabelledBatch:
        picks = torch.randint(len(known.labels), (size,), generator=generator).to(known.labels.device)
        return LabelledBatch(known.latents[picks], known.labels[picks])

    return draw
