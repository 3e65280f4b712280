"""Picture metrics agree with their definitions, one number per picture."""

import math
import sys

import pytest
import torch

from whenwhere.metrics.images import psnr, require, ssim

SEED = torch.Generator().manual_seed(0)
PICTURES = torch.rand(3, 3, 32, 32, generator=SEED) * 0.8 + 0.1


def test_identical_pictures_are_as_close_as_can_be():
    assert psnr(PICTURES, PICTURES) == [math.inf] * 3
    assert ssim(PICTURES, PICTURES) == pytest.approx([1.0] * 3)


def test_psnr_is_that_of_the_mean_squared_error():
    shifts = torch.tensor([0.1, 0.01, 0.05])
    shifted = PICTURES + shifts[:, None, None, None]
    assert psnr(shifted, PICTURES) == pytest.approx([20.0, 40.0, 20 * math.log10(20)], rel=1e-4)


def test_ssim_of_flat_pictures_is_its_luminance_term():
    x, y, c1 = 0.25, 0.5, 0.01**2
    flat = torch.full((1, 3, 16, 16), x), torch.full((1, 3, 16, 16), y)
    assert ssim(*flat) == pytest.approx([(2 * x * y + c1) / (x * x + y * y + c1)], rel=1e-4)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_a_batch_is_as_its_pictures_one_by_one(metric):
    noisy = (PICTURES + 0.1 * torch.randn(PICTURES.shape, generator=SEED)).clamp(0, 1)
    alone = [metric(noisy[i : i + 1], PICTURES[i : i + 1])[0] for i in range(3)]
    assert metric(noisy, PICTURES) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("images", "references", "message"),
    [
        (PICTURES, PICTURES[:2], "of one shape"),
        (PICTURES[0], PICTURES[0], "of one shape"),
        (PICTURES[:, :1], PICTURES[:, :1], "of one shape"),
        (PICTURES * 2, PICTURES, r"in \[0, 1\]"),
        (PICTURES * math.nan, PICTURES, r"in \[0, 1\]"),
        (PICTURES[..., :8], PICTURES[..., :8], "at least 11 x 11"),
    ],
)
def test_anything_but_pictures_is_refused(images, references, message):
    with pytest.raises(ValueError, match=message):
        ssim(images, references)


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r"pip install 'whenwhere\[metrics\]'"):
        require()
