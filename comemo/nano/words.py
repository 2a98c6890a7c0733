"""What comemo-nano was taught to name: colours, shapes, words, places."""

COLOURS = {
    "red": (214, 40, 40),
    "green": (38, 150, 60),
    "blue": (40, 80, 215),
    "yellow": (245, 205, 35),
    "orange": (245, 130, 25),
    "purple": (135, 50, 165),
    "black": (25, 25, 28),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WORDS = (
    "APPLE BANK BEAN BEAR BIRD BOAT BOOK BREAD BUS CAFE CLOCK COAT CORN DEER DOOR EAST EXIT "
    "FISH FOX FREE GOLD HAT HONEY HOTEL KEY LAMP LEMON LIGHT LION MAIL MILK MUSIC NORTH OPEN "
    "PARK PIZZA PORT RICE ROOM ROSE SALE SALT SHIP SHOE SHOP SILK SOAP SOUTH STONE STOP SUGAR "
    "TAXI TEA TRAIN WATER WEST WOLF WOOD"
)
WORDS = tuple(_WORDS.split())
FIELDS = ("NAME", "CITY", "CODE", "DATE", "DESK", "TOTAL")
DIRECTIONS = ("left", "right", "up", "down")

ROWS = ("top", "upper", "middle", "lower", "bottom")
COLUMNS = ("left", "centre-left", "centre", "centre-right", "right")
_CHOSEN = {1: (2,), 2: (0, 4), 3: (0, 2, 4), 4: (0, 1, 3, 4)}  # of so many rows or columns


def place_names(rows: int, cols: int) -> dict[tuple[int, int], str]:
    """The names of the places of a picture that is divided into rows and columns.

    A name tells how far down and to the right a place is, whatever number of rows and columns there
    are: with RoPE-DHR the tiles of 3 x 4 places have the same ids as those of 4 x 3.

    Args:
        rows, cols: of the picture, 1 to 4.

    Returns:
        (row, col), counted from 0 -> a name that follows "What is ...?": "at the top left".
    """
    return {
        (row, col): place_name(ROWS[down], COLUMNS[right])
        for row, down in enumerate(_CHOSEN[rows])
        for col, right in enumerate(_CHOSEN[cols])
    }


def place_name(row: str, column: str) -> str:
    """The name of a place by names of `ROWS` and `COLUMNS`."""
    return f"at the {row} {column}"


def with_article(phrase: str) -> str:
    """The phrase after "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def listed(phrases: list[str]) -> str:
    """The phrases in one sentence: "a, b and c"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1]))) if phrases else ""
