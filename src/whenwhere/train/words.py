"""A small CLIP tokenizer learned from captions: lower case, byte-pair encoding, words ended by `</w>`.

The pairs are counted here, with ties broken by spelling, so that the same captions give the same tokenizer everywhere;
the trainer of `tokenizers` breaks ties differently from run to run.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

from transformers import CLIPTokenizer

START, END, STOP = "<|startoftext|>", "<|endoftext|>", "</w>"
# What a caption may hold besides words it was learned from; anything else is the unknown token.
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[]_"
PIECES = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")  # how CLIP cuts a caption before it looks for pairs

Word = tuple[str, ...]
Pair = tuple[str, str]


def learn_tokenizer(texts: Iterable[str], size: int = 2048, length: int = 16) -> CLIPTokenizer:
    """A tokenizer of at most `size` entries; prompts are cut and padded to `length` tokens."""
    words = Counter(piece for text in texts for piece in PIECES.findall(text.lower()) if set(piece) <= set(CHARACTERS))
    entries = [START, END, *CHARACTERS, *(character + STOP for character in CHARACTERS)]
    merges = learn_merges({spell(word): count for word, count in words.items()}, size - len(entries))
    # Two merges may lead to one string; it then has one entry.
    entries = list(dict.fromkeys([*entries, *(left + right for left, right in merges)]))
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def spell(word: str) -> Word:
    """The letters of a word, the last one marked: `sun` -> `s`, `u`, `n</w>`."""
    return (*word[:-1], word[-1] + STOP)


def learn_merges(words: dict[Word, int], most: int) -> list[Pair]:
    """The pairs to join, in order: each time the most frequent one, of equals the first by spelling.

    Stops early when no pair is left that occurs twice.
    """
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[Word]] = defaultdict(set)  # the words, as now cut, that hold a pair
    for word, count in words.items():
        for pair in pairwise(word):
            counts[pair] += count
            places[pair].add(word)
    words = dict(words)
    merges: list[Pair] = []
    while len(merges) < most and counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        merges.append(best)
        for word in sorted(places[best]):
            count = words.pop(word)
            for pair in pairwise(word):
                counts[pair] -= count
                places[pair].discard(word)
            joined = join(word, best)
            words[joined] = words.get(joined, 0) + count
            for pair in pairwise(joined):
                counts[pair] += count
                places[pair].add(joined)
        counts = +counts  # pairs that are gone
    return merges


def join(word: Word, pair: Pair) -> Word:
    """The word with every occurrence of the pair joined, from left to right."""
    parts: list[str] = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return tuple(parts)
