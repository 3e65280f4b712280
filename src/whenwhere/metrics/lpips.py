"""LPIPS (Zhang et al., 2018, https://arxiv.org/abs/1801.03924) by torchmetrics, on weights that are already there."""

from pathlib import Path

import torch
from torch import Tensor

NETWORKS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


class Lpips:
    """The distance of two pictures; 0 for identical ones."""

    def __init__(self, network: str) -> None:
        """Load a network.

        Raises:
            ValueError: no such network, or its weights are not in PyTorch's cache.
            ImportError: torchmetrics or torchvision is missing.
        """
        if network not in NETWORKS:
            raise ValueError(f"LPIPS knows the networks {', '.join(NETWORKS)}, not {network!r}.")
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
            from torchvision.models import get_model_weights
        except (ImportError, RuntimeError) as error:  # a torchvision for another PyTorch raises the latter
            raise ImportError(
                f"LPIPS needs torchvision beside the extra: pip install 'whenwhere[metrics]' torchvision ({error})"
            ) from error
        url: str = get_model_weights(NETWORKS[network]).DEFAULT.url
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not file.is_file():
            raise ValueError(f"LPIPS needs the weights of {NETWORKS[network]}: download {url} to {file}.")
        self._measure = LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True)

    @torch.no_grad()
    def __call__(self, picture: Tensor, plain: Tensor) -> float:
        """The distance of two pictures (3, H, W) in [0, 1], of at least 64 x 64 pixels."""
        if min(picture.shape[-2:]) < 64:
            raise ValueError(f"LPIPS needs pictures of at least 64 x 64 pixels, got {tuple(picture.shape[-2:])}.")
        self._measure.reset()
        return float(self._measure(picture[None], plain[None]))
