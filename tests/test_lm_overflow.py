"""A routed cache with a bound: full is an error, or skips tokens, or forgets the oldest; in pieces as at once."""

import pytest
import torch
from tiny_language import calibrated, dense, text

from whenwhere.lm import SDT, MoD, cache_bytes

SLOTS = 5


def pieces(model, ids, mask, cuts):
    cache, logits, ran = None, [], []
    for begin, end in cuts:
        output = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
        ran.append(model.notes[1].mask)
    return torch.cat(logits, 1), torch.cat(ran, 1), cache


@pytest.mark.parametrize("overflow", ["force_skip", "evict_oldest"])
@pytest.mark.parametrize("method", [MoD, SDT])
@pytest.mark.parametrize("padded", [False, True])
def test_in_pieces_as_at_once(overflow, method, padded):
    model = calibrated(method(cache_slots=SLOTS, cache_overflow=overflow))
    ids, mask = text(3, 24), torch.ones(3, 24, dtype=torch.long)
    mask[1, : 6 * padded] = 0
    single = pieces(model, ids, mask, [(0, 7), *((place, place + 1) for place in range(7, 24))])
    whole = pieces(model, ids, mask, [(0, 24)])
    kept = mask.bool()
    assert torch.equal(single[1][kept], whole[1][kept])
    torch.testing.assert_close(single[0][kept], whole[0][kept], atol=1e-4, rtol=1e-4)
    for cache in (single[2], whole[2]):
        assert cache.layers[1].slots.count.max() <= SLOTS
        assert cache.layers[1].keys.shape[2] <= SLOTS
        assert cache_bytes(cache)[1] < cache_bytes(cache)[0] * SLOTS / 23
    assert (whole[1].sum(1) <= SLOTS).all() == (overflow == "force_skip")


def test_the_oldest_makes_place():
    model = calibrated(MoD(cache_slots=3, cache_overflow="evict_oldest"))
    everything = {1: torch.ones(1, 1, dtype=torch.bool), 3: torch.ones(1, 1, dtype=torch.bool)}
    cache = None
    for place in range(6):
        cache = model(text(1, 6)[:, place : place + 1], past_key_values=cache, use_cache=True, selection=everything)
        cache = cache.past_key_values
    assert cache.layers[1].slots.position.tolist() == [[3, 4, 5]]
    assert cache.layers[1].slots.count.tolist() == [3]


def test_room_enough_changes_nothing_and_beams_work():
    ids = text(2, 10)
    plain = calibrated(MoD())
    for overflow in ("error", "force_skip", "evict_oldest"):
        model = calibrated(MoD(cache_slots=40, cache_overflow=overflow))
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
        assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
    full = calibrated(MoD(cache_slots=10, cache_overflow="evict_oldest", capacity=1))
    torch.testing.assert_close(full(ids, use_cache=True).logits, dense()(ids).logits, atol=1e-4, rtol=1e-4)


def test_full_is_an_error():
    model = calibrated(MoD(cache_slots=3))
    with pytest.raises(ValueError, match="needs 10 cache entries, and cache_slots=3; give more, or set cache_overflow"):
        model(text(1, 10), use_cache=True, policy="all")
    with pytest.raises(ValueError, match="bounds the entries of selected tokens"):
        MoD(cache_slots=3, kv_scope="all")
