"""What a misspelt name was probably meant to be."""

import difflib
from collections.abc import Iterable

_LIKENESS = 0.5  # below it a guess is no help


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for the end of an error message, such as "; did you mean 'sdxl'?"; empty where nothing is near.

    Args:
        name: what was asked for, in any case.
        known: what there is.
    """
    words = {word.lower(): word for word in known}
    near = difflib.get_close_matches(name.lower(), words, n=1, cutoff=_LIKENESS)
    return f"; did you mean {words[near[0]]!r}?" if near else "."
