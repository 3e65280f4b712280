"""Tokens by index, on numbers that a reader can follow."""

import pytest
import torch
from torch import tensor

from whenwhere.decisions.importance import entropy, normalised, received
from whenwhere.tokens import favour, grid_of, highest, many, put, take

# Two rows of four tokens with two features.
TOKENS = torch.arange(16.0).reshape(2, 4, 2)


def test_every_row_takes_tokens_of_its_own():
    assert take(TOKENS, tensor([[0, 3], [2, 1]])).tolist() == [[[0, 1], [6, 7]], [[12, 13], [10, 11]]]


def test_what_is_put_lies_where_it_was_taken_from_and_the_original_stays():
    index = tensor([[3, 0], [1, 2]])
    before = TOKENS.clone()
    changed = put(TOKENS, index, take(TOKENS, index) * 100)
    assert changed[:, :, 0].tolist() == [[0, 2, 4, 600], [8, 1000, 1200, 14]]
    assert torch.equal(TOKENS, before)


def test_no_tokens_change_nothing():
    nothing = torch.zeros(2, 0, dtype=torch.long)
    assert take(TOKENS, nothing).shape == (2, 0, 2)
    assert torch.equal(put(TOKENS, nothing, take(TOKENS, nothing)), TOKENS)


def test_all_tokens_in_any_order_are_the_whole_sequence():
    index = tensor([[3, 2, 1, 0], [1, 3, 0, 2]])
    assert torch.equal(put(torch.zeros_like(TOKENS), index, take(TOKENS, index)), TOKENS)


def test_the_highest_scores_are_chosen_row_by_row():
    assert highest(tensor([[1.0, 4, 2, 3], [9, 8, 7, 6]]), 2).tolist() == [[1, 3], [0, 1]]


@pytest.mark.parametrize(("share", "count"), [(-0.1, 0), (0, 0), (0.24, 0), (0.25, 1), (0.99, 3), (1, 4), (3, 4)])
def test_a_share_of_four_tokens_is_rounded_down_and_stays_in_range(share, count):
    assert many(share, 4) == count


def test_a_grid_is_a_square_unless_it_is_named():
    assert grid_of(16) == (4, 4)
    assert grid_of(12, (3, 4)) == (3, 4)
    with pytest.raises(ValueError, match="12 tokens make no grid of 3 x 3"):
        grid_of(12)
    with pytest.raises(ValueError, match=r"grid=\(height, width\)"):
        grid_of(16, (3, 4))


def test_the_best_of_every_cell_is_favoured():
    scores = tensor([[1.0, 2, 3, 4], [8, 7, 6, 5]]).reshape(1, 8)  # two cells: 1 2 8 7 and 3 4 6 5
    assert favour(scores, (2, 4), 2, 0.5).tolist() == [[1, 2, 3, 4, 12, 7, 9, 5]]
    with pytest.raises(ValueError, match="cells of 4 x 4 do not fill a grid of 2 x 4"):
        favour(scores, (2, 4), 4, 0.5)


def attention_map(query, key, heads, mask=None):
    """(B, N, T): softmax of the logits, its heads averaged; written head by head."""
    maps = []
    for q, k in zip(query.chunk(heads, -1), key.chunk(heads, -1), strict=True):
        logits = q @ k.mT / q.shape[-1] ** 0.5
        maps.append(torch.softmax(logits if mask is None else logits + mask, -1))
    return torch.stack(maps).mean(0)


def test_received_attention_is_the_column_sum_of_the_map_however_it_is_cut(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 10, 8, generator=generator)
    expected = attention_map(query, key, 2).sum(1)
    for block in (2**24, 3 * 2 * 10 * 4, 1):
        monkeypatch.setattr("whenwhere.decisions.importance._BLOCK", block)
        assert torch.allclose(received(query, key, 2), expected, rtol=1e-6)
    assert torch.allclose(expected.sum(1), torch.full((3,), 10.0))


def test_entropy_is_that_of_the_mean_map_of_the_branches_and_heeds_the_mask():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(4, 9, 8, generator=generator), torch.randn(4, 5, 8, generator=generator)
    mask = torch.zeros(4, 1, 5)
    mask[:2, :, 3:] = -10000.0
    mean = attention_map(query, key, 2, mask).reshape(2, 2, 9, 5).mean(0)
    expected = -(mean * (mean + 1e-7).log()).sum(-1)
    found = entropy(query, key, 2, mask, branches=2)
    assert torch.allclose(found, torch.cat([expected, expected]), rtol=1e-5)


def test_normalised_rows_have_length_one():
    assert normalised(tensor([[3.0, 4]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
