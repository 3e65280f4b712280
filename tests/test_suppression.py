"""Counting whether negative prompts worked."""

import math

import pytest
import torch

from whenwhere.metrics.suppression import Share, spread, success


def test_the_interval_is_wilsons():
    # 8 of 10, worked by hand: (0.8 + 0.19207) / 1.38415 -+ 1.41600 * sqrt(0.016 + 0.0096)
    share = Share.of(8, 10)
    assert share.value == 0.8
    assert share.low == pytest.approx(0.4902, abs=1e-4)
    assert share.high == pytest.approx(0.9433, abs=1e-4)


@pytest.mark.parametrize(("hits", "edge"), [(0, 0.0), (50, 1.0)])
def test_the_interval_of_none_and_of_all_stays_in_range(hits, edge):
    share = Share.of(hits, 50)
    assert share.value == edge
    assert 0 <= share.low < share.high <= 1


def test_no_pictures_are_an_error():
    with pytest.raises(ValueError, match="a share of no pictures"):
        Share.of(0, 0)


def test_entropy_is_a_share_of_that_of_equal_frequencies():
    assert spread([0, 1, 2, 3], 4) == pytest.approx(1)
    assert spread([2, 2, 2], 4) == 0
    assert spread([0, 0, 0, 1], 2) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2))
    assert spread([], 2) == 0


def counted(seen: list[list[int]], error: list[float]) -> object:
    """Colour (3 values, red is 0, unstated) and shape (2 values, all ask for 1)."""
    wanted = torch.tensor([[0, 1]] * len(seen))
    stated = torch.tensor([[False, True]] * len(seen))
    return success(
        torch.tensor(seen), wanted, stated, torch.tensor(error), counts=(3, 2), factor=0, value=0, limit=0.25
    )


def test_a_picture_succeeds_where_the_value_is_gone_and_all_that_was_stated_is_there():
    found = counted([[1, 1], [2, 1], [0, 1], [1, 0], [2, 1]], [0.1, 0.1, 0.1, 0.1, 0.9])
    assert found.suppressed.value == 0.8  # the third is red
    assert found.retained.value == 0.8  # the fourth has the wrong shape
    assert found.readable.value == 0.8  # the last is a blur
    assert found.joint.value == 0.4
    assert found.pictures == 5


def test_diversity_looks_at_what_is_left_of_the_negative_factor():
    assert counted([[1, 1], [2, 1], [0, 1]], [0.1] * 3).diversity == pytest.approx(1)  # both other colours, equally
    assert counted([[2, 1], [2, 1], [0, 1]], [0.1] * 3).diversity == 0


def test_captions_that_state_the_factor_are_an_error():
    one = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="no caption may state it"):
        success(one, one, one.bool(), torch.zeros(1), counts=(3, 2), factor=0, value=0)
