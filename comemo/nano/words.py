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

_ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "middle", "right")}


def place_names(rows: int, cols: int) -> dict[tuple[int, int], str]:
    """The names of the places of a picture that is divided into rows and columns.

    Args:
        rows, cols: of the picture.

    Returns:
        (row, col), counted from 0 -> a name that follows "What is ...?": "at the top left". In
        pictures of more than three rows or columns it has numbers: "in row 1, column 1".
    """
    names = {}
    for row in range(rows):
        for col in range(cols):
            if rows not in _ROWS or cols not in _COLUMNS:
                names[row, col] = f"in row {row + 1}, column {col + 1}"
                continue
            words = [_ROWS[rows][row], _COLUMNS[cols][col]]
            words = [word for word in dict.fromkeys(words) if word]
            if len(words) > 1 and rows == 3 and words[0] == "middle":
                words = words[1:]  # the middle row's left is "left"
            if len(words) > 1 and cols == 3 and words[1] == "middle":
                words = words[:1]
            names[row, col] = f"{'in' if words == ['middle'] else 'at'} the {' '.join(words)}"
    return names


def with_article(phrase: str) -> str:
    """The phrase after "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def listed(phrases: list[str]) -> str:
    """The phrases in one sentence: "a, b and c"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1]))) if phrases else ""
