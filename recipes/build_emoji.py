"""Rebuild the emoji picture sheet from pinned npm packages.

Six icon sets under Apache-2.0, MIT or CC-BY-4.0 are drawn at 32 x 32 pixels on white and paired with the English labels
and keywords of emojibase. People, flags and skin tones are left out. Needs `npm` on the path and the `train` extra;
nothing of the packages is executed. Run it as `python recipes/build_emoji.py --out data/emoji`.
"""

import argparse
import io
import json
import re
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

CAPTIONS = "emojibase-data@17.0.0"
SETS = {  # style word in captions -> pinned package
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "shaded": "@iconify-json/fluent-emoji@1.2.7",
    "emojione": "@iconify-json/emojione@1.2.3",
}
LEFT_OUT = {"people-body", "component", "flags"}
TILE = 32  # pixels
COLUMNS = 96  # tiles in a row of the sheet


@dataclass(frozen=True)
class Concept:
    """One captioned emoji: its code point key, names, and the group it belongs to."""

    key: str
    label: str
    tags: tuple[str, ...]
    group: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with TemporaryDirectory() as scratch:
        concepts = read_concepts(fetch(CAPTIONS, Path(scratch)))
        drawings = {style: dict(find_drawings(fetch(name, Path(scratch)), concepts)) for style, name in SETS.items()}
    order = [(concept, style) for concept in concepts for style in SETS if concept.key in drawings[style]]
    with ProcessPoolExecutor(args.workers) as pool:
        tiles = list(pool.map(draw, [drawings[style][concept.key] for concept, style in order], chunksize=64))
    args.out.mkdir(parents=True, exist_ok=True)
    lay(tiles).save(args.out / "sheet.webp", lossless=True, quality=100, method=6)
    (args.out / "index.json").write_text(describe(order), encoding="utf-8")
    print(f"{len(tiles)} pictures of {len({concept.key for concept, _ in order})} concepts")


def fetch(package: str, folder: Path) -> tarfile.TarFile:
    """Download one npm package with `npm pack` and open it; its scripts are never run."""
    command = ["npm", "pack", "--silent", package]
    packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return tarfile.open(folder / packed.stdout.strip().splitlines()[-1])


def read(archive: tarfile.TarFile, name: str) -> Any:
    """Parse one JSON file of a package; None where the package has no such file."""
    try:
        member = archive.extractfile(f"package/{name}")
    except KeyError:
        return None
    return json.load(member) if member else None


def read_concepts(archive: tarfile.TarFile) -> list[Concept]:
    """Base emoji with their captions, in the order of the Unicode charts."""
    groups = {group["order"]: group["key"] for group in read(archive, "en/messages.json")["groups"]}
    rows = sorted(read(archive, "en/data.json"), key=lambda row: row.get("order", 10**6))
    found = [
        Concept(plain(row["hexcode"]), row["label"].lower(), tuple(row.get("tags", ())), groups[row["group"]])
        for row in rows
        if "group" in row
    ]
    return [concept for concept in found if concept.group not in LEFT_OUT]


def plain(hexcode: str) -> str:
    """The code point sequence in lower case, without variation selectors: `2764-FE0F` -> `2764`."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def slug(label: str) -> str:
    """The label as icon sets spell it: `piñata` -> `pinata`, `T-Rex` -> `t-rex`."""
    ascii_only = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only.lower().replace("'", "")).strip("-")


def find_drawings(archive: tarfile.TarFile, concepts: list[Concept]) -> Iterator[tuple[str, str]]:
    """Pairs of concept key and SVG text, found by code point where the set lists them, otherwise by name."""
    icons = read(archive, "icons.json")
    names = {plain(key): name for key, name in (read(archive, "chars.json") or {}).items()}
    for concept in concepts:
        name = names.get(concept.key, slug(concept.label))
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if icon := icons["icons"].get(name):
            yield concept.key, svg(icon, icons)


def svg(icon: dict[str, Any], icons: dict[str, Any]) -> str:
    """A complete SVG document; sizes come from the icon, else from its set."""
    left, top, width, height = (
        icon.get(side, icons.get(side, default))
        for side, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def draw(document: str) -> bytes:
    """The drawing as 32 x 32 RGB bytes on white: 128 px, then Lanczos to 64 and a box filter to 32."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=document, width=128, skip_system_fonts=True, background="white"))
    image = Image.open(io.BytesIO(png)).convert("RGB")
    square = Image.new("RGB", (128, 128), "white")
    image.thumbnail((128, 128), Image.Resampling.LANCZOS)
    square.paste(image, ((128 - image.width) // 2, (128 - image.height) // 2))
    return square.resize((64, 64), Image.Resampling.LANCZOS).resize((TILE, TILE), Image.Resampling.BOX).tobytes()


def lay(tiles: list[bytes]) -> Image.Image:
    """All tiles on one sheet, row by row; the free cells at the end stay white."""
    sheet = Image.new("RGB", (COLUMNS * TILE, -(-len(tiles) // COLUMNS) * TILE), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, COLUMNS)
        sheet.paste(Image.frombytes("RGB", (TILE, TILE), tile), (column * TILE, row * TILE))
    return sheet


def describe(order: list[tuple[Concept, str]]) -> str:
    """The index beside the sheet: per concept its captions and, per style, the number of its tile."""
    rows: dict[str, dict[str, Any]] = {}
    for number, (concept, style) in enumerate(order):
        row = {"label": concept.label, "tags": concept.tags, "group": concept.group, "tiles": {}}
        rows.setdefault(concept.key, row)["tiles"][style] = number
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows.values())
    head = json.dumps({"tile": TILE, "columns": COLUMNS, "styles": list(SETS)})
    return f'{head[:-1]}, "concepts": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
