"""The graph of scoring, written as ONNX, gives the same logits in another runtime, for any length and batch."""

import pytest
import torch
from tiny_language import routed, text

from whenwhere.lm import SDT, STT, MoD, export_onnx

pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")


@pytest.mark.parametrize(
    "routing",
    [
        MoD(kv_scope="all"),
        pytest.param(SDT(surprise="relative", always_run="first", bypass="prior"), marks=pytest.mark.slow),
        pytest.param(STT(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_another_runtime_gives_equal_logits(routing, tmp_path):
    model = routed(routing, num_hidden_layers=2).train()
    export_onnx(model, tmp_path / "model.onnx")
    assert model.training
    model.eval()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for rows, tokens in ((1, 30), (3, 64)):
        ids = text(rows, tokens)
        (found,) = session.run(["logits"], {"input_ids": ids.numpy()})
        with torch.no_grad():
            expected = model(ids, policy="topk", use_cache=False).logits
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_among_equal_scores_the_earliest_win_there_too(tmp_path):
    model = routed(MoD(capacity=0.25), num_hidden_layers=2)
    torch.nn.init.zeros_(model.routed[0].router.weight)
    export_onnx(model, tmp_path / "model.onnx")
    ids = text(2, 12)
    expected = model(ids, policy="topk", use_cache=False).logits.detach()
    assert model.notes[1].mask.nonzero().tolist() == [[row, place] for row in (0, 1) for place in range(3)]
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(["logits"], {"input_ids": ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_a_selection_without_budget_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mode='dynamic' has no budget"):
        export_onnx(routed(STT(mode="dynamic"), num_hidden_layers=2), tmp_path / "model.onnx")
