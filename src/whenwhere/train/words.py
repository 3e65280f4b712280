"""A small CLIP tokenizer learned from captions: lower case, byte-level BPE, words ended by `</w>`."""

import json
from collections.abc import Iterable

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def learn_tokenizer(texts: Iterable[str], size: int = 2048, length: int = 16) -> CLIPTokenizer:
    """A tokenizer of at most `size` entries; prompts are cut and padded to `length` tokens. Needs `tokenizers`."""
    from tokenizers.trainers import BpeTrainer

    backend = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=[START, END],
        initial_alphabet=alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    learned = json.loads(backend.to_str())["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in learned["merges"]]
    vocabulary = dict(learned["vocab"])
    # Single bytes that end a word must be known too, or rare one-letter words would read as the end of the text.
    for letter in alphabet():
        if letter + "</w>" not in vocabulary:
            vocabulary[letter + "</w>"] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def alphabet() -> list[str]:
    """The letters, digits and marks a caption may hold; anything else is the unknown token."""
    return list("abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[]_")
