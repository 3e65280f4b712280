"""What the families of decoders differ in: norms of keys, widths of heads, windows. The rest is upstream's."""

import pytest
import torch
from test_lm_decoding import in_chunks, padded
from tiny_language import MODELS, calibrated, dense, routed, text
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from whenwhere.lm import SDT, STT, MoD, route
from whenwhere.lm.models import FAMILIES

families = pytest.mark.parametrize("family", MODELS)
METHODS = {"mod": MoD(), "all-keys": MoD(kv_scope="all"), "sdt": SDT(), "stt": STT()}
methods = pytest.mark.parametrize("routing", METHODS.values(), ids=METHODS)


def test_every_family_that_is_routed_is_tested():
    assert {model for _, model in MODELS.values()} == set(FAMILIES)


@families
@torch.no_grad()
def test_a_selected_token_that_sees_all_keys_gets_what_the_dense_layer_gives(family):
    """Keys and values of tokens that are not selected are projected, normed and rotated as the layer would."""
    ids, chosen = text(2, 10), torch.zeros(2, 10, dtype=torch.bool)
    chosen[:, [0, 3, 4, 9]] = chosen[1, 7] = True
    model, plain = routed(MoD(kv_scope="all"), family, num_hidden_layers=2), dense(family, num_hidden_layers=2)
    _, before, _ = plain(ids, output_hidden_states=True).hidden_states
    behind = plain.model.layers[1](
        before, position_embeddings=plain.model.rotary_emb(before, torch.arange(10)[None]), attention_mask=None
    )
    expected = plain.lm_head(plain.model.norm(torch.where(chosen[..., None], behind, before)))
    found = model(ids, selection={1: chosen}, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@methods
@families
def test_a_text_in_pieces_is_the_text_at_once(routing, family):
    model, (ids, mask) = calibrated(routing, family), padded()
    whole, _ = in_chunks(model, ids, mask, [14])
    pieces, _ = in_chunks(model, ids, mask, [6, 1, 1, 1, 5])
    assert 0 < sum(model.realised.values()) < 2
    torch.testing.assert_close(pieces[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=1e-4)


@methods
@families
def test_generating_is_the_same_with_and_without_a_cache_and_after_loading(routing, family, tmp_path):
    model, prompt = calibrated(routing, family), text(2, 6)
    asked = {"max_new_tokens": 6, "do_sample": False, "capacity": 0.5}
    found = model.generate(prompt, **asked)
    assert found.shape == (2, 12)
    assert torch.equal(model.generate(prompt, use_cache=False, **asked), found)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).generate(prompt, **asked), found)


@families
def test_routers_and_the_language_model_learn(family):
    model, ids = routed(SDT(), family).train(), text()
    model(ids, labels=ids).loss.backward()
    idle = [name for name, tensor in model.named_parameters() if tensor.grad is None]
    assert not [name for name in idle if "student" not in name], idle
    assert model.model.layers[1].layer.self_attn.k_proj.weight.grad.abs().max() > 0


@torch.no_grad()
def test_a_mistral_with_a_window_is_refused_unless_the_window_is_taken_off():
    config = MistralConfig(**dense("mistral").config.to_dict() | {"sliding_window": 8})
    model = MistralForCausalLM(config).eval()
    with pytest.raises(ValueError, match="layer 1 has a sliding window of 8 tokens; routing is defined for full att"):
        route(model, MoD())
    ids = text(2, 8)  # no longer than the window, which then makes no difference
    before = model(ids).logits
    model.config.sliding_window = None
    assert torch.equal(route(model, MoD())(ids, policy="all", use_cache=False).logits, before)


def test_a_qwen3_whose_upper_layers_have_a_window_is_refused_there():
    sizes = dense("qwen3").config.to_dict() | {"layer_types": None}
    config = Qwen3Config(**sizes | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3})
    model = Qwen3ForCausalLM(config)
    with pytest.raises(ValueError, match="layer 3 has sliding_attention"):
        route(model, MoD())
    assert route(model, MoD(routed_layers=(1,))).eval()(text(), policy="all").logits.isfinite().all()
