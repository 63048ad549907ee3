"""Options of commands that train many runs: where these are trained."""

import argparse

from layerwise.cli.options import Parser
from layerwise.errors import InvalidInput, brief
from layerwise.experiments.engines import ENGINES, LOCAL, Engine, create_engine, options_in_words


def add_engine(parser: Parser) -> None:
    parser.add_argument(
        "--on",
        default=LOCAL,
        metavar="ENGINE",
        help=f"where runs are trained: local: in turn in this process; {' or '.join(ENGINES)}: on "
        "many workers at once; see docs/sweeps.md (default: local)",
    )
    parser.add_argument(
        "--on-option",
        action="append",
        default=[],
        dest="on_options",
        metavar="NAME=VALUE",
        help=f"option of the engine; may be repeated ({options_in_words()})",
    )


def engine_of(parsed: argparse.Namespace) -> Engine | None:
    """The engine that a command names; None: in this process.

    Raises:
        InvalidInput: it, or an option of it, cannot be used.
    """
    options = {}
    for text in parsed.on_options:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise InvalidInput(
                f"Cannot use --on-option {brief(repr(text))}: it is not NAME=VALUE. Give one such "
                "as cpus=2."
            )
        options[name] = value
    return create_engine(parsed.on, options)
