"""`whenwhere bench`: rows that survive being killed, that no number of workers changes, and mistakes told clearly."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from saved import LENGTH, make, tiny_pipeline
from tiny_models import WIDTH, randomised
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from typer.testing import CliRunner

from whenwhere import Plan
from whenwhere.bench import order as orders
from whenwhere.bench import workers
from whenwhere.bench.bench import bench
from whenwhere.bench.doctor import examine
from whenwhere.bench.judges import Judging, at_hand
from whenwhere.bench.order import Begun, Done, Merged, Order, carry_out, usual
from whenwhere.bench.prompts import builtin_prompts, read_prompts
from whenwhere.bench.rowfile import Content, folder_of
from whenwhere.cli import app
from whenwhere.metrics.clip import ClipScore

PROMPTS = ("red", "blue", "a green one")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def order(**changes: object) -> Order:
    """Three prompts, plain and DeepCache with its two baselines: 12 rows."""
    asked = Order(str(tiny_pipeline()), ("deepcache(interval=2)",), PROMPTS, (0,), steps=4, guidance=3.0, pictures=2)
    return replace(asked, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rows of a run that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    bench(order(), path)
    return path


def reproducible(path: Path):
    return [row.reproducible() for row in Content.read(path).rows]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fail(*arguments: object) -> str:
    """One line on stderr, exit code 2, nothing on stdout, nothing written."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    (line,) = result.stderr.strip().splitlines()
    return line


# -- rows


def test_every_case_has_a_row_of_every_variant_with_plan_and_picture(whole):
    content = Content.read(whole)
    plain, cached, fewer, stop = content.listings
    assert (plain.label, cached.label) == ("plain", "DeepCache(interval=2)")
    assert cached.baselines == (fewer.method, stop.method)
    assert fewer.method.startswith("FewerSteps")
    assert stop.method.startswith("GuidanceStop")
    methods = [listing.method for listing in content.listings]
    assert [(r.job.prompt, r.job.method) for r in content.rows] == [(p, m) for p in PROMPTS for m in methods]
    for listing in content.listings:
        assert Plan.load(folder_of(whole) / f"{listing.key}.plan.json").steps in (2, 3, 4)
    kept = {row.job.key for row in content.rows if row.job.prompt in PROMPTS[:2]}
    assert {file.stem for file in folder_of(whole).glob("*.png")} == kept
    assert all(row.feature_distance is None and row.agreement is None for row in content.rows)


def test_the_command_writes_the_same_rows(whole):
    Path("prompts.txt").write_text("red\n\nblue\na green one\n")
    arguments = ("--prompts", "prompts.txt", "--steps", 4, "--guidance", 3, "--no-features", "-M", "deepcache(2)")
    result = run("bench", tiny_pipeline(), *arguments, "--limit", 2, "--pictures", 0)
    assert result.exit_code == 0, result.output
    assert reproducible(Path("rows.jsonl")) == reproducible(whole)[:8]
    assert "8 rows of 4 variants: rows.jsonl" in result.stdout
    printed = json.loads(run("bench", tiny_pipeline(), *arguments, "--pictures", 0, "--json").stdout)
    assert (printed["rows"], printed["variants"][0]) == (12, "plain")
    assert reproducible(Path("rows.jsonl")) == reproducible(whole)


def test_without_methods_all_that_fit_are_measured_with_their_defaults(monkeypatch):
    asked = order(methods=(), prompts=("red",), steps=6)
    expected = {t.label: t.ratio for t in examine(make(), 6, 3.0).treatments if t.fits and t.ratio > 1}
    assert usual(asked.open()) == list(expected)
    assert {"DeepCache(interval=3)", "TGate(gate_step=0.4)", "FORA(interval=3)"} <= set(expected)
    monkeypatch.setattr(orders, "usual", lambda _: ["tgate(gate_step=9)"])
    with pytest.raises(ValueError, match="only 6 steps are executed"):
        next(carry_out(asked))


def test_a_killed_run_loses_at_most_one_row_and_goes_on_to_the_same_rows(whole, tmp_path):
    path, told = tmp_path / "rows.jsonl", tmp_path / "told"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from whenwhere.bench.bench import bench\n"
        "from whenwhere.bench.order import Order\n"
        "import time\n"
        "def progress(done, whole):\n"
        "    Path(sys.argv[3]).write_text(str(done))\n"
        "    time.sleep(30 * (done == 5))\n"
        "bench(eval(sys.argv[4]), Path(sys.argv[2]), progress=progress)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(path), str(told), _expression(order())]
    process = subprocess.Popen(command, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (told.exists() and told.read_text() == "5"):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(Content.read(path).rows) == 5
    with path.open("a") as torn:
        torn.write('{"model": "ti')  # as if it had been killed while writing
    bench(order(), path)
    assert reproducible(path) == reproducible(whole)
    assert Content.read(path).listings == Content.read(whole).listings


def _expression(asked: Order) -> str:
    """The order as Python that makes it again."""
    fields = {name: value for name, value in vars(asked).items() if name != "judging"}
    return f"Order(**{fields!r})"


def test_a_crash_between_rows_leaves_whole_rows(whole, tmp_path):
    path = tmp_path / "rows.jsonl"

    def crash(done: int, _all: int) -> None:
        if done == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        bench(order(), path, progress=crash)
    assert reproducible(path) == reproducible(whole)[:3]
    bench(order(), path)
    assert reproducible(path) == reproducible(whole)


def test_two_workers_give_the_rows_and_pictures_of_one(whole, tmp_path):
    path = tmp_path / "rows.jsonl"
    counts: list[tuple[int, int]] = []
    bench(order(), path, workers=2, progress=lambda *count: counts.append(count))
    assert sorted(map(repr, reproducible(path))) == sorted(map(repr, reproducible(whole)))
    assert Content.read(path).listings == Content.read(whole).listings
    assert counts[-1] == (12, 12)
    for file in folder_of(whole).iterdir():
        assert (folder_of(path) / file.name).read_bytes() == file.read_bytes()


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; it is the optional extra `ray`")
def test_two_tasks_of_ray_give_the_rows_of_one_process(whole, tmp_path):
    bench(order(), tmp_path / "rows.jsonl", workers=2, ray="local")
    assert sorted(map(repr, reproducible(tmp_path / "rows.jsonl"))) == sorted(map(repr, reproducible(whole)))


def test_an_error_of_a_worker_is_handed_on():
    told = SimpleQueue()
    workers._serve(order(methods=("tgate(gate_step=9)",)), slice(1, None, 2), (), told)
    number, error = told.get()
    assert number == 1
    assert isinstance(error, ValueError)
    assert "only 4 steps are executed" in str(error)
    assert isinstance(workers._portable(torch.OutOfMemoryError("no memory left")), RuntimeError)


def test_a_worker_that_dies_is_told():
    class Dead:
        exitcode = -9

    class Silent:
        def get(self, timeout):  # noqa: ARG002
            raise workers.Empty

        def empty(self):
            return True

    with pytest.raises(RuntimeError, match="process 2 of 2 ended with exit code -9; run the same command again"):
        workers._next(Silent(), [Dead(), Dead()], {1})


# -- scores


@pytest.mark.skipif(not at_hand(zoo=True).agreement, reason="the packages of the networks are not installed")
def test_scores_compare_with_the_plain_picture_and_read_the_prompt():
    judges = Judging(feature_distance=True, agreement=True).open()
    one, other = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert judges(one, one, "red apple")["feature_distance"] == pytest.approx(0, abs=1e-6)
    found = judges(one, other, "red apple")
    assert 0 < found["feature_distance"] < 2
    assert -1 <= found["agreement"] <= 1
    assert set(judges(one, None, "red apple")) == {"agreement"}


def test_a_clip_score_is_a_hundred_times_a_cosine(tmp_path):
    text = CLIPTextConfig(
        vocab_size=80, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, eos_token_id=1, pad_token_id=1, bos_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=16,
        patch_size=8,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    model = randomised(CLIPModel(config)).eval()
    model.save_pretrained(tmp_path)
    make().tokenizer.save_pretrained(tmp_path)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pictures.save_pretrained(tmp_path)
    picture = torch.randint(256, (3, 16, 16), generator=torch.Generator().manual_seed(1)) / 255
    score = ClipScore(str(tmp_path))
    mean, spread = (torch.tensor(values)[:, None, None] for values in (pictures.image_mean, pictures.image_std))
    words = make().tokenizer(["red"], return_tensors="pt")
    with torch.no_grad():
        seen = model.get_image_features(((picture - mean) / spread)[None]).pooler_output
        read = model.get_text_features(**words).pooler_output
    cosine = float(torch.nn.functional.cosine_similarity(seen, read)[0])
    assert score(picture, "red") == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)
    assert score(picture, "a much longer text than the model reads") >= 0


def test_the_built_in_prompts_are_64_for_the_zoo():
    prompts = builtin_prompts("emoji-unet")
    assert len(prompts) == len(set(prompts)) == 64
    with pytest.raises(ValueError, match=r"no built-in prompts for \./mine; give a text file with --prompts"):
        builtin_prompts("./mine")


def test_repeated_prompts_are_run_once_and_told(tmp_path):
    (tmp_path / "p.txt").write_text("red\nblue\nred\n")
    with pytest.warns(UserWarning, match="repeats 1 prompts; they are run once"):
        assert read_prompts(tmp_path / "p.txt") == ["red", "blue"]


# -- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "empty.txt"], "empty.txt holds no prompts; write one a line"),
        (["--prompts", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--prompts", "picture.bin"], "picture.bin is no text in UTF-8"),
        ([], "give a text file with --prompts"),
        (["--prompts", "p.txt", "-M", "deepcash"], "did you mean 'DeepCache'"),
        (["--prompts", "p.txt", "-M", "tgate(gate_step=9)", "--steps", 4], "only 4 steps are executed"),
        (["--prompts", "p.txt", "--out", "rows.txt"], "must end in .jsonl"),
        (["--prompts", "p.txt", "--out", "foreign.jsonl"], "foreign.jsonl, line 1: no header"),
        (["--prompts", "p.txt", "--clip", "nowhere"], "there is no folder nowhere with a CLIP model"),
        (["--prompts", "p.txt", "--clip", "."], ". holds no CLIP model"),
        (["--prompts", "p.txt", "--lpips", "resnet"], "alex, vgg, squeeze, not 'resnet'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, message):
    Path("empty.txt").write_text(" \n\n")
    Path("picture.bin").write_bytes(b"\x89PNG\xff\xfe")
    Path("p.txt").write_text("red\n")
    Path("foreign.jsonl").write_text('{"a": 1}\n')
    assert message in fail("bench", tiny_pipeline(), "--no-features", *arguments)


def test_a_model_whose_pictures_are_no_numbers_leaves_nothing_behind():
    pipe = make()
    pipe.unet.conv_out.bias.data.fill_(math.nan)
    pipe.save_pretrained("broken")
    Path("p.txt").write_text("red\n")
    assert "numbers that are not finite" in fail("bench", "broken", "--prompts", "p.txt", "--steps", 4, "-M", "fora(2)")


def test_rows_of_another_setting_are_not_added(whole):
    Path("p.txt").write_text("red\n")
    Path("rows.jsonl").write_bytes(whole.read_bytes())
    arguments = ("bench", tiny_pipeline(), "--prompts", "p.txt", "--guidance", 3, "--no-features", "-M", "deepcache(2)")
    assert "steps 4 and 5): rows of two settings must not be mixed" in fail(*arguments, "--steps", 5)
    assert "threads 1 and 2" in fail(*arguments, "--steps", 4, "--threads", 2)


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("torchmetrics.functional.image", [], "pip install 'whenwhere[metrics]'"),
        ("ray", ["--ray", "local"], "pip install 'whenwhere[ray]'"),
        ("torchvision.models", ["--lpips", "alex"], "pip install 'whenwhere[metrics]' torchvision"),
        ("efficientnet_lite_pytorch", ["--features"], "pip install 'whenwhere[metrics]'"),
    ],
)
def test_what_is_missing_is_named_before_anything_runs(monkeypatch, package, arguments, message):
    monkeypatch.setitem(sys.modules, package, None)
    Path("p.txt").write_text("red\n")
    assert message in fail("bench", tiny_pipeline(), "--prompts", "p.txt", *arguments)


def test_nothing_is_done_before_it_was_begun_whoever_is_faster():
    """The events of a slow first process and of a fast second one, as a queue may hand them on."""
    told = list(carry_out(order(), ()))
    merged = Merged()
    passed = [event for event in (*told[:3], *told) if merged.passes(event)]
    assert isinstance(passed[0], Begun)
    assert [event for event in passed if not isinstance(event, Done)] == [e for e in told if not isinstance(e, Done)]
