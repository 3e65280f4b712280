"""How far pictures are from reference pictures: torchmetrics' functions with one convention for shapes and ranges.

All functions take two batches (B, 3, H, W) with values in [0, 1] and give one number per picture.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WINDOW = 11  # pixels of SSIM's window


def psnr(images: Tensor, references: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of every picture, in dB: 10 log10(1 / MSE), over all pixels and channels.

    Higher is closer; identical pictures give infinity.

    Raises:
        ValueError: not two batches of pictures of one size with values in [0, 1].
        ImportError: torchmetrics is not installed.
    """
    _check(images, references, smallest=1)
    measure = _torchmetrics("peak_signal_noise_ratio")
    values = measure(images.float(), references.float(), data_range=1.0, reduction="none", dim=(1, 2, 3))
    return [float(value) for value in values.reshape(-1)]


def ssim(images: Tensor, references: Tensor) -> list[float]:
    """Structural similarity of every picture (Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861), in [-1, 1].

    The mean over pixels and channels of (2 μx μy + c1)(2 σxy + c2) / ((μx² + μy² + c1)(σx² + σy² + c2)) within a
    Gaussian window of 11 x 11 pixels, σ = 1.5, with c1 = 0.01² and c2 = 0.03².
    Higher is closer; identical pictures give 1.

    Raises:
        ValueError: as for `psnr`, or the pictures are smaller than the window.
        ImportError: torchmetrics is not installed.
    """
    _check(images, references, smallest=_WINDOW)
    measure = _torchmetrics("structural_similarity_index_measure")
    values = measure(
        images.float(), references.float(), data_range=1.0, reduction="none", sigma=1.5, kernel_size=_WINDOW
    )
    return [float(value) for value in values.reshape(-1)]


def require() -> None:
    """Raise now what a metric would raise later.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    _torchmetrics("peak_signal_noise_ratio")


def _torchmetrics(name: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module("torchmetrics.functional.image")
    except ImportError as error:
        raise ImportError(
            f"picture metrics need torchmetrics: pip install 'whenwhere[metrics]' ({error})", name="torchmetrics"
        ) from error
    function: Callable[..., Any] = getattr(module, name)
    return function


def _check(images: Tensor, references: Tensor, smallest: int) -> None:
    if images.shape != references.shape or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            "pictures and references must be two batches (B, 3, H, W) of one shape, got "
            f"{tuple(images.shape)} and {tuple(references.shape)}"
        )
    if min(images.shape[-2:]) < smallest:
        raise ValueError(f"pictures must have at least {smallest} x {smallest} pixels, got {tuple(images.shape[-2:])}")
    for batch in (images, references):
        if batch.numel() and not (torch.isfinite(batch).all() and batch.min() >= 0 and batch.max() <= 1):
            raise ValueError(f"pictures must have values in [0, 1], got {float(batch.min())} to {float(batch.max())}")
