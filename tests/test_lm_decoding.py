"""Decoding with a smaller cache gives what one pass over the text gives, for every way to decode."""

import pytest
import torch
from tiny_language import calibrated, dense, routed, text
from torch import Tensor
from transformers import DynamicCache

from whenwhere.lm import SDT, STT, Knob, MoD, cache_bytes, cost, turned
from whenwhere.lm.cache import RoutedLayer

METHODS = [
    MoD(),
    MoD(gate="sigmoid", always_run="first"),
    MoD(decode_routing="student", student="linear2"),
    MoD(kv_scope="all"),
    MoD(kv_scope="reuse"),
    SDT(),
    SDT(surprise="relative", gate="soft", ma_window=5, ma_padding="replicate"),
    SDT(bypass="prior"),
    SDT(student="mlp", decode_routing="student"),
    STT(),
    STT(kv_scope="all", bypass="prior"),
]
methods = pytest.mark.parametrize("routing", METHODS, ids=str)
SHORT = [MoD(), SDT(), STT()]
short = pytest.mark.parametrize("routing", SHORT, ids=lambda routing: type(routing).__name__)


def padded(rows: int = 3, tokens: int = 14) -> tuple[Tensor, Tensor]:
    """Texts of different lengths with padding in front, and their mask."""
    ids = text(rows, tokens)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, : 3 * row] = mask[row, : 3 * row] = 0
    return ids, mask


@torch.no_grad()
def in_chunks(model, ids: Tensor, mask: Tensor | None, sizes: list[int], **more) -> tuple[Tensor, DynamicCache]:
    """Logits of a text that comes in pieces."""
    cache, found, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        end = start + size
        position = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
        seen = None if mask is None else mask[:, :end]
        piece = model(
            ids[:, start:end], attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True, **more
        )
        found.append(piece.logits)
        start = end
    return torch.cat(found, 1), cache


@methods
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_text_in_pieces_is_the_text_at_once(routing, attention, rows):
    model = calibrated(routing, attention=attention)
    ids, mask = (text(1, 14), None) if rows == 1 else padded()
    whole, _ = in_chunks(model, ids, mask, [14])
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    position = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        without = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    assert 0 < sum(model.realised.values()) < 2
    torch.testing.assert_close(whole[real], without[real], atol=1e-4, rtol=1e-4)
    for sizes in ([1] * 14, [10, 1, 1, 1, 1], [5, 5, 4]):
        pieces, _ = in_chunks(model, ids, mask, sizes)
        torch.testing.assert_close(pieces[real], whole[real], atol=1e-4, rtol=1e-4)


@short
@pytest.mark.parametrize("compute", ["branch", "masked"])
def test_the_ways_to_compute_agree(routing, compute):
    ids, mask = padded()
    real = mask.bool()
    gathered, _ = in_chunks(calibrated(routing), ids, mask, [8] + [1] * 6)
    model = calibrated(type(routing)(decode_compute=compute))
    found, _ = in_chunks(model, ids, mask, [8] + [1] * 6)
    torch.testing.assert_close(found[real], gathered[real], atol=1e-4, rtol=1e-4)


@short
def test_a_given_selection_decodes_as_it_was_in_one_pass(routing):
    """The best of a text, replayed token by token."""
    model, ids = calibrated(routing), text(2, 12)
    with torch.no_grad():
        whole = model(ids, policy="topk", use_cache=False).logits
    masks = {index: note.mask for index, note in model.notes.items()}
    cache, found = DynamicCache(config=model.config), []
    for t in range(12):
        selection = {index: mask[:, t : t + 1] for index, mask in masks.items()}
        with torch.no_grad():
            found.append(model(ids[:, t : t + 1], past_key_values=cache, policy="none", selection=selection).logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_threshold_at_the_last_of_the_best_selects_the_best():
    model, ids = routed(SDT(surprise="relative")), text(1, 20)
    with torch.no_grad():
        model(ids, policy="topk", use_cache=False)
        first = model.notes[1]
        threshold = first.score[0].sort(descending=True).values[9].item()
        model(ids, policy="router", threshold=threshold, use_cache=False)
    assert torch.equal(model.notes[1].mask, first.mask)


def test_the_cache_holds_what_was_executed_and_the_formula_says_so():
    model, ids = calibrated(MoD()), text(1, 16)
    _, cache = in_chunks(model, ids, None, [9] + [1] * 7)
    layers = [layer for layer in cache.layers if isinstance(layer, RoutedLayer)]
    assert len(layers) == 2
    with torch.no_grad():
        model(ids, use_cache=False)
    counts = [int(note.mask.sum()) for note in model.notes.values()]
    assert [int(layer.slots.count) for layer in layers] == counts
    held = cache_bytes(cache)
    assert [held[1], held[3]] == [count * 2 * 2 * 8 * 4 for count in counts]
    assert held[0] == 16 * 2 * 2 * 8 * 4

    with torch.no_grad():
        topk = model(ids, policy="topk", use_cache=True).past_key_values
    formula = cost(model.config, model.routing, 16, number_bytes=4)
    assert sum(cache_bytes(topk).values()) == formula.cache_bytes
    plain = cost(model.config, None, 16, number_bytes=4)
    assert formula.cache_bytes / plain.cache_bytes == pytest.approx((3 + 2 * 0.5) / 5)


@methods
def test_generating_with_and_without_a_cache(routing):
    model = calibrated(routing)
    ids, mask = padded()
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "capacity": 0.4}
    with_cache = model.generate(**given)
    assert torch.equal(with_cache, model.generate(**given, use_cache=False))
    alone = model.generate(ids[2:, 6:], max_new_tokens=8, do_sample=False, capacity=0.4)
    alone = torch.nn.functional.pad(alone, (0, with_cache.shape[1] - 6 - alone.shape[1]))
    assert torch.equal(with_cache[2:, 6:], alone)


@short
def test_beams_and_samples(routing):
    model = calibrated(routing)
    ids, mask = padded()
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    assert torch.equal(model.generate(**given), model.generate(**given, use_cache=False))
    found = []
    for cached in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True, use_cache=cached))
    assert torch.equal(*found)


def test_the_knob_turns_in_generate_without_reloading():
    model, ids = calibrated(MoD()), text(1, 12)
    given = {"max_new_tokens": 8, "do_sample": False}
    full = dense().generate(ids, **given)
    assert torch.equal(model.generate(ids, **given, speed=0), full)
    sizes = []
    for capacity in (0.2, 0.9):
        out = model.generate(ids, **given, capacity=capacity, return_dict_in_generate=True)
        sizes.append(sum(cache_bytes(out.past_key_values).values()))
    assert sizes[0] < sizes[1]
    with turned(model, Knob("all")):
        assert torch.equal(model.generate(ids, **given), full)
    model.knob = Knob("none")
    assert model.generate(ids, **given, return_dict_in_generate=True).past_key_values.layers[1].get_seq_length() == 0


def test_a_prompt_may_be_routed_by_the_best_of_it():
    model, ids = calibrated(MoD(prefill_routing="topk")), text(2, 12)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert cache.layers[1].slots.count.tolist() == [6, 6]
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    assert model.call.policy == "router"
    assert cache.get_seq_length() == 13


def test_sequences_can_be_repeated_and_selected():
    model = calibrated(SDT())
    ids, mask = padded()
    _, cache = in_chunks(model, ids, mask, [14])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([4, 1]))
    layer = cache.layers[1]
    _, alone = in_chunks(model, ids[[2, 0]], mask[[2, 0]], [14])
    assert torch.equal(layer.slots.count, alone.layers[1].slots.count)
    torch.testing.assert_close(layer.memory["static"], alone.layers[1].memory["static"])
    length = alone.layers[1].keys.shape[2]
    torch.testing.assert_close(layer.keys[:, :, :length], alone.layers[1].keys)
    cache.reset()
    assert layer.get_seq_length() == 0
    assert not layer.memory


def test_what_must_raise():
    model, ids = calibrated(MoD()), text(1, 8)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, assistant_model=dense(), max_new_tokens=4)
    with pytest.raises(ValueError, match="routed layers need the dynamic cache; found StaticLayer"):
        model.generate(ids, cache_implementation="static", max_new_tokens=4)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.init_continuous_batching()
    with torch.no_grad():
        cache = model(ids).past_key_values
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="after a cached beginning only its end is here"):
            model(ids[:, :1], past_key_values=cache, policy="topk")
        with pytest.raises(ValueError, match="give no past_key_values"):
            model.train()(ids[:, :1], past_key_values=cache)
        foreign = dense()(ids).past_key_values
        with pytest.raises(ValueError, match="filled by a model without routing"):
            model.eval()(ids[:, :1], past_key_values=foreign)
        teacher = calibrated(STT())
        for policy in ("router", "topk"):
            with pytest.raises(ValueError, match="scores a token by running the layer on it"):
                teacher(ids, policy=policy, use_cache=True)
        with pytest.raises(ValueError, match="scores a token by running the layer on it"):
            teacher.generate(ids, policy="router", max_new_tokens=4)
    with pytest.raises(NotImplementedError, match="does not work with beam search"):
        calibrated(MoD(kv_scope="reuse")).generate(ids, num_beams=2, max_new_tokens=4)
