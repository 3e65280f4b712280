"""The negative text: what a caller may give, how a pipeline encodes it, how much of it there is."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Encoded negative text, one row for all samples or one row for each.

    Attributes:
        embeds: (1 or B, T, D), as the pipeline's `negative_prompt_embeds`; T may differ from the positive text's.
        mask: (1 or B, T), 1 for real tokens; needed where the positive text comes with one (PixArt, HunyuanDiT).
        pooled: (1 or B, D), of Flux; without it the positive one also stands for the negative text.
        embeds_2, mask_2: of a second text encoder (HunyuanDiT).
    """

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    embeds_2: Tensor | None = None
    mask_2: Tensor | None = None

    def __post_init__(self) -> None:
        if self.embeds.ndim != 3:
            raise ValueError(f"negative embeddings have three dimensions, (rows, tokens, features); got {self.shape}")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and len(value) != len(self.embeds):
                raise ValueError(f"{field.name} has {len(value)} rows, the negative embeddings have {self.rows}")
        for mask in (self.mask, self.mask_2):
            if mask is not None and not mask.bool().any(-1).all():
                raise ValueError("the mask of a negative text hides all its tokens; an empty prompt has at least one")

    @property
    def rows(self) -> int:
        """Rows of every tensor."""
        return len(self.embeds)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the embeddings."""
        return tuple(self.embeds.shape)

    def to(self, like: Tensor) -> "Text":
        """The same on another device; what is no mask also in another type."""
        moved = {
            field.name: value.to(like.device, value.dtype if "mask" in field.name else like.dtype)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return Text(**moved)


@dataclass(frozen=True, slots=True)
class Size:
    """How much negative text there is.

    Attributes:
        rows: 1 or the number of samples; 0 for as many as there are samples.
        tokens: 0 for as many as the positive text has.
        numbers: of every token after projection, its place in the mask counted in; 0 where nothing is projected yet.
        projections: paths of the modules that project it.
    """

    rows: int = 1
    tokens: int = 0
    numbers: int = 0
    projections: tuple[str, ...] = ()

    def rows_for(self, samples: int) -> int:
        """Rows for this number of samples."""
        return self.rows or samples

    def tokens_beside(self, positive: int) -> int:
        """Tokens beside a positive text of so many."""
        return self.tokens or positive


def spread(tensor: Tensor, rows: int) -> Tensor:
    """One row per row of a batch: (R, ...) -> (rows, ...), each row repeated in place; a single one costs nothing."""
    if len(tensor) == rows:
        return tensor
    if len(tensor) == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    return tensor.repeat_interleave(rows // len(tensor), 0)


@torch.no_grad()
def encode(pipe: Any, prompts: Sequence[str], outputs: dict[str, int], encoders: int) -> Text:
    """Encode prompts by the pipeline's own `encode_prompt` and its call's own defaults.

    Args:
        pipe: a diffusers pipeline.
        prompts: one for all samples, or one for each.
        outputs: which of the function's outputs is which part of the text.
        encoders: how often it is called, with another text encoder each time.

    Raises:
        ValueError: the pipeline cannot encode text.
    """
    if not hasattr(pipe, "encode_prompt") or getattr(pipe, "text_encoder", None) is None:
        raise ValueError(
            f"{type(pipe).__name__} cannot encode a negative prompt (it has no text encoder); give "
            "negative_prompt_embeds instead."
        )
    found: dict[str, Tensor] = {}
    for encoder in range(encoders):
        encoded = pipe.encode_prompt(**_arguments(pipe, list(prompts), encoder))
        encoded = encoded if isinstance(encoded, tuple) else (encoded,)
        found |= {name + ("_2" if encoder else ""): encoded[i] for name, i in outputs.items()}
    return Text(**found)


def _arguments(pipe: Any, prompts: list[str], encoder: int) -> dict[str, Any]:
    """Of what `encode_prompt` takes: the prompts, and whatever the pipeline's call sets for it by default."""
    call = inspect.signature(type(pipe).__call__).parameters
    taken = inspect.signature(type(pipe).encode_prompt).parameters
    ours = {
        "prompt": prompts,
        "prompt_2": None,
        "prompt_3": None,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
        "text_encoder_index": encoder,
    }
    defaults = {
        name: call[name].default for name in ("clean_caption", "max_sequence_length", "clip_skip") if name in call
    }
    if "text_encoder_index" in taken:
        defaults.pop("max_sequence_length", None)  # every encoder has its own
    elif "max_sequence_length" in defaults:
        defaults["max_sequence_length"] = readable(pipe, defaults["max_sequence_length"])
    return {name: value for name, value in (defaults | ours).items() if name in taken}


def readable(pipe: Any, tokens: int) -> int:
    """So many tokens of text, or as many as the pipeline's tokenizer for the longest text allows."""
    tokenizers = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
    return min(tokens, max((t.model_max_length for t in tokenizers if t is not None), default=tokens))
