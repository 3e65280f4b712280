"""How well pictures agree with prompts: two small heads over frozen features meet in one space, as in CLIP.

The heads were trained by `recipes/alignment.py` on emoji and judge emoji-like pictures only. The score is a cosine:
near 0 for a wrong prompt, the higher the better; read it beside the score of real pictures.
"""

from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional

from whenwhere.metrics.features import PictureFeatures, SentenceFeatures, as_bytes

WEIGHTS = Path(__file__).with_name("alignment.safetensors")


class AlignmentHeads(nn.Module):
    """Features of pictures (B, 1280) and of sentences (B, 384) -> unit vectors (B, 256) of a common space."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Linear(1280, 512), nn.GELU(), nn.Linear(512, 256))
        self.sentence = nn.Sequential(nn.Linear(384, 256), nn.GELU(), nn.Linear(256, 256))

    def forward(self, pictures: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides, each of length one."""
        return functional.normalize(self.picture(pictures), dim=-1), functional.normalize(
            self.sentence(sentences), dim=-1
        )


def load_heads(path: Path = WEIGHTS) -> AlignmentHeads:
    """The trained heads in float32."""
    heads = AlignmentHeads().half()
    load_model(heads, path)
    return heads.float().eval().requires_grad_(False)


def contrast(pictures: Tensor, sentences: Tensor, temperature: float = 0.05) -> Tensor:
    """CLIP's symmetric loss of B matching unit vectors (B, D): each must find its partner among all."""
    likeness = pictures @ sentences.T / temperature  # (B, B)
    partner = torch.arange(len(pictures), device=pictures.device)
    return (functional.cross_entropy(likeness, partner) + functional.cross_entropy(likeness.T, partner)) / 2


def cosines(pictures: Tensor, sentences: Tensor) -> Tensor:
    """The cosine of each pair, (B,), of vectors (B, D)."""
    return functional.cosine_similarity(pictures, sentences, dim=-1)


def recall(pictures: Tensor, sentences: Tensor, answers: Tensor, among: int = 1) -> float:
    """The share of pictures (B, D) whose right sentence, `answers` (B,), is among the nearest of all (S, D)."""
    nearest = (pictures @ sentences.T).topk(among, dim=1).indices  # (B, among)
    return float((nearest == answers[:, None]).any(dim=1).float().mean())


class Alignment:
    """The score of prompts and pictures, ready to use; needs the `metrics` extra and the MiniLM package."""

    def __init__(self) -> None:
        self.picture_features = PictureFeatures()
        self.sentence_features = SentenceFeatures()
        self.heads = load_heads()

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """One cosine in [-1, 1] per pair of a uint8 picture (B, 3, H, W) and a prompt: (B,)."""
        if len(pictures) != len(prompts):
            raise ValueError(f"every picture needs its prompt: {len(pictures)} pictures, {len(prompts)} prompts")
        return cosines(*self.heads(self.picture_features(pictures), self.sentence_features(prompts)))


def agreement(score: Alignment, picture: Tensor, prompt: str) -> float:
    """The cosine of one picture (3, H, W) in [0, 1] and its prompt."""
    return float(score(as_bytes(picture), [prompt])[0])
