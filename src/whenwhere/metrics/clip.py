"""CLIP score (Hessel et al., 2021, https://arxiv.org/abs/2104.08718) on a CLIP model that the user has.

torchmetrics has this score too, but its 1.9 does not work with transformers 5, whose models return objects.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class ClipScore:
    """100 times the cosine of picture and prompt, not below 0; the scale that papers on text-to-image models print."""

    def __init__(self, folder: str) -> None:
        """Load a model.

        Args:
            folder: as `CLIPModel.save_pretrained` and `CLIPProcessor.save_pretrained` write it.

        Raises:
            ValueError: the folder holds no CLIP model.
        """
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        if not Path(folder).is_dir():
            raise ValueError(f"there is no folder {folder} with a CLIP model; models are not downloaded.")
        try:
            self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self._pictures: Any = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            self._words: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises anything from OSError to KeyError
            raise ValueError(f"{folder} holds no CLIP model: {' '.join(str(error).split())}") from error

    @torch.no_grad()
    def __call__(self, picture: Tensor, prompt: str) -> float:
        """The score of a picture (3, H, W) in [0, 1] and its prompt; words beyond the model's length are cut."""
        read = self._words([prompt], truncation=True, return_tensors="pt")
        images = self._describe(picture[None])
        texts = self._model.get_text_features(**read).pooler_output
        return max(0.0, 100 * float(functional.cosine_similarity(images, texts)[0]))

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Features (B, F) of uint8 pictures (B, 3, H, W), for distances between sets."""
        return self._describe(pictures / 255)

    def _describe(self, pictures: Tensor) -> Tensor:
        """The projected features (B, F) of pictures in [0, 1]."""
        seen = self._pictures(pictures, do_rescale=False, return_tensors="pt")
        found: Tensor = self._model.get_image_features(**seen).pooler_output
        return found
