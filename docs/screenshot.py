"""A page as a picture, by headless Chromium: `python docs/screenshot.py report.html report.png --width 1200`."""

import argparse
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import chromium

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=2100, help="of the part that is kept, from the top")
    arguments = parser.parse_args()
    picture = Image.open(BytesIO(chromium.look(arguments.page, arguments.width).screenshot)).convert("RGB")
    picture = picture.crop((0, 0, picture.width, min(picture.height, arguments.height)))
    picture.quantize(128).save(arguments.picture, optimize=True)
