"""Draw an image and the position id of each of its tokens: `python examples/position_map.py PNG`.

It wrote docs/images/position_map.png.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from comemo.cli.demo import draw_picture
from comemo.cli.map import save_map


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "harbour.png"
        draw_picture().save(image)  # 1024 x 768 pixels
        drawing = Image.open(save_map(image, Path(folder) / "map.png", max_num=4))
        drawing.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
