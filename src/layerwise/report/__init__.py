"""Runs as one page, with figures and tables beside it.

No torch; matplotlib only for the files of figures.
"""

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layerwise.errors import InvalidInput
from layerwise.paper.numbers import repeated
from layerwise.paper.rows import TABLES
from layerwise.paper.verdicts import Evidence
from layerwise.report.figure_data import all_figures
from layerwise.report.page import MARKER, render
from layerwise.report.tables import (
    CLAIM_COLUMNS,
    LATEX_MARK,
    RUN_COLUMNS,
    SEPARABILITY_COLUMNS,
    claims_csv,
    latex_table,
    runs_csv,
    separability_csv,
)
from layerwise.runs.records import Broken, Record, read_runs
from layerwise.utils.files import (
    FIGURE_MARK,
    refuse_foreign,
    refuse_unwritable,
    refuse_unwritable_folder,
    replacing,
)
from layerwise.utils.terminal import in_one_line
from layerwise.utils.words import counted

FIRST_COLUMNS = 4  # that a table is known by; an earlier version's may have fewer later ones


def report(
    paths: Sequence[str],
    output: str,
    figures: str | None = None,
    csv: str | None = None,
    latex: str | None = None,
) -> dict[str, Any]:
    """Read runs and write the page, and beside it what else is asked for.

    Args:
        figures: folder for every figure as SVG and PNG. csv: file for a line per run; the claims go
            into another beside it, and so does what was measured of the features.
        latex: folder for the paper's tables.

    Raises:
        InvalidInput: there are no runs, or a path cannot be written or holds what is not a
            report's; nothing was written.
    """
    check_output("--output", Path(output), MARKER)
    check_folders(figures, latex)
    check_files(figures, latex)
    if csv is not None:
        refuse_unwritable("--csv", Path(csv))
        tables = {
            Path(csv): RUN_COLUMNS,
            beside(csv, "claims"): CLAIM_COLUMNS,
            beside(csv, "separability"): SEPARABILITY_COLUMNS,
        }
        if clash := next(
            (path for path in tables if path.absolute() == Path(output).absolute()), None
        ):
            raise InvalidInput(
                f"Cannot write --csv and --output into one file, {clash}. Give another path to one."
            )
        for path, columns in tables.items():
            check_output("--csv", path, ",".join(columns[:FIRST_COLUMNS]))
    records, broken = read_runs(paths)
    if not records and not broken:
        raise InvalidInput(
            f"Cannot report: there is no run in {', '.join(paths)}. Give folders of runs, or one "
            "that holds them, such as runs."
        )
    twice = [uncounted(record, first) for first, record in repeated(records)]
    evidence = Evidence(records, [*broken, *twice])
    files = [write(Path(output), render(evidence))]
    files += write_csv(evidence, csv) + write_latex(evidence, latex) + draw(evidence, figures)
    say(evidence, files)
    return summary(evidence, files)


def uncounted(record: Record, first: Record) -> Broken:
    """A run whose row and seed were read before."""
    return Broken(
        record.path,
        f"its {record.test_accuracy:.2f} % does not count for the paper's row: {first.path} has "
        f"the same row, setting and seed, and came first with {first.test_accuracy:.2f} %",
    )


def check_output(option: str, path: Path, mark: str) -> None:
    """Refuse to overwrite a file that this command did not write.

    Args:
        mark: what its first bytes hold.

    Raises:
        InvalidInput: as said, or it could not be written.
    """
    refuse_unwritable(option, path)
    refuse_foreign(option, path, mark, "report")


def check_folders(figures: str | None, latex: str | None) -> None:
    """Refuse folders that cannot be made, and figures that cannot be drawn.

    Raises:
        InvalidInput: as said.
    """
    for option, path in (("--figures", figures), ("--latex", latex)):
        if path is not None:
            refuse_unwritable_folder(option, Path(path))
    if figures is not None and find_spec("matplotlib") is None:
        raise InvalidInput(
            "Cannot draw --figures: matplotlib is not installed. Install it with pip install "
            "'layerwise[plots]', or leave --figures out."
        )


def check_files(figures: str | None, latex: str | None) -> None:
    """Refuse folders in which a figure's or a table's name is taken by a file of another's.

    Raises:
        InvalidInput: naming the file.
    """
    for folder, kinds, option, mark in (
        (figures, ("*.svg", "*.png"), "--figures", FIGURE_MARK),
        (latex, ("table-*.tex",), "--latex", LATEX_MARK),
    ):
        for kind in kinds if folder is not None else ():
            for path in Path(folder or "").glob(kind):
                refuse_foreign(option, path, mark, "report")


def draw(evidence: Evidence, folder: str | None) -> list[Path]:
    """Files of every figure, where a folder is named."""
    if folder is None:
        return []
    from layerwise.report.figures import write_figures

    return write_figures(all_figures(evidence), Path(folder))


def beside(csv: str, what: str) -> Path:
    """Where other tables go beside that of the runs."""
    return Path(csv).with_name(f"{Path(csv).stem}-{what}{Path(csv).suffix}")


def write_csv(evidence: Evidence, path: str | None) -> list[Path]:
    if path is None:
        return []
    texts = {
        Path(path): runs_csv(evidence.records),
        beside(path, "claims"): claims_csv(evidence.records),
        beside(path, "separability"): separability_csv(evidence.records),
    }
    return [write(file, text) for file, text in texts.items() if text is not None]


def write_latex(evidence: Evidence, folder: str | None) -> list[Path]:
    """A file for every table and setting that has a number."""
    if folder is None:
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    texts = {
        f"table-{table}-{setting.key}.tex": latex_table(evidence.records, table, setting)
        for setting in evidence.settings
        for table in TABLES
    }
    return [write(Path(folder) / name, text) for name, text in texts.items() if text is not None]


def write(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(
            text, encoding="utf-8", errors="replace"
        )  # a path may hold bytes that are no text
    return path


def say(evidence: Evidence, files: Sequence[Path]) -> None:
    """Print what was read and what was written."""
    finished = sum(record.result is not None for record in evidence.records)
    print(f"{counted(len(evidence.records), 'run')} read, {finished} of them finished")
    for item in evidence.broken:
        print(f"  {in_one_line(f'{item.path}: {item.reason}')}")
    print(f"written: {files[0]} ({files[0].stat().st_size / 1e6:.2f} MB)")
    for folder, number in Counter(path.parent for path in files[1:]).items():
        print(f"written: {counted(number, 'file')} in {folder}", flush=True)


def summary(evidence: Evidence, files: Sequence[Path]) -> dict[str, Any]:
    """The result as JSON."""
    return {
        "report": str(files[0]),
        "files": [str(path) for path in files],
        "runs": len(evidence.records),
        "finished": sum(record.result is not None for record in evidence.records),
        "broken": [{"path": item.path, "reason": item.reason} for item in evidence.broken],
        "settings": [
            {
                "setting": setting.title,
                "claims": {
                    verdict.claim.key: verdict.verdict for verdict in evidence.verdicts[setting]
                },
            }
            for setting in evidence.settings
        ],
    }
