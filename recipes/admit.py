"""Take an exported pipeline into the zoo: its files, and their digests, which `zoo.load` compares.

    python recipes/admit.py emoji-pixart runs/emoji-pixart/pipeline

A new name also needs an entry in src/whenwhere/zoo/catalog.py.
"""

import argparse
import json
import shutil
from pathlib import Path

import whenwhere
from whenwhere.zoo.load import digests

ZOO = Path(whenwhere.__file__).parent / "zoo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("pipeline", type=Path, help="a folder that a recipe exported")
    args = parser.parse_args()
    shutil.rmtree(ZOO / args.name, ignore_errors=True)
    shutil.copytree(args.pipeline, ZOO / args.name)
    file = ZOO / "digests.json"
    known = json.loads(file.read_text(encoding="utf-8")) | {args.name: digests(ZOO / args.name)}
    file.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
