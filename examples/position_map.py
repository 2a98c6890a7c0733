"""Draw an image and the position id of each of its tokens: `python examples/position_map.py PNG`.

It wrote docs/images/position_map.png.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from comemo.cli import main as cli
from comemo.cli.demo import draw_picture


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image, drawing = Path(folder) / "harbour.png", Path(folder) / "map.png"
        draw_picture().save(image)  # 1024 x 768 pixels
        cli.main(["map", str(image), "-o", str(drawing), "--max-tiles", "4"])
        reduced = Image.open(drawing).quantize(128, dither=Image.Dither.NONE)
        reduced.save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
