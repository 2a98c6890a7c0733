"""A picture in the terminal: two pixels a character, in colours."""

from PIL import Image

from comemo.cli import terminal


def show_preview(image: Image.Image, columns: int = 40) -> None:
    """Draw a picture where the terminal can show it, and nothing elsewhere.

    Args:
        image: of mode RGB.
        columns: characters of a line.
    """
    if not terminal.shows_colours():
        return
    rows = max(1, round(columns * image.height / image.width / 2))  # a character is half as wide
    pixels = image.resize((columns, 2 * rows), Image.Resampling.BOX).tobytes()

    def colour(col: int, row: int) -> terminal.Colour:
        first = 3 * (row * columns + col)
        return pixels[first], pixels[first + 1], pixels[first + 2]

    terminal.paint(
        [
            [(colour(col, 2 * row), colour(col, 2 * row + 1)) for col in range(columns)]
            for row in range(rows)
        ]
    )
