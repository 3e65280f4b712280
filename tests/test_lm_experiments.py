"""The experiments on language models: the task of recall, the tables, and the conversion of a pretrained model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_language import dense
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))  # recipes import one another

import language_tables as tables
from language_recall import Recall, blind, recall_one, routings

RECALL = Recall(begun=2, steps=2, batch_size=4, evaluation=8)


def test_what_is_asked_for_is_the_value_of_the_key():
    ids, labels = RECALL.draw(50, torch.Generator().manual_seed(0))
    names = RECALL.names
    for text, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        pairs = [token - 1 - 2 * names for token in text if 2 * names < token]
        values = dict(divmod(pair, names) for pair in pairs)
        assert len(values) == RECALL.pairs
        places = [place for place, label in enumerate(asked) if label != -100]
        assert len(places) == RECALL.asked
        for place in places:
            key = text[place - 1] - 1 - names
            assert asked[place] == 1 + names * (names + 2) + values[key]
    assert ids.max() < RECALL.recipe.vocabulary
    assert labels.max() < RECALL.recipe.vocabulary


def test_a_blind_layer_leaves_the_stream_and_stays_blind():
    model = dense()
    blind(model.model.layers[0].self_attn.o_proj.weight)
    stream = torch.randn(1, 3, 32)
    attended = model.model.layers[0].self_attn.o_proj(stream)
    assert not attended.any()
    assert not model.model.layers[0].self_attn.o_proj.weight.requires_grad


@pytest.mark.parametrize("name", ["dense", "random all", "mod selected", "sdt-relative all"])
def test_recall_is_learned_scored_and_not_learned_again(name, tmp_path, capsys):
    row = recall_one(RECALL, name, 0, tmp_path)
    assert 0 <= row["recalled"] <= 1
    assert (row["realised"] == 1) == (name == "dense")
    assert row["scope"] == name.partition(" ")[2]
    capsys.readouterr()
    assert recall_one(RECALL, name, 0, tmp_path) == row
    assert not capsys.readouterr().out


def test_every_method_has_both_scopes():
    found = routings(0.5)
    assert {name for name in found if name != "dense"} == {
        f"{method} {scope}" for method in ("random", "mod", "sdt-relative") for scope in ("selected", "all")
    }
    assert all(routing.kv_scope == name.split()[1] for name, routing in found.items() if routing is not None)


def run(method: str, seed: int, nats: float, **more) -> dict:
    curve = [{"capacity": "dense" if method == "dense" else "0.5", "nats": nats, "realised": 0.5}]
    return {"method": method, "seed": seed, "steps": 10, "macs": 2e12, "curve": curve} | more


def test_the_table_of_quality_compares_with_the_lot_of_the_same_seed():
    rows = [run("mod", 1, 3.5), run("random", 0, 3.0), run("random", 1, 4.0), run("mod", 0, 2.7), run("dense", 0, 2.5)]
    found = tables.quality(rows).splitlines()
    assert found[1] == "|---" * 9 + "|"
    assert found[2].startswith("| dense | 1 | 10 | 2.00 | 2.500 | -0.500 |")
    assert found[3].startswith("| random | 2 | 10 | 2.00 | 3.500 ± 0.707 |  | 50.0 ± 0.0 % |")
    assert found[4].startswith("| MoD | 2 | 10 | 2.00 | 3.100 ± 0.566 | -0.400 ± 0.141 |")


def test_the_shift_is_read_where_its_share_of_the_run_is():
    training = [
        {"step": step, "shift": step / 100, "expected alone": 0.25, "unexpected alone": 0.75}
        for step in range(10, 101, 10)
    ]
    found = tables.moved([run("sdt-paper", 0, 3.0, training=training)]).splitlines()
    assert found[2] == "| SDT, paper | corr(u, CE) - corr(u, CU) | 0.10 | 0.10 | 0.20 | 0.50 | 0.70 | 1.00 |"
    assert "| stay selected without CU | 0.25 |" in found[3]
    assert "| stay selected without CE | 0.75 |" in found[4]


def test_a_table_goes_between_its_markers():
    page = "a\n<!-- experiments: curve -->\nold\n<!-- end -->\nb\n"
    assert tables.between(page, "curve", "new") == "a\n<!-- experiments: curve -->\nnew\n<!-- end -->\nb\n"
    with pytest.raises(ValueError, match="no markers for recall: <!-- experiments: recall -->"):
        tables.between(page, "recall", "new")


# peft asks transformers for what is about to be renamed there
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("method", ["dense", "mod", "sdt-relative", "stt"])
def test_a_model_is_converted_in_stages(method, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="needs the extra `peft`")
    import language_smollm2

    monkeypatch.setattr(language_smollm2, "WINDOW", 16)
    dense(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    task = language_smollm2.Conversion(1, 1, 2, 16, calibration=64, evaluation=64)
    ids = torch.randint(3, 50, (600,), generator=torch.Generator().manual_seed(0))
    rows = language_smollm2.convert(task, method, tmp_path / "dense", {"train": ids, "held-out": ids}, tmp_path)
    stages = ["new", "adapters"] if method == "dense" else ["new", "routers", "adapters"]
    assert [row["stage"] for row in rows] == stages
    if method != "dense":
        whole = [point["nats"] for row in rows[1:] for point in row["curve"] if point["capacity"] == "1"]
        assert whole[0] != whole[1]  # adapters change the language model, routers do not
        assert "0.5 topk" in [point["capacity"] for point in rows[-1]["curve"]]
    assert tables.conversion(rows).count("\n| ") == len(stages)


def test_windows_are_spaced_over_the_text():
    pytest.importorskip("peft", reason="needs the extra `peft`")
    from language_smollm2 import WINDOW, spaced

    found = spaced(torch.arange(WINDOW * 10 + 3), 2 * WINDOW).view(2, WINDOW)
    assert found[:, 0].tolist() == [0, 5 * WINDOW]


def test_a_text_is_read_in_pages(tmp_path):
    pytest.importorskip("peft", reason="needs the extra `peft`")
    from language_smollm2 import read

    words = {f"w{number}": number for number in range(1000)} | {"?": 1000}
    plain = Tokenizer(models.WordLevel(words, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "text").write_text("w1 " * 5000 + "w2 " * 300_000, encoding="utf-8")
    found = read(tmp_path / "text", PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?"))
    assert (found == 1).sum() == pytest.approx(5000 / 3, abs=3)
    assert (found == 2).sum() > 30 * 5000 / 3
    assert json.dumps(sorted(found.unique().tolist())) in ("[1, 2]", "[1, 2, 1000]")  # pages cut words
