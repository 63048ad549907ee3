"""An archive of runs without weights, states or paths of the machine, as `results/` keeps them.

    python benchmarks/archive.py runs/middle/* --output results/middle-scale-runs.tar.gz

Of each run it holds `run.json`, `log.jsonl`, `result.json` and, where measured,
`separability.jsonl`. Folders that it names become their last part, and results are sealed anew.
Runs that an archive of this name already holds stay in it, unless a run of their name is given.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.runs.digests import SEAL, sealed
from layerwise.runs.folder import RunFolder
from layerwise.utils.files import replacing

KEPT = ("run.json", "log.jsonl", "result.json", "separability.jsonl")


def archived(run: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a run by their names in the archive, without paths of the machine.

    Raises:
        FileNotFoundError: the run is not finished.
        InvalidInput: its result is damaged.
    """
    RunFolder(run).verify_all()
    data_dir = json.loads((run / "run.json").read_text())["execution"]["data_dir"]
    paths = {str(run): f"runs/{run.name}", str(run.resolve()): f"runs/{run.name}"}
    paths[data_dir] = Path(data_dir).name or data_dir  # "." has no last part
    for name in KEPT:
        if (run / name).exists() or name == "result.json":
            content = (run / name).read_bytes()
            if name.endswith(".json"):
                entries = changed(paths, json.loads(content))
                entries = sealed(entries) if entries.pop(SEAL, None) else entries
                content = json.dumps(entries, indent=1).encode()
            yield f"{run.name}/{name}", content


def changed(paths: dict[str, str], value: Any) -> Any:
    """A JSON value with each of some paths replaced, in sentences too."""
    if isinstance(value, dict):
        return {name: changed(paths, item) for name, item in value.items()}
    if isinstance(value, list):
        return [changed(paths, item) for item in value]
    if isinstance(value, str):
        return " ".join(paths.get(word, word) for word in value.split(" "))
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()
    files = dict[str, bytes]()
    if options.output.exists():
        with tarfile.open(options.output) as before:
            for member in before.getmembers():
                if stream := before.extractfile(member):
                    files[member.name.removeprefix("./")] = stream.read()
    for run in options.runs:
        files = {name: text for name, text in files.items() if not name.startswith(f"{run.name}/")}
        files.update(archived(run))
    with replacing(options.output) as draft, tarfile.open(draft, "w:gz") as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    print(f"{len({name.split('/')[0] for name in files})} runs in {options.output}")


if __name__ == "__main__":
    main()
