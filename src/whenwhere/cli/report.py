"""`whenwhere report`: one page of HTML from a file of rows."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .examples import examples
from .failing import clearly
from .output import check_file, print_json, replacing
from .quiet import quieten

if TYPE_CHECKING:
    from ..bench.evidence import Evidence
    from ..bench.gallery import Exhibit
    from ..bench.sets import Distances

EXAMPLES = examples(
    "report rows.jsonl",
    "report rows.jsonl --out page.html --png --pictures 8",
    "report rows.jsonl --real ./photographs --clip ./clip-vit-large",
)

Rows = Annotated[Path, typer.Argument(help="A file that `whenwhere bench` wrote.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the page goes.")]
Pictures = Annotated[int, typer.Option(min=0, help="Show at most so many pairs of prompt and seed.")]
Real = Annotated[
    Path | None,
    typer.Option(help="A folder of real pictures: tell how far each variant's set is from them.", show_default=False),
]
Clip = Annotated[
    str, typer.Option(help="With --real: by the CLIP model in this folder.", show_default="EfficientNet-Lite0")
]
Png = Annotated[bool, typer.Option("--png", help="Write plans and pictures as PNG beside the page, too.")]


@clearly
def command(
    rows: Rows,
    out: Out = Path("report.html"),
    pictures: Pictures = 4,
    png: Png = False,
    real: Real = None,
    clip: Clip = "",
    as_json: options.AsJson = False,
) -> None:
    """Make a page of a file of rows: quality against cost, plans, pictures, intervals, where it was measured.

    The page is a single file without scripts that asks for nothing from elsewhere. It can be made of a run that is
    not finished, and says so.
    """
    check_file(out, ".html")
    from ..bench.evidence import gather
    from ..bench.gallery import exhibits
    from ..bench.page import render

    if clip and real is None:
        raise ValueError("--clip names the network of --real; give a folder of real pictures with --real.")
    evidence = gather(rows)
    shown = exhibits(evidence, pictures)
    sets = _sets(evidence, real, clip)
    page = render(evidence, shown, sets)
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    files = [out, *(_write_pngs(out, evidence, shown) if png else [])]
    if as_json:
        told = {} if sets is None else {"sets": asdict(sets)}
        print_json({"files": [str(file) for file in files], "missing": evidence.missing} | told)
        return
    for file in files:
        typer.echo(file)


def _sets(evidence: "Evidence", real: Path | None, clip: str) -> "Distances | None":
    """Distances of sets, where there are real pictures to compare with."""
    if real is None:
        return None
    quieten()
    from ..bench.sets import measure_sets

    return measure_sets(evidence, real, clip)


def _write_pngs(out: Path, evidence: "Evidence", shown: "list[Exhibit]") -> list[Path]:
    """The plan of every method, and the pictures as a sheet, named after the page."""
    from ..picture import Column, draw_plan, draw_sheet

    images = {
        f"plan-{number}": draw_plan(finding.plan, finding.listing.label)
        for number, finding in enumerate(evidence.findings)
        if not finding.baseline and not finding.plain
    }
    if shown:
        columns = [
            Column(finding.listing.label, [exhibit.pictures[number][1] for exhibit in shown])
            for number, finding in enumerate(evidence.findings)
        ]
        labels = [f"{exhibit.prompt} ({exhibit.seed})" for exhibit in shown]
        images["pictures"] = draw_sheet(columns, labels, evidence.setting.model, str(evidence.environment))
    files = []
    for name, image in images.items():
        files.append(out.with_name(f"{out.stem}-{name}.png"))
        with replacing(files[-1]) as temporary:
            image.save(temporary)
    return files
