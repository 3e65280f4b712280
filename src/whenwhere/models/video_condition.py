"""What a video transformer is conditioned on, as the numbers its blocks read: timestep and text, or timestep and class.

Both conditions give the same three things: the modulation of the blocks, the shift and scale of the last layer, and the
text for cross-attention, if there is any.
"""

import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn
from torch.nn import functional

Condition = tuple[Tensor, Tensor, Tensor | None]


class TextCondition(nn.Module):
    """Timestep and text: one linear layer makes the modulation (B, 6D) of all blocks, which add a table of their own.

    The names of the weights are those in diffusers' Latte.
    """

    def __init__(self, width: int, caption_channels: int) -> None:
        super().__init__()
        self.adaln_single = AdaLayerNormSingle(width, use_additional_conditions=False)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, width)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, timestep: Tensor, text: Tensor | None, dtype: torch.dtype) -> Condition:
        """Modulation (B, 6D), shift and scale (B, 2, D), and projected text (B, T, D).

        Raises:
            ValueError: there is no text.
        """
        if text is None:
            raise ValueError("the model was made for text: encoder_hidden_states (B, T, caption_channels) is missing.")
        unused = {"resolution": None, "aspect_ratio": None}
        modulation, embedded = self.adaln_single(timestep, unused, batch_size=len(timestep), hidden_dtype=dtype)
        return modulation, self.scale_shift_table[None] + embedded[:, None], self.caption_projection(text)


class ClassCondition(nn.Module):
    """Timestep and class, added; blocks and the last layer make their modulation of it (DiT's adaLN-Zero).

    `num_classes` classes and, as the last row of the table, no class; 0 for a model without condition.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        # Frequencies 10000^(-i / 128), as in DiT's own code; diffusers' class condition divides by 127.
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, width)
        self.class_embedder = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.proj_out = nn.Linear(width, 2 * width)

    def forward(self, timestep: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Condition:
        """The condition (B, D), shift and scale (B, 2, D), and no text.

        Raises:
            ValueError: labels are missing, or given to a model without classes.
        """
        if (labels is None) != (self.class_embedder is None):
            raise ValueError("class_labels (B,) are needed if and only if the model has classes (num_classes > 0).")
        embedded = self.timestep_embedder(self.time_proj(timestep).to(dtype))  # (B, D)
        if self.class_embedder is not None:
            embedded = embedded + self.class_embedder(labels)
        return embedded, self.proj_out(functional.silu(embedded)).unflatten(1, (2, -1)), None


class Given(nn.Module):
    """Stands where a block would embed timestep and class itself: the block is given the embedding as its timestep."""

    def forward(self, timestep: Tensor, class_labels: object = None, hidden_dtype: object = None) -> Tensor:  # noqa: ARG002
        """The embedding (B, D) as it is."""
        return timestep


def name_in_ours(key: str) -> str:
    """The name of a weight of diffusers' Latte in ours: what makes the condition is a module of its own."""
    condition = key.startswith(("adaln_single.", "caption_projection.")) or key == "scale_shift_table"
    return f"condition.{key}" if condition else key


def swap(tokens: Tensor, batch: int) -> Tensor:
    """Frame by frame to place by place, or back: (B x, y, D) to (B y, x, D)."""
    return tokens.reshape(batch, -1, *tokens.shape[1:]).transpose(1, 2).flatten(0, 1)
