"""A routed model is saved and loaded like any other; every tensor of the dense one has its place."""

import pytest
import torch
from tiny_language import MODELS, calibrated, dense, routed, text
from transformers import AutoConfig, AutoModelForCausalLM

from whenwhere.lm import SDT, STT, MoD, RoutedLlamaForCausalLM, route
from whenwhere.lm.criterion import BetaSchedule

METHODS = [MoD(), SDT(surprise="kl", bypass="prior"), STT(always_run=(0, 3)), STT(beta_schedule=BetaSchedule(end=5.0))]


@pytest.mark.parametrize("routing", METHODS, ids=str)
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_what_is_saved_is_loaded(routing, family, tmp_path):
    model, ids = calibrated(routing, family), text()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.routing == routing
    assert loaded.config.routing_calibrated
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    for capacity in (None, 0.3):
        assert torch.equal(loaded(ids, capacity=capacity).logits, model(ids, capacity=capacity).logits)
    assert AutoConfig.from_pretrained(tmp_path).model_type == f"whenwhere_{family}"


def test_a_model_without_calibration_stays_so(tmp_path):
    routed(SDT()).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer 1 has no quantiles"):
        loaded(text(), capacity=0.3)


def test_a_checkpoint_of_another_surprise_is_refused(tmp_path):
    calibrated(SDT()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit SDT\(.*it lacks \['model.layers.1.router.prior.head.bias'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, routing=SDT(surprise="kl").to_dict())
    calibrated(SDT(surprise="kl")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"and has \['model.layers.1.router.prior.head.bias'.* beside"):
        AutoModelForCausalLM.from_pretrained(tmp_path, routing=SDT().to_dict())


def test_tied_embeddings_stay_tied(tmp_path):
    model = routed(MoD(), tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(text(), policy="topk").logits, model(text(), policy="topk").logits)


@pytest.mark.parametrize("routing", METHODS, ids=str)
def test_every_tensor_of_the_dense_model_has_one_place(routing):
    plain = dense()
    model = route(plain, routing)
    there = {name.replace(".layer.", "."): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in plain.state_dict(keep_vars=True).items():
        assert there.pop(name) is tensor
    assert all(any(part in name for part in ("router", "student", "bypass", "quantiles")) for name in there)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_tensor_without_a_place_is_refused():
    plain = dense()
    plain.model.layers[2].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"tensors without a counterpart: model.layers.2.extra"):
        route(plain, MoD())


def test_precision_is_kept():
    model = route(dense().to(torch.bfloat16), SDT())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(text(), policy="topk")
    assert model.notes[1].score.dtype == torch.float32


def test_what_must_raise():
    config = routed(MoD()).config
    config.routing = None
    with pytest.raises(ValueError, match=r"convert a dense model by whenwhere.lm.route"):
        RoutedLlamaForCausalLM(config)
    config.routing = {"method": "MoE"}
    with pytest.raises(ValueError, match=r"unknown method 'MoE' in config.routing; known: MoD, SDT, STT"):
        RoutedLlamaForCausalLM(config)
    config.routing = MoD().to_dict() | {"colour": 1}
    with pytest.raises(ValueError, match="MoD has no colour; saved by a later version"):
        RoutedLlamaForCausalLM(config)


@pytest.mark.parametrize("method", [MoD, SDT, STT])
def test_presets(method):
    for preset in (method.paper(), method.recommended()):
        assert method.from_dict(preset.to_dict()) == preset
        route(dense(), preset)
    assert method.recommended().always_run == "first"
    assert method.recommended().gate == "ste"
    assert method.paper().gate in ("raw", "soft")
