"""The loop that trains language models, and the recipe that compares them."""

import json
import struct
import sys
import zlib
from pathlib import Path
from runpy import run_path

import pytest
import torch
from tiny_language import dense, routed, text

from whenwhere.lm import SDT, STT, MoD, Note, cost
from whenwhere.train.language import LanguageConfig, learn_language, shift, staying, windows

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))  # recipes import one another
IDS = text(1, 400, seed=3)[0]
SILENT = {"tell": lambda _: None}


def config(**more) -> LanguageConfig:
    return LanguageConfig(**{"budget": 1e9, "steps": 4, "batch_size": 2, "context": 16, "log_every": 1} | more)


def test_windows_are_parts_of_the_text():
    found = windows(torch.arange(30), 500, 10, torch.Generator().manual_seed(0))
    assert found.shape == (500, 10)
    assert (found.diff(dim=1) == 1).all()
    assert set(found[:, 0].tolist()) == set(range(21))  # the last window is drawn as well


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = learn_language(routed(STT()), IDS, config(), tmp_path / "whole", **SILENT)

    class PowerError(Exception):
        pass

    def cut(*_) -> None:
        if (tmp_path / "parts" / "loss.jsonl").exists() and len(lines(tmp_path / "parts")) == 2:
            raise PowerError

    with pytest.raises(PowerError):
        learn_language(routed(STT()), IDS, config(save_every=0.0), tmp_path / "parts", prepare=cut, **SILENT)
    parts = learn_language(routed(STT()), IDS, config(), tmp_path / "parts", **SILENT)
    assert (parts.step, parts.tokens) == (whole.step, whole.tokens) == (4, 128)
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parts.model.state_dict().items())
    assert [row["loss"] for row in lines(tmp_path / "parts")] == [row["loss"] for row in lines(tmp_path / "whole")]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_ends_with_its_budget(tmp_path):
    ticks = iter(range(100))
    state = learn_language(
        dense(), IDS, config(budget=3.0, steps=50), tmp_path, clock=lambda: float(next(ticks)), **SILENT
    )
    assert state.step == 3


def test_training_lowers_the_loss_and_notes_the_shift(tmp_path):
    counting = torch.arange(400) % 40 + 5
    learn_language(routed(SDT()), counting, config(steps=40, learning_rate=1e-2), tmp_path, **SILENT)
    rows = lines(tmp_path)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert all(-2 <= row["shift"] <= 2 for row in rows)


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the text has 9 tokens, a window 16; give more text"):
        learn_language(dense(), IDS[:9], config(), tmp_path, **SILENT)


def test_the_shift_is_the_difference_of_two_correlations():
    rising, falling = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 3.0, 1.0]])
    mask = torch.ones_like(rising, dtype=torch.bool)
    note = Note(mask, rising, None, None, {}, {"expected": rising, "unexpected": falling})
    assert shift({1: note}) == pytest.approx(2.0)
    assert shift({1: Note(mask, rising, None, None, {}, {})}) is None


def test_what_stays_selected_without_the_other_criterion():
    """Of tokens 0 and 1, expected change alone would have selected both, unexpected change one."""
    model = routed(SDT(capacity=0.5))
    ids = text(1, 4)
    mask = torch.tensor([[True, True, False, False]])
    with torch.no_grad():
        model(ids, policy="all", selection={1: mask, 3: mask}, use_cache=False)
    details = {"expected": torch.tensor([[4.0, 3, 2, 1]]), "unexpected": torch.tensor([[4.0, 1, 2, 3]])}
    for index in (1, 3):
        model.call.notes[index] = Note(mask, details["expected"], None, None, {}, details)
    assert staying(model) == {"expected": 1.0, "unexpected": 0.5}
    first = routed(SDT(capacity=0.5, always_run="first"))
    with torch.no_grad():
        first(ids, policy="all", use_cache=False)
    falling = {"expected": -details["expected"], "unexpected": -details["expected"]}
    for index in (1, 3):  # token 0 has the lowest of both, and is selected nevertheless
        first.call.notes[index] = Note(mask, falling["expected"], None, None, {}, falling)
    assert staying(first) == {"expected": 0.5, "unexpected": 0.5}


def test_a_batch_with_labels_may_be_drawn(tmp_path):
    """Nothing is asked for but the last token, which is always 7."""

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(10, 40, (4, 6), generator=generator)
        ids[:, -1] = 7
        return ids, torch.where(ids == 7, ids, -100)

    learn_language(dense(), draw, config(steps=25, learning_rate=1e-2), tmp_path, **SILENT)
    rows = lines(tmp_path)
    assert rows[-1]["loss"] < 0.2 < rows[0]["loss"]


@pytest.fixture(scope="module")
def recipe():
    return run_path(str(RECIPES / "language.py"))


def test_runs_are_as_long_as_the_dense_one_is_dear(recipe):
    tiny = recipe["Recipe"](vocabulary=64, width=32, layers=4, heads=2, middle=64, context=16)
    model = recipe["build"](tiny, MoD(student="none"), 0)
    head = 16 * 32 * 64
    assert recipe["macs"](tiny, model) == cost(model.config, model.routing, 16).macs + head
    assert recipe["macs"](tiny, recipe["build"](tiny, None, 0)) > recipe["macs"](tiny, model)
    assert recipe["macs"](tiny, recipe["build"](tiny, STT(), 0)) > recipe["macs"](tiny, recipe["build"](tiny, SDT(), 0))


def test_the_lot_falls_on_the_same_number_of_tokens_everywhere(recipe):
    model = routed(MoD(student="none"))
    knob = recipe["lottery"](model, text(2, 16), 0.25, torch.Generator().manual_seed(0))
    assert sorted(knob.selection) == [1, 3]
    assert all((mask.sum(1) == 4).all() for mask in knob.selection.values())
    assert not torch.equal(knob.selection[1], knob.selection[3])


def test_a_comparison_writes_a_table_and_goes_on(recipe, tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    words = [f"word{number % 37} of {number % 11}" for number in range(4000)]
    (corpus / "train.txt").write_text("\n".join(words), encoding="utf-8")
    (corpus / "held-out.txt").write_text("\n".join(words[::-1]), encoding="utf-8")
    tiny = recipe["Recipe"](300, 32, 4, 2, 64, 16, 2, calibration=256, evaluation=256)
    monkeypatch.setitem(recipe["main"].__globals__, "Recipe", lambda: tiny)
    threads = str(torch.get_num_threads())
    command = ["language.py", "--corpus", str(corpus), "--steps", "2", "--budget", "60", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", "--threads", threads])
    recipe["main"]()
    rows = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in rows] == list(recipe["ROUTINGS"])
    curve = {point["capacity"]: point for point in rows[-2]["curve"]}
    assert curve["1"]["realised"] == 1
    assert curve["0.5 topk"]["realised"] == 0.5
    printed = (tmp_path / "run" / "table.md").read_text(encoding="utf-8")
    assert printed.count("\n| ") == 2 * len(rows)  # heads included: the dense model has no curve
    assert set(rows[-1]["alone"]) == {"expected", "unexpected"}
    before = (tmp_path / "run" / "mod-0" / "state.pt").stat().st_mtime_ns
    recipe["main"]()
    assert (tmp_path / "run" / "mod-0" / "state.pt").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count(printed) == 2


def test_novels_are_read_without_r(tmp_path):
    corpus = run_path(str(RECIPES / "build_corpus.py"))
    header = b"X\n" + struct.pack(">iii", 3, 0x040201, 0x030500) + struct.pack(">i", 5) + b"UTF-8"
    values = [b"MANSFIELD PARK", b"", "naïve".encode()]
    record = header + struct.pack(">ii", 16, 3) + b"".join(struct.pack(">ii", 0x40009, len(v)) + v for v in values)
    packed = struct.pack(">I", len(record)) + zlib.compress(record)
    (tmp_path / "Rdata.rdb").write_bytes(packed + packed)
    found = list(corpus["novels"](tmp_path / "Rdata.rdb"))
    assert found == [("mansfield_park", "MANSFIELD PARK\n\nnaïve")] * 2


def test_texts_are_tidied():
    tidy = run_path(str(RECIPES / "build_corpus.py"))["tidy"]
    assert tidy("*** START OF THIS PROJECT GUTENBERG EBOOK ***\r\nA \r\n\r\n\r\n\r\nB\r\n") == "A\n\nB"
