"""The sizes of every attention of a network, noted while it runs once on the meta device."""

from dataclasses import replace
from typing import Any

from torch import nn

from .unit import Attended

# Wan tells its text from the picture before it by this length, which is fixed in diffusers.
TEXT_BESIDE_PICTURE = 512


def sees_a_picture(attention: nn.Module) -> bool:
    """Whether a cross-attention has keys and values of a picture beside those of a text, in one sequence (Wan)."""
    added: Any = getattr(attention, "add_k_proj", None) or getattr(attention, "to_added_kv", None)
    return added is not None and bool(getattr(attention, "is_cross_attention", False))


def note_sizes(model: nn.Module, rows: int, sizes: dict[str, Attended]) -> list[Any]:
    """Let every attention, and every block around one, write its sizes down; gives the handles of the hooks.

    Args:
        model: the network.
        rows: of the batch that it will run on.
        sizes: where they are written, by path.
    """
    handles = []
    for path, module in model.named_modules():
        if hasattr(module, "to_q"):
            handles.append(module.register_forward_hook(_of_attention(sizes, path, rows), with_kwargs=True))
        elif hasattr(getattr(module, "attn", None), "to_q"):
            handles.append(module.register_forward_hook(_of_block(sizes, path), with_kwargs=True))
    return handles


def _of_attention(sizes: dict[str, Attended], path: str, rows: int) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        tokens, text = given["hidden_states"], given.get("encoder_hidden_states")
        text = text[0] if isinstance(text, tuple) else text  # an IP-Adapter's images come beside the text
        queries = tokens.shape[1] if tokens.ndim == 3 else tokens[0, 0].numel()
        width: Any = getattr(module.to_q, "out_features", 0)
        attended = 0 if text is None else text.shape[1]
        attended = min(attended, TEXT_BESIDE_PICTURE) if sees_a_picture(module) else attended
        sizes[path] = Attended(queries, attended, width, len(tokens) // rows)

    return hook


def _of_block(sizes: dict[str, Attended], path: str) -> Any:
    """A block whose attention sees text and image in a row knows how much of it is text; the attention does not."""

    def hook(_module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        attention = f"{path}.attn"
        sizes[path] = sizes[attention] = replace(sizes[attention], text=text.shape[1])

    return hook
