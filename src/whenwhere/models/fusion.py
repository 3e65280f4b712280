"""Long skips: a block of the second half first fuses the stream with what a block of the first half put out.

Skip-DiT (Chen et al., 2024, https://arxiv.org/abs/2411.17616): block i of L feeds block L-1-i; the stream and the skip
are concatenated, normalised and projected, and the projection replaces the stream. The fusion is part of the block
that receives, so whoever skips the block skips it too.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

# How a fused skip enters the stream x; u is W LayerNorm([x; skip]) + b.
#   replace        x <- u       the paper's; what every published weight expects
#   residual_zero  x <- x + u   ours: with W = 0 and b = 0 at the start, a converted network computes what it did before
Fusion = Literal["replace", "residual_zero"]


class SkipBlock(BasicTransformerBlock):  # type: ignore[misc]
    """A transformer block with a long skip: `forward` takes `skip`, shaped like the stream, (B, N, D).

    Subclassed, not wrapped, so that names of weights and paths of attentions are those of a block without a skip; the
    names of the fusion, `skip_norm` and `skip_linear`, are those of diffusers' HunyuanDiT. The first D columns of
    `skip_linear.weight` act on the stream, the last D on the skip.

    Args:
        fusion: the form of the fusion.
        config: arguments of the block.

    Raises:
        ValueError: no such form.
    """

    def __init__(self, fusion: Fusion, **config: Any) -> None:
        if fusion not in get_args(Fusion):
            raise ValueError(f"fusion must be one of {', '.join(get_args(Fusion))}; got {fusion!r}")
        super().__init__(**config)
        self.skip_norm = FP32LayerNorm(2 * self.dim, eps=1e-6)  # computed in float32 whatever the stream is
        self.skip_linear = nn.Linear(2 * self.dim, self.dim)  # PyTorch's initialisation, as the paper's models had
        self.residual = fusion == "residual_zero"
        if self.residual:
            nn.init.zeros_(self.skip_linear.weight)
            nn.init.zeros_(self.skip_linear.bias)

    def forward(self, hidden_states: Tensor, *args: Any, skip: Tensor, **kwargs: Any) -> Tensor:
        """Fuse, then run the block on the arguments that any block takes."""
        fused = self.skip_linear(self.skip_norm(torch.cat([hidden_states, skip], dim=-1)))  # (B, N, D)
        stream = hidden_states + fused if self.residual else fused
        return super().forward(stream, *args, **kwargs)  # type: ignore[no-any-return]


def count_pairs(units: int, skip_pairs: int | None) -> int:
    """How many of the outermost pairs (i, units - 1 - i) are joined; `None` asks for all.

    Raises:
        ValueError: an odd number of units, or fewer than 1 or more than units / 2 pairs.
    """
    if units < 2 or units % 2:
        raise ValueError(f"long skips join block i and block L-1-i, so num_layers must be even, got {units}")
    pairs = units // 2 if skip_pairs is None else skip_pairs
    if not 1 <= pairs <= units // 2:
        raise ValueError(f"skip_pairs must lie in 1 to {units // 2} for {units} layers, got {skip_pairs}")
    return pairs


def copy_into(converted: nn.Module, model: nn.Module, renamed: Callable[[str], str] = str) -> None:
    """Copy a network without long skips into one with them, in its type, place and mode; the skips stay as they are.

    Args:
        converted: the network with long skips; changed in place.
        model: the network without.
        renamed: the name in `converted` of every weight of `model`.

    Raises:
        ValueError: the networks differ by more than long skips.
    """
    some = next(model.parameters())
    converted.train(model.training)
    for tensor in [*converted.parameters(), *converted.buffers()]:
        tensor.data = tensor.data.to(device=some.device, dtype=some.dtype)
    weights = {renamed(key): tensor for key, tensor in model.state_dict().items()}
    missing, unknown = converted.load_state_dict(weights, strict=False)
    left = [key for key in missing if ".skip_norm." not in key and ".skip_linear." not in key]
    if left or unknown:
        raise ValueError(f"these are not the same network: {', '.join([*left, *unknown][:4])} on one side only.")
