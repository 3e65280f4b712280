"""Export of a routed model as a static graph for ONNX runtimes: a text in, logits out, the best tokens selected."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .select import as_fraction
from .within import find


class Scoring(nn.Module):
    """A routed model as a function of token numbers alone, with `policy="topk"`: (B, T) -> (B, T, V)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of a whole text, as those of a prompt; they are not causal."""
        logits: Tensor = self.model(input_ids, policy="topk", use_cache=False).logits
        return logits


def export_onnx(model: nn.Module, path: str | Path, longest: int = 4096) -> None:
    """Write a routed model as an ONNX file with input `input_ids`, (B, T), and output `logits`, (B, T, V).

    B and T are free, and T is a multiple of the denominators of all capacities, so that every budget is a whole number:
    at 0.5 an even number. No token is padding. The graph is that of evaluation, whatever mode the model is in.

    Args:
        model: a routed model whose selection has a fixed budget.
        path: of the file.
        longest: T at most.

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: the number of selected tokens depends on their scores.
    """
    try:
        import onnxscript
    except ImportError as missing:
        raise ImportError("export_onnx needs the extra `onnx`: pip install 'whenwhere[onnx]'.") from missing
    routed = find(model)
    if routed.routing.score_threshold is not None:
        raise ValueError("mode='dynamic' has no budget: how many tokens run depends on the data. Export mode='fixed'.")
    of = math.lcm(*(as_fraction(layer.capacity)[1] for layer in routed.routed))
    count = (
        torch.export.Dim("count", min=2, max=max(3, longest // of)) * of if of > 1 else torch.export.Dim("count", min=2)
    )
    shapes = {"input_ids": {0: torch.export.Dim("rows", min=1, max=1024), 1: count}}
    example = torch.zeros(2, 4 * of, dtype=torch.long, device=routed.device)
    training = model.training
    try:
        with torch.no_grad():
            program = torch.export.export(Scoring(model.eval()), (example,), dynamic_shapes=shapes)
    finally:
        model.train(training)
    table: dict[Any, Any] = {torch.ops.aten.sort.stable: _sort(onnxscript)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own parts
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, custom_translation_table=table, output_names=["logits"]
        )
    assert written is not None
    written.save(str(path))


def _sort(onnxscript: Any) -> Any:
    """A stable sort for the exporter, which knows none: TopK of everything, where the lower index wins a tie."""
    op = onnxscript.opset18

    def sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        del stable
        length = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
        return op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)

    return sort
