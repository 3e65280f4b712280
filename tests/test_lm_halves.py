"""Attention or the network of a layer alone is routed: the other half processes all tokens, here as there."""

import pytest
import torch
from test_lm_cost import AMONG, BUDGET, DENSE, ROUTER, TOKENS, counted
from tiny_language import MODELS, calibrated, dense, routed, text

from whenwhere.lm import SDT, STT, MoD, cache_bytes, cost, set_step

METHODS = [MoD(), SDT(surprise="relative"), STT()]
halves = pytest.mark.parametrize("scope", ["attention", "mlp"])
methods = pytest.mark.parametrize("method", [MoD, SDT, STT])


@halves
@methods
@pytest.mark.parametrize("family", MODELS)
def test_with_all_tokens_it_is_the_dense_model(method, scope, family):
    ids, mask = text(3, 12), torch.ones(3, 12, dtype=torch.long)
    model = routed(method(scope=scope, capacity=1), family)
    assert torch.equal(model(ids, policy="topk", use_cache=False).logits, dense(family)(ids).logits)
    mask[1, :5] = 0
    found = model(ids, attention_mask=mask, policy="all").logits
    expected = dense(family)(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


@halves
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_selected_tokens_get_the_change_of_the_half(scope, attention):
    ids, model = text(1, 10), routed(MoD(scope=scope), num_hidden_layers=2, attention=attention)
    chosen = torch.tensor([[True, False, False, True, True, False, True, False, False, True]])
    inner = model.model
    stream = dense(attention=attention, num_hidden_layers=2)(ids, output_hidden_states=True).hidden_states[1]
    layer, rotary = inner.layers[1].layer, inner.rotary_emb(stream, torch.arange(10)[None])
    seen = torch.ones(10, 10, dtype=torch.bool).tril()
    if scope == "attention":
        seen = seen & chosen | torch.eye(10, dtype=torch.bool)
    added = torch.zeros(10, 10).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    change = layer.self_attn(layer.input_layernorm(stream), rotary, added)[0]
    stream = stream + change * (chosen[..., None] if scope == "attention" else 1)
    change = layer.mlp(layer.post_attention_layernorm(stream))
    stream = stream + change * (chosen[..., None] if scope == "mlp" else 1)
    found = model(ids, selection={1: chosen}, policy="all").logits
    torch.testing.assert_close(found, model.lm_head(inner.norm(stream)), atol=1e-4, rtol=1e-4)


@halves
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_decoding_is_what_a_whole_text_gives(method, scope):
    settings = {**method.to_dict(), "scope": scope}
    settings.pop("method")
    model, ids = calibrated(type(method).from_dict(settings)), text(3, 14)
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[1, :4] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    first = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    cache, logits = first.past_key_values, [first.logits]
    for place in range(6, 14):
        step = model(ids[:, place : place + 1], attention_mask=mask[:, : place + 1], past_key_values=cache)
        logits.append(step.logits)
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[kept], whole[kept], atol=1e-4, rtol=1e-4)
    full, held = cache_bytes(cache)[0], cache_bytes(cache)[1]
    assert held == full if scope == "mlp" else held < full


@halves
@methods
def test_training_reaches_router_and_half(method, scope):
    model, ids = routed(method(scope=scope)).train(), text()
    set_step(model, 0, 10)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.routed[0].router.parameters())


@pytest.mark.parametrize(
    ("routing", "vain"),
    [
        (MoD(student="none", scope="attention"), 2 * AMONG - 2 * ROUTER),
        (MoD(student="none", scope="mlp"), 2 * DENSE - 2 * ROUTER),
        (STT(scope="attention"), 2 * AMONG + 2 * DENSE),
        (STT(scope="mlp"), 2 * DENSE),
    ],
    ids=str,
)
def test_the_formula_is_what_is_counted(routing, vain):
    model = routed(routing, attention="eager")
    formula = cost(model.config, routing, TOKENS, teacher=True)
    assert counted(model, policy="topk") == formula.macs + 3 * DENSE + vain
    assert formula.entries == 3 * TOKENS + 2 * (TOKENS if routing.scope == "mlp" else BUDGET)


def test_the_network_alone_has_no_keys_to_share():
    with pytest.raises(ValueError, match="scope='mlp' routes no keys and values; leave out kv_scope='all'"):
        MoD(scope="mlp", kv_scope="all")
