"""The pages: they build without the network, fetch nothing when they are read, and their examples run."""

import os
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest
from test_imports import HEIGHT

import whenwhere

ROOT = Path(__file__).parent.parent
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def test_the_method_on_the_page_runs_and_prints_what_the_page_says():
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    (code, printed), *others = EXAMPLE.findall(page)
    assert not others
    lines = code.split("\n\n\n")[1].splitlines()
    assert len(lines) <= 30
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.rstrip() for line in ran.stdout.splitlines()] == printed.splitlines()


def test_the_family_on_the_page_is_an_anatomy():
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8"), re.DOTALL
    )
    names: dict[str, object] = {}
    exec(code, names)
    assert names["TOWER"].parts[1].path == "layers.*"


def test_the_table_of_families_is_that_of_the_data():
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert text == run_path(str(ROOT / "docs" / "refresh.py"))["refreshed"](text), "run docs/refresh.py"


def test_whoever_writes_a_method_or_a_family_needs_the_public_names_alone():
    for name in ("adding-a-method", "adding-a-family"):
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert not re.findall(r"(?:from|import) whenwhere\.\w+", page)


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    explained = re.findall(r"^::: whenwhere\.(\w+)$", reference, re.MULTILINE)
    assert sorted(explained) == sorted(whenwhere.__all__)


PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_layout_on_the_page_names_every_file_and_package():
    _, table = PAGE.split("| File or package | Holds |")
    rows = [line for line in table.split("\n\n")[0].splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([a-z_]+(?:\.py|/))`", row.split("|")[1])]
    package = ROOT / "src" / "whenwhere"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    packages = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(named) == sorted(files | packages)


def test_the_order_of_imports_on_the_page_is_the_one_that_is_tested():
    lines = PAGE.split("```text\n")[1].split("```")[0].splitlines()
    layers = [line.split("   ")[0].split("  ") for line in lines if not line.startswith(" ")]
    heights = {name: len(layers) - 1 - i for i, layer in enumerate(layers) for name in layer}
    assert heights == HEIGHT | {"core": 0}


@pytest.mark.parametrize("page", ["mod", "sdt", "stt"])
def test_a_page_quotes_the_trace_that_the_library_prints(page):
    text = (ROOT / "docs" / "methods" / f"{page}.md").read_text(encoding="utf-8")
    assert text.count("layer 7") == 1
    assert text == run_path(str(ROOT / "docs" / "refresh.py"))["refreshed"](text), "run docs/refresh.py"


def test_the_site_builds_and_its_pages_fetch_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs the extra: pip install whenwhere[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        fetched = re.findall(
            r"<(?:script|img|link|iframe)[^>]*?(?:src|href)=[\"']?(https?:[^\"' >]+)", page.read_text()
        )
        assert fetched == [], page.name
    reference = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="whenwhere.attach"' in reference
    assert 'id="whenwhere.TGate"' in reference
