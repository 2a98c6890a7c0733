"""Draw an image and the position id of each of its tokens: `python examples/position_map.py PNG`.

It wrote docs/images/position_map.png.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from comemo.cli import main as cli


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image, drawing = Path(folder) / "shapes.png", Path(folder) / "map.png"
        cli.main(["draw", str(image), "--seed", "16", "--layout", "objects"])  # 1152 x 1152 pixels
        cli.main(["map", str(image), "-o", str(drawing), "--max-tiles", "4"])
        reduced = Image.open(drawing).quantize(128, dither=Image.Dither.NONE)
        reduced.save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
