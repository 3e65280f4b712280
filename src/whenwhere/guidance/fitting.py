"""What a method looks at when it is fitted to a model: the attention processors, the size of the negative text."""

from collections.abc import Sequence

from torch import nn

from ..pricing.sizes import TEXT_BESIDE_PICTURE, sees_a_picture
from .network import Network
from .text import Size, Text

# Processors that were tried. Others may project where no tap is.
PROCESSORS = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "FluxAttnProcessor",
        "FusedAttnProcessor2_0",
        "FusedHunyuanAttnProcessor2_0",
        "FusedJointAttnProcessor2_0",
        "HunyuanAttnProcessor2_0",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "JointAttnProcessor2_0",
        "SanaAttnProcessor2_0",
        "SlicedAttnProcessor",
        "WanAttnProcessor",
    }
)


def check_processors(method: object, denoiser: nn.Module) -> None:
    """Look at every attention to a text.

    Raises:
        ValueError: a processor is none of those that were tried.
    """
    for path, module in denoiser.named_modules():
        processor = getattr(module, "processor", None)
        name = type(processor).__name__
        own = not getattr(module, "is_cross_attention", True) and getattr(module, "added_kv_proj_dim", None) is None
        if processor is not None and hasattr(module, "to_q") and not own and name not in PROCESSORS:
            raise ValueError(
                f"{method}: {path} has the processor {name}, which is not known to project where it should."
            )


def check_length(method: object, denoiser: nn.Module, text: Text | None) -> None:
    """Look at the length of the negative text where a picture comes before it.

    Raises:
        ValueError: diffusers would take its first tokens for the picture's, or the picture's for its.
    """
    tokens = TEXT_BESIDE_PICTURE if text is None else text.embeds.shape[1]
    if tokens != TEXT_BESIDE_PICTURE and any(map(sees_a_picture, denoiser.modules())):
        raise ValueError(
            f"{method}: {type(denoiser).__name__} sees a picture before the text and tells them apart by the text's "
            f"{TEXT_BESIDE_PICTURE} tokens, as its pipeline encodes it; the negative text has {tokens}."
        )


def size_of(text: Text | None, prompts: str | Sequence[str] | None, network: Network, denoiser: nn.Module) -> Size:
    """How much negative text there is, or will be."""
    rows = text.rows if text is not None else 0 if prompts is None else 1 if isinstance(prompts, str) else len(prompts)
    tokens = 0
    if text is not None:
        tokens = text.embeds.shape[1] + (0 if text.embeds_2 is None else text.embeds_2.shape[1])
    masked = ("mask" in network.outputs if text is None else text.mask is not None) and network.encoders == 1
    return Size(rows, tokens, network.projected_width(denoiser) + masked, network.projecting(denoiser))
