"""Experiments on small language models, three seeds each: every method at equal compute, what routers do, recall.

    python recipes/build_corpus.py --out data/corpus
    python recipes/language_experiments.py --corpus data/corpus --threads 1 --out runs/language-experiments

Runs go by seed, so that an interrupted series has something of every method; the same line goes on with it. With
`--write` the runs that are finished are collected in `docs/results/language-experiments.json` and as tables between
the markers of `docs/language.md`.
"""

import argparse
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from language import ROUTINGS, Recipe, compare_one, encode, learn_pieces
from language_recall import Recall, recall_one, routings
from language_tables import Row, between, collect, curve, moved, quality, recall, routers
from torch import Tensor

from whenwhere.train.files import save_whole

SMALL = Recipe(
    vocabulary=320,
    width=64,
    layers=4,
    heads=4,
    middle=176,
    learning_rate=4e-3,
    calibration=16_384,
    evaluation=32_768,
)


DOCS = Path(__file__).parent.parent / "docs"


def read(corpus: Path, out: Path) -> dict[str, Tensor]:
    """Both parts of the corpus as token numbers, (N,), of the training text every fourth page of 100,000 letters."""
    file = out / "texts.pt"
    if file.exists():
        texts = torch.load(file, weights_only=True)
    else:
        tokenizer = learn_pieces(corpus / "train.txt", SMALL.vocabulary, out / "tokenizer")
        whole = (corpus / "train.txt").read_text(encoding="utf-8")
        pages = "".join(whole[start : start + 100_000] for start in range(0, len(whole), 400_000))
        (out / "train.txt").write_text(pages, encoding="utf-8")
        files = {"train": out / "train.txt", "held-out": corpus / "held-out.txt"}
        texts = {part: encode(tokenizer, text).short() for part, text in files.items()}
        save_whole(texts, file)
    return {part: ids.long() for part, ids in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="train.txt and held-out.txt")
    parser.add_argument("--steps", type=int, default=300, help="of the dense model")
    parser.add_argument("--budget", type=float, default=3600, help="seconds of training, of every run")
    parser.add_argument("--out", type=Path, default=Path("runs/language-experiments"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="autocast: no gain for models as small as these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="collect finished runs in docs, train nothing")
    args = parser.parse_args()
    if args.write:
        write(args.out)
        return
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down
    texts = read(args.corpus, args.out)
    for seed in args.seeds:
        for method in ROUTINGS:
            compare_one(SMALL, method, seed, texts, args)
    for seed in args.seeds:
        for name in routings(Recall().capacity):
            recall_one(Recall(), name, seed, args.out)


def write(folder: Path) -> None:
    """Put all finished runs of a folder into one file of numbers, and their tables onto the page."""
    found = collect(folder)
    report = {"date": date.today().isoformat(), "recipe": asdict(SMALL), "recall recipe": asdict(Recall())} | found
    for row in found["text"]:
        del row["recipe"]
    (DOCS / "results" / "language-experiments.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page = (DOCS / "language.md").read_text(encoding="utf-8")
    for name, text in tables(found).items():
        page = between(page, name, text)
    (DOCS / "language.md").write_text(page, encoding="utf-8")


def tables(found: dict[str, list[Row]]) -> dict[str, str]:
    """By the name of its markers."""
    makers = {"quality": quality, "curve": curve, "routers": routers, "shift": moved}
    made = {name: make(found["text"]) for name, make in makers.items() if found["text"]}
    return made | ({"recall": recall(found["recall"])} if found["recall"] else {})


if __name__ == "__main__":
    main()
