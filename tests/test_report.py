"""`whenwhere report`: one page that stands alone, numbers with honest intervals, and mistakes told clearly."""

import json
import math
import re
import shutil
from pathlib import Path

import chromium
import numpy as np
import pytest
import torch
from PIL import Image
from saved import tiny_pipeline
from typer.testing import CliRunner

from whenwhere.bench.bench import bench
from whenwhere.bench.evidence import gather
from whenwhere.bench.gallery import exhibits, pictures_of
from whenwhere.bench.intervals import Interval, bootstrap, mean, middle, ratio, unit_of
from whenwhere.bench.judges import at_hand
from whenwhere.bench.order import Order
from whenwhere.bench.page import charts, macs, render, short, size
from whenwhere.bench.rowfile import folder_of
from whenwhere.bench.scatter import Axis, Point, front, scatter
from whenwhere.bench.sets import measure_sets
from whenwhere.cli import app
from whenwhere.metrics.features import frechet_distance

PROMPTS = ("red", "blue <b>&amp;</b>", "green", "black", "white", "a grey one")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small bench: six prompts, plain, two methods and their baselines."""
    path = tmp_path_factory.mktemp("measured") / "rows.jsonl"
    methods = ("deepcache(interval=2)", "tgate(gate_step=2)")
    bench(Order(str(tiny_pipeline()), methods, PROMPTS, (0,), steps=4, guidance=3.0, pictures=2), path)
    return path


@pytest.fixture
def rows(measured, tmp_path, monkeypatch):
    """A copy to spoil, in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(measured, "rows.jsonl")
    shutil.copytree(folder_of(measured), "rows.files")
    return Path("rows.jsonl")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fail(*arguments: object) -> str:
    before = sorted(Path().rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert sorted(Path().rglob("*")) == before
    (line,) = result.stderr.strip().splitlines()
    return line


# -- intervals


def cases(values) -> dict[tuple[str, int], float]:
    return {(f"prompt {number}", 0): float(value) for number, value in enumerate(values)}


def test_an_interval_holds_the_number_and_narrows_with_more_prompts():
    generator = np.random.default_rng(1)
    for count in (20, 500):
        values = generator.normal(3, 1, count)
        found = bootstrap(mean, cases(values))
        assert found.low < found.value < found.high
        assert found.value == pytest.approx(values.mean())
        assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(count), rel=0.1)
    assert bootstrap(mean, cases([1, 2, 3, 4])) == bootstrap(mean, cases([1, 2, 3, 4]))


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(2)
    found = [bootstrap(mean, cases(generator.normal(0, 1, 30))) for _ in range(60)]
    assert 0.85 <= np.mean([interval.low <= 0 <= interval.high for interval in found]) <= 1.0


def test_prompts_are_resampled_with_all_their_seeds():
    alike = {(f"prompt {p}", s): float(p) for p in range(6) for s in range(50)}
    assert unit_of(alike) == "prompts"
    assert bootstrap(mean, alike).high - bootstrap(mean, alike).low > 1.5  # 300 pictures, but only six prompts
    assert unit_of({("red", 0): 1.0, ("red", 1): 1.0}) == "pairs of prompt and seed"


def test_a_speed_up_is_a_ratio_of_medians_over_common_cases():
    plain, other = cases([2, 4, 6, 8, 100]), cases([1, 2, 3, 4])
    assert bootstrap(ratio, plain, other).value == 5 / 2.5
    with pytest.raises(ValueError, match="no prompt and seed has been run by all"):
        bootstrap(ratio, plain, {("other", 0): 1.0})


def test_what_is_infinite_stays_so_and_one_case_has_no_interval():
    assert bootstrap(middle, cases([math.inf] * 6)) == Interval(math.inf, math.inf, math.inf)
    assert bootstrap(middle, cases([3])) == Interval(3.0, None, None)


# -- charts


def point(number: str, cost: float, quality: float) -> Point:
    return Point(number, f"<{number}>", False, Interval(cost, None, None), Interval(quality, None, None))


def test_the_front_holds_what_nobody_beats():
    points = [point("1", 3, 30), point("2", 1, 10), point("3", 2, 30), point("4", 2, 20), point("5", 4, 29)]
    assert [found.number for found in front(points, higher=True)] == ["2", "3"]
    assert [found.number for found in front(points, higher=False)] == ["2"]


def test_better_is_up_whichever_way_the_numbers_run():
    def heights(drawing: str) -> list[float]:
        return [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawing)]

    points = [point("1", 1, 10), point("2", 2, 20)]
    worse, better = heights(scatter(points, "seconds", "PSNR", higher=True))
    assert better < worse  # SVG counts from the top
    better, worse = heights(scatter(points, "seconds", "distance", higher=False))
    assert better < worse
    assert "<1>" not in scatter(points, "seconds", "PSNR", higher=True)
    assert scatter([point("1", 1, math.inf)], "seconds", "PSNR", higher=True) == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 9.7), (-0.03, 0.41), (18.2, 44.9), (0, 1e-5), (3, 3.2)])
def test_ticks_are_few_and_within(low, high):
    ticks = Axis(low, high, 0, 100).ticks
    assert 3 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_numbers_are_written_for_readers():
    assert [short(value) for value in (0.66, 2.345, 45.67, 314.2, math.inf)] == [
        "0.660", "2.35", "45.7", "314", "identical",
    ]  # fmt: skip
    assert (macs(9_480_000_000), macs(12), size(None), size(2048)) == ("9.48 G", "12", "–", "2 KiB")


# -- the page


def test_the_evidence_is_what_the_rows_say(measured):
    evidence = gather(measured)
    plain, *others = evidence.findings
    assert plain.plain
    assert plain.speed_up.value == 1
    assert [finding.listing.label.partition("(")[0] for finding in others if not finding.baseline] == [
        "DeepCache", "TGate",
    ]  # fmt: skip
    for finding in others:
        assert finding.pairs == 6
        assert finding.speed_up.value == pytest.approx(plain.seconds.value / finding.seconds.value)
        assert finding.macs_ratio > 1
        assert finding.scores["ssim"].low <= finding.scores["ssim"].value <= finding.scores["ssim"].high
    assert (evidence.unit, evidence.missing) == ("prompts", 0)
    assert [chart.score.name for chart in charts(evidence)] == ["psnr", "ssim"]
    assert len(exhibits(evidence, 4)) == 2


def test_the_page_needs_nothing_else(measured):
    evidence = gather(measured)
    page = render(evidence, exhibits(evidence, 4))
    assert "<script" not in page
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert not re.findall(r"url\(|@import", page)
    assert "blue <b>" not in page
    assert "blue &lt;b&gt;" in page
    for text in ("DeepCache", "95 %", "percentile bootstrap over prompts", evidence.environment.torch, "viewport"):
        assert text in page


def test_the_command_writes_a_page_and_pictures(rows):
    result = run("report", rows, "--png", "--json")
    assert result.exit_code == 0, result.output
    files = [Path(file) for file in json.loads(result.stdout)["files"]]
    assert [file.name for file in files if file.suffix == ".html"] == ["report.html"]
    assert {file.name for file in files} == {file.name for file in Path().iterdir()} - {"rows.jsonl", "rows.files"}
    assert "report-pictures.png" in {file.name for file in files}


def test_a_run_that_is_not_finished_says_so(rows):
    lines = rows.read_text().splitlines(keepends=True)
    for kept, missing in ((len(lines) - 3, 3), (len(lines) - 28, 28)):  # within the last case; four cases of seven
        rows.write_text("".join(lines[:kept]))
        assert run("report", rows).exit_code == 0
        assert f"{missing} rows are missing" in Path("report.html").read_text()


@pytest.mark.skipif(chromium.program() is None, reason="no Chromium is installed; `CHROMIUM` may name one")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_complaints_requests_or_overflow(rows, width):
    assert run("report", rows).exit_code == 0
    pictures = "[...document.images].every(i => i.complete && i.naturalWidth > 0) && document.images.length"
    seen = chromium.look(Path("report.html"), width, expression=pictures)
    assert seen.complaints == []
    assert seen.requests == []
    assert seen.width <= width
    assert seen.facts >= 10
    assert len(seen.screenshot) > 10_000


@pytest.mark.skipif(chromium.program() is None, reason="no Chromium is installed; `CHROMIUM` may name one")
def test_the_browser_test_would_notice(tmp_path):
    bad = tmp_path / "bad.html"
    wide, away = '<div style="width:900px">wide</div>', '<img src="http://127.0.0.1:9/x.png">'
    bad.write_text(f"<meta name=viewport content='width=device-width'>{wide}{away}<script>nothing()</script>")
    seen = chromium.look(bad, 390)
    assert seen.width > 390
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert any("nothing is not defined" in complaint for complaint in seen.complaints)


# -- sets of pictures


@pytest.mark.skipif(not at_hand(zoo=False).feature_distance, reason="the packages of the networks are not installed")
def test_sets_are_compared_with_real_pictures_by_a_named_network(rows, tmp_path):
    evidence = gather(rows)
    real = tmp_path / "real"
    real.mkdir()
    plain = Image.open(sorted(Path("rows.files").glob("*.png"))[0]).convert("RGB")
    for number in range(12):
        plain.rotate(30 * number).save(real / f"{number}.png")
    assert "kept pictures; a set needs 10. Run `whenwhere bench` with --pictures" in fail(
        "report", rows, "--real", real
    )
    for finding in evidence.findings:  # the plain pictures are the real ones, the others noise
        for number, file in enumerate(spread(evidence, finding)):
            noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            (plain.rotate(30 * number) if finding.plain else Image.fromarray(noise)).save(file)
    found = measure_sets(evidence, real)
    first, second = (found.by_method[finding.listing.method] for finding in evidence.findings[:2])
    assert (found.network, found.real, first.pictures) == ("EfficientNet-Lite0", 12, 12)
    assert first.kid < second.kid
    assert first.frechet is None
    page = render(evidence, [], found)
    assert "KID (EfficientNet-Lite0)" in page
    assert "FID" not in page.replace("KID", "")


def spread(evidence, finding):
    """Places for twelve pictures of a variant: its six prompts, and six seeds more."""
    evidence.seeds[:] = [0, 1]
    return pictures_of(evidence, finding)


def test_a_frechet_distance_needs_more_pictures_than_features():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(400, 3, generator=generator), torch.randn(400, 3, generator=generator) + 2
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, other) == pytest.approx(3 * 4, rel=0.15)  # three means, 2 apart
    with pytest.raises(ValueError, match="3 features need more than 3 pictures; there are 3 and 400"):
        frechet_distance(one[:3], other)


# -- mistakes


def test_a_file_that_is_not_there_is_told(rows):
    assert "there is no file gone.jsonl of rows; `whenwhere bench --out gone.jsonl` writes one" in fail(
        "report", "gone.jsonl"
    )
    assert "must end in .html" in fail("report", rows, "--out", "page.pdf")
    assert "nowhere holds 0 pictures" in fail("report", rows, "--real", "nowhere")
    assert "give a folder of real pictures with --real" in fail("report", rows, "--clip", "somewhere")


def test_rows_that_cannot_be_trusted_are_refused(rows):
    good = rows.read_text()
    last = good.splitlines()[-1]
    for spoilt, message in (
        (last.replace('"steps": 4', '"steps": 5'), "mixes runs: row 43 differs from the first (steps 4 and 5)"),
        (re.sub(r'"ssim": [\d.e-]+', '"ssim": NaN', last), "ssim is nan, not a number"),
        ("red", "no row"),
    ):
        rows.write_text(f"{good}{spoilt}\n")
        assert message in fail("report", rows)
    header = good.splitlines()[0]
    rows.write_text(header + "\n")
    assert "has no row of the plain run" in fail("report", rows)
    rows.write_bytes(b"\xff\xfe\n")
    assert "it is not text" in fail("report", rows)


def test_a_spoilt_picture_or_plan_is_named(rows):
    picture = sorted(Path("rows.files").glob("*.png"))[0]
    whole = picture.read_bytes()
    for spoilt in (b"garbage", whole[: len(whole) // 2]):
        picture.write_bytes(spoilt)
        line = fail("report", rows)
        assert f"{picture} is no readable picture" in line
        assert "Delete it" in line
    picture.unlink()
    assert run("report", rows).exit_code == 0
    Path("report.html").unlink()
    shutil.rmtree("rows.files")
    assert "Keep the folder rows.files beside the rows" in fail("report", rows)
