"""The command line of the faults; see the package."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults import children
from tests.faults.damages import damage_all
from tests.faults.epochs import many_epochs
from tests.faults.kills import kill_all

EVERYTHING = ("kills", "damages", "epochs")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="that all is drawn from (default: 0)")
    parser.add_argument("--kills", type=int, default=300, metavar="N", help="(default: 300)")
    parser.add_argument(
        "--damages", type=int, metavar="N", help="only N damaged files, drawn (default: all)"
    )
    parser.add_argument("--epochs", type=int, default=10_000, metavar="N", help="(default: 10000)")
    parser.add_argument("--only", choices=EVERYTHING, action="append", help="(default: all three)")
    parsed = parser.parse_args(arguments)
    chosen = parsed.only or EVERYTHING
    children.preload()
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="layerwise-faults-") as folder:
        for name in chosen:
            place = Path(folder) / name
            place.mkdir()
            Path(folder).chmod(0o755)  # for a user who may read less
            began = time.monotonic()
            if name == "kills":
                failures += kill_all(place, parsed.seed, parsed.kills, say)
            elif name == "damages":
                failures += damage_all(place, parsed.seed, parsed.damages, say)
            else:
                failures += many_epochs(place, parsed.epochs, say)
            say(f"{name}: {time.monotonic() - began:.0f} s")
    say("all survived" if not failures else f"{len(failures)} failures")
    return int(bool(failures))


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
