"""Options of `comemo store`, and those of a store for other commands."""

import argparse

from comemo.cli.arguments import number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the actions ls, rm and stats and their arguments."""
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=type(parser)
    )
    for name, text in (
        ("ls", "list images, least recently used first"),
        ("rm", "remove images"),
        ("stats", "sum up what the directory holds"),
    ):
        added = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("directory", metavar="DIR")
        if name == "rm":
            added.add_argument("keys", nargs="*", metavar="KEY", help="or its first characters")
            added.add_argument("--all", action="store_true", help="every image")
            days = number(float, 0)
            added.add_argument("--older-than", type=days, metavar="DAYS", help="unused for longer")
        added.add_argument("--json", action="store_true", help="print JSON")
        # Without a default of its own: `store --debug ACTION` must stay in effect.
        added.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """Add `--store` and `--store-budget` to another command, for `comemo.cli.stores.open_store`."""
    parser.add_argument("--store", metavar="DIR", help="cache image memories in this directory")
    parser.add_argument(
        "--store-budget",
        type=number(float, 0, above=True),
        metavar="GB",
        help="of its files; the least recently used ones are removed (default: no limit)",
    )
