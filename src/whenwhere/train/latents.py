"""From captioned pictures to the batches of a latent model; pictures are encoded once, captions drawn each time."""

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from whenwhere.models.patch_pca import PatchPCA
from whenwhere.train.data import CaptionOdds, Picture, caption, to_unit
from whenwhere.train.diffusion import Batch, Draw


def encode(vae: PatchPCA, pixels: Tensor) -> Tensor:
    """Latents (B, C, H/2, W/2) of unit variance, of uint8 pictures (B, 3, H, W), on the autoencoder's device."""
    with torch.no_grad():
        parts = [vae.encode(to_unit(part).to(vae.device), return_dict=False)[0] for part in torch.split(pixels, 256)]
    scaled: Tensor = torch.cat(parts) * vae.config.scaling_factor
    return scaled


def drawer(pictures: list[Picture], latents: Tensor, tokenizer: CLIPTokenizer, odds: CaptionOdds) -> Draw:
    """A function that draws random batches with fresh captions, repainted pictures as often as the odds say."""
    own = [number for number, picture in enumerate(pictures) if not picture.repainted]
    painted = [number for number, picture in enumerate(pictures) if picture.repainted] or own

    def draw(size: int, generator: torch.Generator) -> Batch:
        picks = []
        for share in torch.rand(size, generator=generator).tolist():
            pool = painted if share < odds.repainted else own
            picks.append(pool[int(torch.randint(len(pool), (), generator=generator))])
        texts = [caption(pictures[pick], odds, generator) for pick in picks]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return Batch(latents[picks], ids.to(latents.device))

    return draw
