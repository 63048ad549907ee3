"""Damaged files of runs, and what every command makes of them."""

import hashlib
import json
import os
import random
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from layerwise.runs.digests import SEAL
from layerwise.runs.folder import RECORDS_DIGESTS, RESULT, WRITTEN
from tests.faults import children

BASE = ["vgg8b", "--train-images", "60", "--batch-size", "20", "--at", "3", "--epochs", "3"]
BASE += ["--width", "0.04"]
COMPARE = ["compare", *BASE, "--hierarchies", "1,1,1,1", "--rules", "simultaneous"]
COMPARE += ["--device", "cpu", "--cpu-threads", "1", "--separability-every", "1"]
COMPARE += ["--separability-measures", "fisher"]
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 10**320, float("nan"), float("-inf"), "", "a\x1b[31m", [], {}),
    *([[]], {"a": 1}, "9" * 400, [1, "a", None], -(10**30)),
)


def truncated(path: Path, elsewhere: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path, elsewhere: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path, elsewhere: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def garbage(path: Path, elsewhere: Path) -> None:
    path.write_bytes(random.Random(path.name).randbytes(max(100, path.stat().st_size)))


def nested(path: Path, elsewhere: Path) -> None:
    path.write_text("[" * 200_000)


def removed(path: Path, elsewhere: Path) -> None:
    path.unlink()


def linked(path: Path, elsewhere: Path) -> None:
    path.unlink()
    path.symlink_to(elsewhere / "precious")


def linked_to_its_content(path: Path, elsewhere: Path) -> None:
    shutil.move(path, elsewhere / "moved")
    path.symlink_to(elsewhere / "moved")


def hard_linked(path: Path, elsewhere: Path) -> None:
    os.link(path, elsewhere / "moved")


def linked_to_nothing(path: Path, elsewhere: Path) -> None:
    path.unlink()
    path.symlink_to(elsewhere / "nothing")


def linked_to_itself(path: Path, elsewhere: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def draft_linked(path: Path, elsewhere: Path) -> None:
    path.with_name(path.name + ".draft").symlink_to(elsewhere / "precious")


def draft_folder(path: Path, elsewhere: Path) -> None:
    path.with_name(path.name + ".draft").mkdir()


def fifo(path: Path, elsewhere: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, elsewhere: Path) -> None:
    path.unlink()
    path.mkdir()


def local_socket(path: Path, elsewhere: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # an address may have 107 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def device(path: Path, elsewhere: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def unreadable(path: Path, elsewhere: Path) -> None:
    path.chmod(0)


DAMAGES: tuple[Callable[[Path, Path], None], ...] = (
    *(truncated, emptied, zeroed, garbage, nested, removed, linked, linked_to_its_content),
    *(hard_linked, linked_to_nothing, linked_to_itself, draft_linked, draft_folder, fifo, folder),
    *(local_socket, device, unreadable),
)


def commands(runs: Path, run: Path, image: Path) -> dict[str, list[str]]:
    """Every command that takes a run, or a folder of runs."""
    return {
        "train": ["train", "--resume", str(run)],
        "evaluate": ["evaluate", str(run)],
        "evaluate --best": ["evaluate", str(run), "--best"],
        "separability": ["separability", str(run), "--measures", "fisher"],
        "predict": ["predict", str(run), str(image)],
        "report": ["report", str(runs), "--output", str(runs.parent / "page.html")],
        "compare": [*COMPARE, "--output", str(runs)],
    }


def make_bases(place: Path) -> dict[str, Path]:
    """A finished run, and one that was stopped after its first epochs, in folders of runs."""
    finished, begun = place / "finished", place / "begun"
    ended = children.run([*COMPARE, "--output", str(finished)], finished, limit=60)
    assert ended.code == 0, ended.output
    states = 0
    while not list(begun.glob("*/last.pt")):
        states += 40
        shutil.rmtree(begun, ignore_errors=True)
        command = [*COMPARE, "--output", str(begun)]
        children.run(command, begun, before_operation=states, limit=60)
    return {"finished": finished, "begun": begun}


def values(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every table or list within a JSON value, with each of its keys or indices."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from values(value[key])


def altered(dice: random.Random) -> Callable[[Path, Path], None]:
    """A damage that puts another value into a JSON file, or into one of its lines."""

    def alter(path: Path, elsewhere: Path) -> None:
        text = path.read_text()
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        number = dice.randrange(len(lines))
        value = json.loads(lines[number])
        if path.name == RESULT:  # as of an earlier version, which had no digests of these
            for name in (SEAL, RECORDS_DIGESTS):
                value.pop(name, None)
        holder, key = dice.choice(list(values(value)))
        holder[key] = dice.choice(WRONG)
        lines[number] = json.dumps(value)
        path.write_text("\n".join(lines) + "\n")

    return alter


def cases(dice: random.Random, most: int | None) -> list[tuple[str, str, str, Any]]:
    """Base, file, name of the damage, damage: all of them, or so many that are drawn."""
    drawn = [
        (base, name, damage.__name__, damage)
        for base in ("finished", "begun")
        for name in WRITTEN
        for damage in DAMAGES
    ]
    for _ in range(len(drawn) // 2):
        name = dice.choice(["run.json", "log.jsonl", "result.json", "separability.jsonl"])
        drawn.append((dice.choice(["finished", "begun"]), name, "altered", altered(dice)))
    return drawn if most is None else dice.sample(drawn, most)


def damage_all(place: Path, seed: int, most: int | None, say: Callable[[str], None]) -> list[str]:
    """Damage files, run the commands, and return what went wrong, in words."""
    dice = random.Random(seed)
    bases = make_bases(place)
    image = place / "image.png"
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(image)
    names, codes, failures = list(commands(place, place, image)), Counter[int](), list[str]()
    for base, name, word, damage in cases(dice, most):
        for chosen in names if most is None else [dice.choice(names)]:
            ended = damage_one(place, bases[base], name, damage, chosen, image)
            if ended is None:
                continue
            code, problem = ended
            codes[code] += 1
            if problem:
                failures.append(f"{base}, {name} {word}, {chosen}: {problem}")
                say(failures[-1])
    say(
        f"{codes.total() - len(failures)} of {codes.total()} commands on damaged files ended "
        f"rightly: {codes[0]} did their work, {codes[2]} refused it (seed {seed})"
    )
    return failures


def damage_one(
    place: Path,
    base: Path,
    name: str,
    damage: Callable[[Path, Path], None],
    chosen: str,
    image: Path,
) -> tuple[int, str] | None:
    """How a command ended, and what is wrong with that; None: there is no such file."""
    runs, elsewhere = place / "work" / "runs", place / "elsewhere"
    shutil.rmtree(place / "work", ignore_errors=True)
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.copytree(base, runs)
    elsewhere.mkdir()
    (elsewhere / "precious").write_bytes(b"precious")
    [run] = [path.parent for path in runs.glob("*/run.json")]
    if not (run / name).exists():
        return None
    damage(run / name, elsewhere)
    before = content_of(elsewhere)
    as_nobody = damage is unreadable and os.geteuid() == 0
    if as_nobody:
        give_away(place)
    ended = children.run(
        commands(runs, run, image)[chosen], runs, limit=children.TIME_LIMIT, as_nobody=as_nobody
    )
    if "Traceback" in ended.output or ended.code not in (0, 2):
        hung = " (it took too long)" if ended.seconds >= children.TIME_LIMIT else ""
        return ended.code, f"exit {ended.code}{hung}: {ended.output[-400:]}"
    changed = content_of(elsewhere) != before
    return ended.code, f"files elsewhere were changed: {ended.output[-200:]}" if changed else ""


def content_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def give_away(place: Path) -> None:
    """Let another user own the files, as it owns a run that it may not read all of."""
    place.chmod(0o755)
    for path in (place / "work", *(place / "work").rglob("*")):
        os.chown(path, children.NOBODY, children.NOBODY, follow_symlinks=False)
