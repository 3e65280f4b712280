"""The page on compositions is what the tiny pipelines do."""

import compositions
import pytest
from compositions import FAMILIES, MARKED, PAGE


def test_the_page_has_every_family():
    assert tuple(case for _, case, _ in MARKED.findall(PAGE.read_text(encoding="utf-8"))) == FAMILIES


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ("svd", "sd3") else pytest.mark.slow) for case in FAMILIES]
)
def test_the_page_says_what_happens(case):
    text = PAGE.read_text(encoding="utf-8")
    assert text == compositions.refreshed(text, (case,)), "run tests/compositions.py"


@pytest.mark.parametrize("case", FAMILIES)
def test_no_pair_fails(case):
    """A pair is carried out or refused in words, never stopped by an error of torch."""
    page = PAGE.read_text(encoding="utf-8")
    own = next(text for text in page.split("## ") if f"composes: {case} " in text)
    assert "**fails**" not in own
