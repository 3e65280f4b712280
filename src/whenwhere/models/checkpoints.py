"""Loading the published Skip-DiT weights, and converting them once to safetensors.

The files are pickles, and the largest is four times as large as the weights in it: it also holds the optimiser and the
arguments of the training. Only tensors are unpickled, and only what is asked for is read from the disk.
"""

from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .fusion import Fusion
from .published import MODELS, TABLES, Layout, Weights, check_skips, recognise, settings, translate
from .skip_dit import SkipDiTTransformer2DModel
from .skip_latte import SkipLatteTransformer3DModel

Model = SkipDiTTransformer2DModel | SkipLatteTransformer3DModel
Which = Literal["ema", "model"]


def load_published(
    path: str | Path,
    expected: type[Model] | None = None,
    *,
    which: Which = "ema",
    new_skips: Fusion | None = None,
    heads: int = 16,
) -> Model:
    """A model from a published file: `{model, ema, opt, args}`, `{model, ema}`, `{ema}`, or the weights alone.

    Args:
        path: of the file, `.pt` or `.safetensors`.
        expected: the class it has to be; whatever it is if `None`.
        which: the moving average of the weights, where there is one, or the trained weights themselves.
        new_skips: for a DiT or Latte without long skips: the fusion that is added and starts untrained. Without it
            such a file is refused.
        heads: attention heads, which the file does not tell; 16 in all published models.

    Returns:
        The model in evaluation mode, in the type of the file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, is no published network or not the expected one, has no long skips, too few or
            of the wrong width, lacks weights or has unknown ones, or holds values that are not finite.
    """
    try:
        return from_weights(_choose(_read(Path(path)), which), expected, new_skips=new_skips, heads=heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def convert(path: str | Path, directory: str | Path, *, which: Which = "ema", heads: int = 16) -> Model:
    """Write a published file as a folder that `from_pretrained` reads; the weights are copied from disk to disk.

    Raises:
        FileNotFoundError, ValueError: as for `load_published`.
    """
    model = load_published(path, which=which, heads=heads)
    model.save_pretrained(directory, safe_serialization=True)
    return model


def from_weights(
    weights: Weights, expected: type[Model] | None = None, *, new_skips: Fusion | None = None, heads: int = 16
) -> Model:
    """A model from weights under their published names; on the meta device if they are there.

    Raises:
        ValueError: as for `load_published`.
    """
    layout = recognise(weights)
    if expected is not None and MODELS[layout] is not expected:
        raise ValueError(
            f"this is the {layout.value} network, a {MODELS[layout].__name__}, not a {expected.__name__}. The authors' "
            "table of links has DiT-XL-2-skip.pt and Latte-skip.pt swapped."
        )
    config = settings(weights, layout, heads)
    units, width = config["num_layers"], heads * config["attention_head_dim"]
    found = check_skips(weights, units, width)
    if not found and new_skips is None:
        raise ValueError(
            f"there are no long skips in this {layout.value} network. To add untrained ones say so: "
            'new_skips="residual_zero" changes nothing at first, "replace" is the paper\'s.'
        )
    if found and new_skips is not None:
        raise ValueError(f"new_skips={new_skips!r}, but {found} long skips are there already.")
    meta = next(iter(weights.values())).is_meta
    model = _build(layout, config | {"fusion": new_skips or "replace"}, empty=bool(found), meta=meta)
    _fill(model, dict(translate(weights, layout, units)), new=not found)
    for name, ours in TABLES.items():
        if layout is not Layout.TEXT_VIDEO and name in weights and not meta:
            _compare(name, weights[name], model.get_buffer(ours))
    model.eval()
    return model


def _read(path: Path) -> Any:
    """What is in a file: tensors, and what they stand in. No code in it is run."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The arguments of the training are a plain Namespace of numbers and strings.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ValueError(f"damaged, or more than tensors, which is not unpickled: {error}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"damaged or no checkpoint: {error}") from error


def _choose(content: Any, which: Which) -> Weights:
    """The weights asked for among what a training wrote."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"expected a dictionary of tensors, found {content if content == {} else type(content)}")
    if isinstance(content.get("ema"), dict) or isinstance(content.get("model"), dict):
        kept = [name for name in ("ema", "model") if isinstance(content.get(name), dict)]
        if which == "model" and which not in kept:
            raise ValueError("the file holds the moving average only; which='ema' loads it")
        content = content[which if which in kept else kept[0]]
    for key, tensor in content.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{key!r} is no weight but {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds values that are not finite")
    return content  # type: ignore[no-any-return]


def _new(layout: Layout, config: dict[str, Any]) -> Model:
    model: Model = MODELS[layout](**config)
    return model


def _build(layout: Layout, config: dict[str, Any], empty: bool, meta: bool) -> Model:
    """A model to be filled: without any weight, but with its tables of positions unless it stays on the meta device."""
    if not empty and not meta:
        return _new(layout, config)
    with torch.device("meta"):
        model = _new(layout, config)
    if not meta:
        small = _new(layout, config | {"num_layers": 2})
        for name, table in small.named_buffers():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, table, persistent=False)
    return model


def _fill(model: nn.Module, weights: dict[str, Tensor], new: bool) -> None:
    """Give a model its weights, without copying them; `new` if its skips stay as they are."""
    own = model.state_dict()
    missing = sorted(key for key in own.keys() - weights.keys() if not new or ".skip_" not in key)
    unknown = sorted(weights.keys() - own.keys())
    for what, keys in (("missing", missing), ("unknown", unknown)):
        if keys:
            raise ValueError(f"{len(keys)} weights are {what}, among them {', '.join(keys[:3])}")
    for key, tensor in weights.items():
        if tensor.shape != own[key].shape:
            raise ValueError(f"{key} has the shape {tuple(tensor.shape)}, expected {tuple(own[key].shape)}")
    model.load_state_dict(weights, strict=False, assign=True)
    some = next(iter(weights.values()))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(some.dtype)


def _compare(name: str, published: Tensor, ours: Tensor) -> None:
    """Refuse a table of positions that is not the one our model computes."""
    if published.shape != ours.shape or not torch.allclose(published.float(), ours.float(), atol=1e-5):
        raise ValueError(f"{name} is not the table of sines and cosines that belongs to these sizes")
