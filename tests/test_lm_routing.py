"""Routed layers compute the dense model where they must, keep sequences apart and never look ahead."""

from fractions import Fraction

import pytest
import torch
from tiny_language import MODELS, calibrated, dense, routed, text
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from whenwhere.lm import SDT, STT, Knob, MoD, Routing, route, turned
from whenwhere.lm.gates import blend, weight
from whenwhere.lm.select import as_fraction, budget, of_mask, top_k

METHODS = [MoD(), SDT(), SDT(surprise="relative"), SDT(surprise="kl", prior="linear"), STT(), STT(student="linear2")]
methods = pytest.mark.parametrize("routing", METHODS, ids=str)
SHORT = [MoD(), SDT(), STT()]
short = pytest.mark.parametrize("routing", SHORT, ids=lambda routing: type(routing).__name__)
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
scopes = pytest.mark.parametrize("scope", ["selected", "all", "reuse"])


@torch.no_grad()
def logits(model, ids: Tensor, **more) -> Tensor:
    return model(ids, use_cache=False, **more).logits


@methods
@attentions
@pytest.mark.parametrize("family", MODELS)
def test_a_capacity_of_one_is_the_dense_model_bit_for_bit(routing, attention, family):
    ids = text()
    plain = logits(dense(family, attention), ids)
    model = routed(routing, family, attention)
    assert torch.equal(logits(model, ids, policy="topk", capacity=1.0), plain)
    assert torch.equal(logits(model, ids, policy="all"), plain)
    assert not torch.equal(logits(model, ids, policy="topk", capacity=0.5), plain)


@scopes
def test_a_capacity_of_one_is_dense_in_every_scope(scope):
    ids = text()
    plain = logits(dense(), ids)
    found = logits(routed(MoD(kv_scope=scope)), ids, policy="all")
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", ["1/8", "1/2", "3/10", "1"])
def test_the_budget_is_exact(share):
    for tokens in range(1, 21):
        assert budget(float(Fraction(share)), tokens) == max(1, tokens * Fraction(share) // 1)
    assert budget(0.29, 100) == 29
    assert as_fraction(0.29) == (29, 100)


def test_the_earliest_of_equals_wins_and_positions_rise():
    chosen = top_k(torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0, 1.0]]), 0.5)
    assert chosen.index.tolist() == [[1, 2, 3]]
    assert top_k(torch.zeros(1, 6), 0.5).index.tolist() == [[0, 1, 2]]
    always = torch.tensor([[False] * 5 + [True]])
    assert top_k(torch.zeros(1, 6), 0.5, always=always).index.tolist() == [[0, 1, 5]]


def test_padding_is_never_selected_and_not_counted():
    keep = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    score = torch.tensor([[9.0, 9, 1, 2, 3, 4], [6, 5, 4, 3, 2, 1]])
    chosen = top_k(score, 0.5, keep)
    assert chosen.mask.tolist() == [[False] * 4 + [True] * 2, [True] * 3 + [False] * 3]
    assert chosen.index[0, :2].tolist() == [4, 5]
    assert chosen.valid is not None
    assert chosen.valid.tolist() == [[True, True, False], [True] * 3]
    assert chosen.index[0].unique().numel() == 3


def test_gates():
    soft = torch.tensor([0.3, 0.6], requires_grad=True)
    assert weight("soft", soft) is soft
    for gate, gradient in (("ste", [1, 1]), ("hard", None)):
        value = weight(gate, soft)
        assert value.tolist() == [1, 1]
        if gradient:
            assert torch.autograd.grad(value.sum(), soft)[0].tolist() == gradient
        else:
            assert not value.requires_grad
    before, after = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    assert blend(before, after, soft[None]).flatten().tolist() == pytest.approx([0.3, 0.6])
    assert blend(before + 0.1, after / 3, torch.ones(1, 2)).equal(after / 3)


def masked_dense(model, ids: Tensor, mask: Tensor, gate: float = 1.0) -> Tensor:
    """A plain loop: routed layers run on all tokens, which see the selected ones, and count where selected."""
    stream = model.model.embed_tokens(ids)
    tokens = ids.shape[1]
    rotary = model.model.rotary_emb(stream, torch.arange(tokens)[None])
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for layer in model.model.layers:
        if hasattr(layer, "router"):
            seen = causal & (mask[:, None, None, :] | torch.eye(tokens, dtype=torch.bool))
            after = layer.layer(stream, attention_mask=seen, position_embeddings=rotary)
            stream = torch.where(mask[..., None], stream + gate * (after - stream), stream)
        else:
            stream = layer(stream, attention_mask=causal[None, None], position_embeddings=rotary)
    return model.lm_head(model.model.norm(stream))


@short
@attentions
@pytest.mark.parametrize("compute", ["gather", "masked"])
@torch.no_grad()
def test_gathering_tokens_agrees_with_masking_a_dense_run(routing, attention, compute):
    routing = type(routing)(decode_compute=compute, decode_routing="none")
    ids, generator = text(3, 14), torch.Generator().manual_seed(3)
    model = routed(routing, attention=attention)
    for share in (0.0, 0.3, 1.0):
        mask = torch.rand(3, 14, generator=generator) < share
        selection = dict.fromkeys((1, 3), mask)
        found = logits(model, ids, selection=selection)
        reference = routed(routing)  # sdpa takes boolean masks
        torch.testing.assert_close(found, masked_dense(reference, ids, mask), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_all_keys_and_repeated_keys_agree_with_plain_attention():
    ids, mask = text(2, 12), torch.rand(2, 12, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[:, 0] = True
    for scope in ("all", "reuse"):
        model = routed(MoD(kv_scope=scope, routed_layers=(1,)))
        found = logits(model, ids, selection={1: mask})
        block = model.model.layers[1].layer
        stream = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(stream, torch.arange(12)[None])
        causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
        stream = model.model.layers[0](stream, attention_mask=causal, position_embeddings=rotary)
        if scope == "all":
            after = block(stream, attention_mask=causal, position_embeddings=rotary)
        else:
            after = block(stream, attention_mask=causal, position_embeddings=rotary, past_key_values=Repeating(mask))
        stream = torch.where(mask[..., None], after, stream)
        for layer in model.model.layers[2:]:
            stream = layer(stream, attention_mask=causal, position_embeddings=rotary)
        torch.testing.assert_close(found, model.lm_head(model.model.norm(stream)), atol=1e-4, rtol=1e-4)


class Repeating:
    """The keys and values of the last selected token stand in the place of every skipped one."""

    def __init__(self, mask: Tensor) -> None:
        places = torch.where(mask, torch.arange(mask.shape[1]), 0)
        self.last = places.cummax(1).values[:, None, :, None]

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        last = self.last.expand(-1, keys.shape[1], -1, keys.shape[3])
        return keys.gather(2, last), values.gather(2, last)


@methods
def test_a_sequence_does_not_depend_on_its_neighbours(routing):
    ids, other = text(2), text(2, seed=1)
    model = routed(routing)
    together, single = logits(model, ids, policy="topk"), logits(model, ids[1:], policy="topk")
    torch.testing.assert_close(together[1:], single, atol=1e-5, rtol=1e-5)
    changed = logits(model, torch.cat([other[:1], ids[1:]]), policy="topk")
    assert torch.equal(changed[1], together[1])


@short
def test_with_a_given_selection_nothing_looks_ahead(routing):
    ids = text()
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    model, changed = routed(routing), ids.clone()
    changed[:, 9] = 49 - changed[:, 9]
    selection = dict.fromkeys((1, 3), mask)
    before, after = (logits(model, given, selection=selection, policy="none") for given in (ids, changed))
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9], after[:, 9])


@short
@scopes
def test_thresholds_are_causal_and_the_best_of_a_text_are_not(routing, scope):
    model = calibrated(type(routing)(kv_scope=scope))
    differs = []
    for seed in range(6):
        ids = text(2, 24, seed)
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 7) % 50
        before, after = (logits(model, given) for given in (ids, changed))
        torch.testing.assert_close(before[:, :-1], after[:, :-1], atol=1e-5, rtol=1e-5)
        before, after = (logits(model, given, policy="topk") for given in (ids, changed))
        differs.append(not torch.allclose(before[:, :-1], after[:, :-1], atol=1e-3))
    assert any(differs)


@methods
def test_scores_are_causal(routing):
    ids = text()
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 5) % 50
    model = routed(routing)
    scores = []
    for given in (ids, changed):
        logits(model, given, policy="topk", capacity=1.0)
        scores.append(model.notes[1].score)
    torch.testing.assert_close(scores[0][:, :10], scores[1][:, :10], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[0][:, 10], scores[1][:, 10])


@methods
@attentions
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("policy", ["topk", "auto"])
def test_padding_changes_nothing(routing, attention, side, policy):
    ids = text(1, 15)
    model = calibrated(routing, attention=attention)
    rest = torch.zeros(1, 6, dtype=torch.long)
    padded = torch.cat([rest, ids] if side == "left" else [ids, rest], 1)
    mask = (padded != 0).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)
    alone = logits(model, ids, policy=policy)
    beside = logits(
        model,
        torch.cat([padded, text(1, 21, 4)]),
        attention_mask=torch.cat([mask, torch.ones_like(mask)]),
        position_ids=torch.cat([position, torch.arange(21)[None]]),
        policy=policy,
    )
    real = slice(6, 21) if side == "left" else slice(0, 15)
    torch.testing.assert_close(beside[:1, real], alone, atol=1e-4, rtol=1e-4)


@short
def test_documents_in_one_row_are_apart(routing):
    one, two = text(1, 9), text(1, 12, 3)
    model = calibrated(type(routing)(always_run="first"))
    position = torch.cat([torch.arange(9), torch.arange(12)])[None]
    packed = logits(model, torch.cat([one, two], 1), position_ids=position)
    torch.testing.assert_close(packed[:, :9], logits(model, one), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[:, 9:], logits(model, two), atol=1e-4, rtol=1e-4)


def test_the_first_guess_of_stt_is_exactly_nothing_and_sees_only_the_token_before():
    model = routed(STT())
    transition = model.routed[0].router.transition
    seen = []
    transition.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = text()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 5) % 50
    for given in (ids, changed):
        logits(model, given, policy="topk")
    assert (seen[0][:, 0] == 0).all()
    assert (transition(seen[0][:, :1])[0] == 0).all()
    assert torch.equal(seen[0][:, :8], seen[1][:, :8])
    assert not torch.equal(seen[0][:, 8], seen[1][:, 8])
    logits(model, ids, policy="topk")
    details = model.notes[1].details
    torch.testing.assert_close(details["static"][:, 0], details["change"][:, 0])


def test_the_knob():
    model, ids = calibrated(MoD()), text(2, 40, 9)
    shares = []
    for capacity in (0.1, 0.3, 0.5, 0.8, 1.0):
        logits(model, ids, capacity=capacity)
        shares.append(model.realised[1])
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert shares[1] == pytest.approx(0.3, abs=0.1)
    logits(model, ids, speed=0.7)
    assert model.realised[1] == shares[1]
    logits(model, ids, speed=1)
    assert model.realised == {1: 0, 3: 0}
    logits(model, ids, capacity={1: 0.1, 3: 1.0})
    assert model.realised == {1: shares[0], 3: 1}
    with turned(model, Knob(threshold=float("inf"))):
        logits(model, ids)
        assert model.realised == {1: 0, 3: 0}
    logits(model, ids)
    assert model.realised[1] == shares[2]


def test_scores_keep_their_bits_under_autocast():
    model, seen = routed(MoD()), {}
    with torch.autocast("cpu", torch.bfloat16):
        model.routed[0].register_forward_pre_hook(lambda _, args: seen.update(stream=args[0]))
        logits(model, text(), policy="topk")
    expected = seen["stream"].float() @ model.routed[0].router.weight
    assert torch.equal(model.notes[1].score, expected)


def test_hidden_states_are_the_whole_stream():
    states = routed(MoD())(text(), policy="topk", use_cache=False, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 16, 32)] * 6


def test_mask_without_any_token_has_no_places():
    assert of_mask(torch.zeros(2, 5, dtype=torch.bool)).places == 0


def test_what_does_not_fit_is_refused():
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=10))
    with pytest.raises(TypeError, match="GPT2LMHeadModel cannot be routed: its layers must take"):
        route(gpt, MoD())
    with pytest.raises(TypeError, match="routed already"):
        route(routed(MoD()), MoD())
    with pytest.raises(ValueError, match="layer 0 cannot be routed"):
        route(dense(), MoD(routed_layers=(0, 2)))
    with pytest.raises(ValueError, match=r"must be in 1 ... 4, got \(1, 5\)"):
        route(dense(), MoD(routed_layers=(1, 5)))
    with pytest.raises(ValueError, match="without duplicates"):
        route(dense(), MoD(routed_layers=(1, 1)))
    with pytest.raises(ValueError, match="needs a dense layer before every routed one"):
        route(dense(), SDT(routed_layers=(1, 2)))
    with pytest.raises(ValueError, match="needs at least 2 layers"):
        route(dense(num_hidden_layers=1), SDT())
    with pytest.raises(ValueError, match="3 capacities for 2 routed layers"):
        route(dense(), MoD(capacity=(0.1, 0.2, 0.3)))
    sliding = Qwen2Config(
        **dense("qwen2").config.to_dict() | {"use_sliding_window": True, "max_window_layers": 2, "layer_types": None}
    )
    sliding.layer_types = ["full_attention"] * 3 + ["sliding_attention"] * 2
    with pytest.raises(ValueError, match="layer 3 has sliding_attention"):
        route(Qwen2ForCausalLM(sliding), MoD())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoD(capacity=0), "capacity must be in"),
        (lambda: MoD(capacity=(0.5, 1.5)), "capacity must be in"),
        (lambda: MoD(gate="soft"), "gate must be one of 'raw', 'sigmoid', 'ste', 'hard'; got 'soft'"),
        (lambda: SDT(gate="raw"), "gate must be one of 'soft', 'ste', 'hard'"),
        (lambda: MoD(decode_routing="student", student="none"), "needs a student"),
        (lambda: MoD(student_weight=0), "learns nothing"),
        (lambda: MoD(aux_weight=-1), "aux_weight must be at least 0"),
        (lambda: SDT(prior_factor=0), "the width of the guess must be above 0"),
        (lambda: SDT(ma_window=0), "ma_window must be at least 1"),
        (lambda: SDT(o_ce_init=0), "o_ce_init must be above 0"),
        (lambda: SDT(bypass="prior", prior_weight=0), "trained by the loss of the guess"),
        (lambda: STT(mode="dynamic", capacity=0.3), "has no budget"),
        (lambda: STT(mode="dynamic", g_threshold=1), "must be in"),
        (lambda: STT(output="masked"), "set kv_scope='all'"),
        (lambda: STT(output="dense", teacher_grad=False), "leaves untrained"),
        (lambda: Knob(capacity=0.5, threshold=1.0), "give one of both"),
        (lambda: Knob(capacity=1.5), "capacity must be in"),
        (lambda: routed(MoD())(text(), speed=2), "speed must be in"),
        (lambda: routed(MoD())(text(), speed=0.5, capacity=0.5), "speed stands for a capacity"),
        (lambda: routed(SDT())(text()), "layer 1 has no quantiles"),
        (lambda: routed(MoD())(text(), capacity=0.3), "layer 1 has no quantiles"),
        (lambda: routed(MoD(aux_weight=0))(text()), "layer 1 has no quantiles"),
        (lambda: routed(STT())(text()), "the student was never trained"),
        (lambda: routed(SDT())(text(), policy="student"), "needs a student"),
        (lambda: routed(MoD())(text(), labels=text(2, 9)), "one for each token"),
        (lambda: routed(MoD(), attention="flex_attention")(text()), "got 'flex_attention'"),
        (lambda: Routing.from_dict({"hue": 1}), "has no hue"),
    ],
)
def test_what_must_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
