"""The command line: a file per command, and the options they share.

A command's module has ``add_arguments(parser)`` and ``run(parsed)``, which returns what ``--json``
prints. A command that checks something also has ``problem(result)``: a sentence on what the check
found wrong, or None. Only the module of the command that is given is imported, so that help comes
at once.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from layerwise.cli.options import Parser
from layerwise.errors import (
    IMPORT_HINT,
    CannotSplit,
    Diverged,
    InvalidInput,
    LostRank,
    brief,
    raised,
)
from layerwise.utils.launch import is_first, launched_rank, launched_size
from layerwise.utils.options import as_flag
from layerwise.utils.plugins import IMPORTED, import_files
from layerwise.utils.terminal import discard, in_one_line, unguarded, visible_streams, warning_text

FAILED, REFUSED, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141  # exit codes

COMMANDS = {
    "train": "train a network by local losses, or globally",
    "compare": "train several hierarchies, or several local losses beside global training",
    "reproduce": "train the rows of the paper's tables",
    "report": "write a page of runs beside the paper's numbers",
    "show": "print the units of a network with their heads and losses",
    "audit": "check by differentiating what the loss of each unit reaches",
    "profile": "predict and measure the cost of a step by several rules",
    "evaluate": "measure the accuracy of a trained network and of its units",
    "export": "write a trained network, or its first units, to a file that others load",
    "separability": "measure where in depth the classes become separable",
    "accelerate": "find hierarchies that learn better layer-wise in a budget",
    "predict": "print the five likeliest classes of images",
    "list": "print the networks, losses, rules, data sets, measures or presets",
}
MODULES = {"list": "listing"}  # where a module of the command's name would hide a builtin


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    0: done, 1: a check failed, a run of several diverged or a rank was lost, 2: refused, 130:
    interrupted.
    """
    set_environment()
    warnings.formatwarning = warning_text
    with visible_streams():
        try:
            if problem := run_command(list(sys.argv[1:] if arguments is None else arguments)):
                leave(f"layerwise: {problem}", FAILED)
        except (InvalidInput, CannotSplit, Diverged, LostRank) as error:
            of_all_ranks = getattr(error, "of_all_ranks", False)  # then the first says it
            code = FAILED if isinstance(error, LostRank) else REFUSED
            leave(named(spelled_as_option(str(error))), code, not is_first() and of_all_ranks)
        except KeyboardInterrupt as interruption:
            leave(named(str(interruption) or "interrupted"), INTERRUPTED, not is_first())
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            leave(
                "layerwise: Cannot go on: there is not enough memory. Lower --batch-size, --width "
                "or --image-size.",
                REFUSED,
            )
        except BrokenPipeError:  # the reader of a pipe, such as head, has gone
            discard(unguarded(sys.stdout))
            sys.exit(PIPE_CLOSED)
        except OSError as error:
            leave(
                f"layerwise: Cannot use {error.filename or 'a file'}: {error.strerror or error}. "
                "Give another path.",
                REFUSED,
            )


def run_command(arguments: list[str]) -> str | None:
    """Run the command that the arguments name, and print its result if they ask for it.

    Returns:
        What the command's check found wrong.
    """
    try:
        parsed = parse(arguments)
        refuse_ranks(parsed.command)
        result = result_of(parsed)
        if parsed.json and is_first():
            print(json.dumps(result, allow_nan=False))
        problem: str | None = parsed.problem(result) if parsed.problem else None
        return problem
    finally:
        sys.stdout.flush()  # here, since Python's own at exit ends in a traceback if it fails


def result_of(parsed: argparse.Namespace) -> Any:
    """The result of the command that was parsed.

    Raises:
        InvalidInput: code of the user's own, such as a network's forward, asked Python to end.
    """
    try:
        return parsed.run(parsed)
    except SystemExit as error:
        raise InvalidInput(
            f"Cannot go on: the network, or other code that was given, {raised(error)}. Let it "
            "raise another error, or correct it."
        ) from error


def refuse_ranks(command: Parser) -> None:
    """Refuse a command that every rank would carry out on its own.

    Raises:
        InvalidInput: as said.
    """
    if launched_size() > 1 and command.prog.split()[-1] != "train":
        raise InvalidInput(
            f"Cannot run `{command.prog}` on {launched_size()} ranks: each would do the same. "
            "Start it without torchrun; only `layerwise train` is for several."
        )


def set_environment() -> None:
    """Settings of the libraries below, made before they are loaded."""
    # torch's profiler, which counts memory, else writes of itself to stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # threads that wait spin only shortly: as fast on an idle machine, 17 times faster when another
    # program takes a core (docs/log.md, 2026-11-23)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # large tensors in large pages: a new map's first touch else costs several times what is
    # computed (docs/log.md, 2026-11-23)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def is_out_of_memory(error: BaseException) -> bool:
    words = "allocate memory", "out of memory", "Storage size calculation overflowed"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def spelled_as_option(message: str) -> str:
    """A refusal in which what cannot be used is named as the command line names it."""
    if IMPORTED:
        message = message.replace(IMPORT_HINT, "The imported files add none of that name.")
    begins = re.match(r"Cannot use ([a-z]+(?:_[a-z]+)+) ", message)
    return message.replace(begins[1], as_flag(begins[1]), 1) if begins else message


def named(message: str) -> str:
    """A last line, with the name of the program, and of the rank if it is one of several."""
    rank = f" (rank {launched_rank()})" if launched_size() > 1 else ""
    return f"layerwise{rank}: {message}"


def leave(message: str, code: int, silently: bool = False) -> NoReturn:
    if silently:
        sys.exit(code)
    with contextlib.suppress(InvalidInput, BrokenPipeError):  # nobody can be told
        print(in_one_line(message), file=sys.stderr, flush=True)
    sys.exit(code)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The arguments of a command, whose registries ``--import`` may have added to."""
    refuse_unreadable(arguments)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    if chosen in COMMANDS:
        import_files(import_paths(arguments))
    parsed, unknown = build_parser(chosen).parse_known_args(arguments)
    if unknown:
        refuse_word(unknown[0], parsed.command, parsed.imports)
    if ":" in (getattr(parsed, "model", None) or ""):
        from layerwise.models import import_code_of

        import_code_of(parsed.model)
    return parsed


def refuse_word(word: str, command: Parser, imports: Sequence[str] | None) -> NoReturn:
    """Refuse a word that a command does not know.

    Raises:
        InvalidInput: naming the option that is spelled most alike.
    """
    own = "An option of a loss, rule or network of your own needs --import FILE."
    if imports:
        own = (
            "The imported files declare none of that name: an option is a keyword-only argument "
            "of a loss, a rule or a network, with a default."
        )
    if not word.startswith("-"):
        problem, own = f"it takes no further word, but has {brief(repr(word))}", ""
    else:
        flag = word.partition("=")[0]
        problem = f"it has no option {brief(repr(flag))}"
        if flag in command.flags():
            problem, own = f"{flag} comes before the command. Put it after the command", ""
        elif nearest := get_close_matches(flag, command.flags(), n=1, cutoff=0.7):
            problem, own = f"{problem}. Did you mean {nearest[0]}?", ""
    end = "" if problem.endswith("?") else "."
    raise InvalidInput(
        f"Cannot read the command: {problem}{end} See `{command.prog} --help`. {own}".strip()
    )


def refuse_unreadable(arguments: Sequence[str]) -> None:
    """Refuse words that Python's own parser fails at.

    Raises:
        InvalidInput: an option is given the value ``--``, or a word holds a zero byte.
    """
    for word in arguments:
        if re.fullmatch(r"--?[^=]+=--|-[^-]--", word):
            raise InvalidInput(
                f"Cannot read the command: {word} gives -- as a value. Give another value."
            )
        if "\0" in word:
            raise InvalidInput("Cannot read the command: it holds a zero byte. Leave it out.")


def import_paths(arguments: Sequence[str]) -> list[str]:
    """The files that ``--import`` names; they are run before other options are known."""
    first = Parser(add_help=False)
    first.add_argument("--import", dest="imports", action="append", default=[])
    return list(first.parse_known_args(arguments)[0].imports)


def build_parser(chosen: str | None) -> Parser:
    """A parser of all commands, of which only the chosen one has its arguments."""
    parser = Parser(
        prog="layerwise", description="Train networks without global backpropagation, unit by unit."
    )
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
        if name == chosen:
            module = import_module(f"layerwise.cli.{MODULES.get(name, name)}")
            add_common(command)
            module.add_arguments(command)
            problem = getattr(module, "problem", None)
            command.set_defaults(run=module.run, command=command, problem=problem)
    return parser


def add_common(command: Parser) -> None:
    command.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object, the last line of stdout",
    )
    command.add_argument(
        "--import",
        dest="imports",
        action="append",
        metavar="FILE",
        help="Python file (or package.module) to run first, which adds losses, rules, measures, "
        "networks or data sets",
    )


class Version(argparse.Action):
    """Prints the version when it is asked for; reading it from the metadata takes a moment."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from layerwise.utils.version import version

        print(f"layerwise {version()}")
        parser.exit()
