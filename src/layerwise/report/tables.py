"""Runs as tables for other programs. No torch.

CSV has a line per run or per claim, LaTeX a row per row of the paper.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.errors import InvalidInput
from layerwise.hierarchy import Design, format_hierarchy, parse_downsampling, parse_hierarchy
from layerwise.paper.numbers import (
    Measured,
    Setting,
    measured,
    own_columns,
    place_of,
    settings,
)
from layerwise.paper.rows import COLUMNS, ROMAN, ROWS
from layerwise.paper.verdicts import judge_all
from layerwise.report.curves import separable
from layerwise.runs.command import command
from layerwise.runs.headings import HEADINGS, headings_of
from layerwise.runs.records import Record
from layerwise.utils.csv_text import csv_text
from layerwise.utils.words import counted

# of features alone
MEASURES = tuple(name for name in HEADINGS if name not in ("auxiliary_accuracy", "cka"))
# columns of runs.csv
RUN_COLUMNS = (
    *(
        "rows",
        "scale",
        "departures",
        "model",
        "hierarchy",
        "data",
        "rule",
        "loss",
        "seed",
        "epochs",
        "test_accuracy",
    ),
    *(
        "paper_accuracy",
        "seconds",
        "images_per_second",
        "peak_memory_bytes",
        "parameters",
        "machine",
        "commit",
        "command",
    ),
)
CLAIM_COLUMNS = (
    *(
        "setting",
        "claim",
        "sentence",
        "meaning",
        "verdict",
        "effect",
        "standard_error",
        "seeds",
        "measured",
        "comparisons",
    ),
    *("paper_agrees", "note"),
)
SEPARABILITY_COLUMNS = (
    *("run", "rule", "hierarchy", "seed", "epoch", "depth", "unit", "resolution"),
    *(*MEASURES, "cka", "gain", "gain_error", "mismatched"),
)
SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def runs_csv(records: Iterable[Record]) -> str:
    """A line per finished run.

    Accuracies are of the test images after the last epoch, in percent; ``paper_accuracy`` is what
    the paper prints at its own scale for the rows that the run belongs to, twice where it prints
    two numbers; ``seconds`` are of the whole run.
    """
    return csv_text(RUN_COLUMNS, (run_line(record) for record in records if record.result))


def run_line(record: Record) -> dict[str, Any]:
    """A run by the columns of ``RUN_COLUMNS``."""
    run, result, place = record.run, record.result or {}, place_of(record)
    rows = place.rows if place else ()
    return {
        "rows": "; ".join(row.label for row in rows),
        "scale": place.scale if place else "",
        "departures": "; ".join(place.departures) if place else "",
        "model": run.model,
        "hierarchy": hierarchy(record),
        "data": Path(run.data).name,
        "rule": run.rule,
        "loss": run.loss_in_words if is_local(record) else "cross-entropy",
        "seed": run.seed,
        "epochs": run.epochs,
        "test_accuracy": result.get("test_accuracy"),
        "paper_accuracy": "; ".join(
            dict.fromkeys(f"{row.accuracy(place.column):.2f}" for row in rows)
        )
        if place
        else "",
        **{
            name: result.get(name)
            for name in ("seconds", "images_per_second", "peak_memory_bytes", "parameters")
        },
        "machine": machine(record.facts),
        "commit": record.facts.get("commit"),
        "command": command_of(record),
    }


def command_of(record: Record) -> str:
    """The command that trains a run again, with the files that it imported."""
    imported = record.facts.get("imported")
    return command(record.run, imported if isinstance(imported, dict) else ())


def is_local(record: Record) -> bool:
    """Whether units had losses of their own: as was noted, else as the description says."""
    return bool(record.facts.get("local", not record.run.is_global))


def hierarchy(record: Record) -> str:
    """A run's hierarchy as the paper writes it.

    A run of a published network has it in its result only.
    """
    stages = record.run.hierarchy or (record.result or {}).get("hierarchy")
    halvings = record.run.downsample_after
    try:
        return (
            Design(parse_hierarchy(stages), parse_downsampling(halvings) if halvings else None).text
            if stages
            else ""
        )
    except InvalidInput:  # a run or result that was altered: shown as it is
        return str(stages)


def machine(facts: Mapping[str, Any]) -> str:
    """Device, threads and torch's version in words, as far as they were noted."""
    noted = facts.get("machine")
    if not isinstance(noted, dict):
        return ""
    threads = counted(noted["cpu_threads"], "thread") if "cpu_threads" in noted else ""
    version = f"torch {noted['torch']}" if "torch" in noted else ""
    device, instructions = noted.get("device", ""), noted.get("cpu_instructions", "")
    return ", ".join(filter(None, [str(device), str(instructions), threads, version]))


def claims_csv(records: Sequence[Record]) -> str:
    """A line per setting and claim; see ``Verdict``.

    ``effect`` and ``standard_error`` are in percentage points.
    """
    return csv_text(
        CLAIM_COLUMNS,
        (line for setting in settings(records) for line in claim_lines(records, setting)),
    )


def claim_lines(records: Sequence[Record], setting: Setting) -> Iterable[dict[str, Any]]:
    """The claims by the columns of ``CLAIM_COLUMNS``."""
    for verdict in judge_all(records, setting):
        yield {
            "setting": setting.title,
            "claim": verdict.claim.key,
            "sentence": verdict.claim.sentence,
            "meaning": verdict.claim.meaning,
            "verdict": verdict.verdict,
            "effect": rounded(verdict.effect),
            "standard_error": rounded(verdict.deviation),
            "seeds": verdict.seeds,
            "measured": verdict.measured,
            "comparisons": len(verdict.outcomes),
            "paper_agrees": verdict.paper_agrees,
            "note": verdict.note,
        }


def separability_csv(records: Iterable[Record]) -> str | None:
    """A line per run, measured epoch and depth, the image first.

    None where nothing was measured while training.

    Accuracies in percent, gains in points; ``mismatched`` is yes, no, or empty where it is not
    known.
    """
    records = list(records)
    names = list(dict.fromkeys([*MEASURES, *(name for record in records for name in own(record))]))
    lines = [
        {
            "run": Path(record.path).name,
            "rule": record.run.rule,
            "hierarchy": hierarchy(record),
            "seed": record.run.seed,
            "epoch": row.epoch,
            "depth": row.index + 1,
            "unit": row.name,
            "resolution": "×".join(map(str, row.resolution or ())),
            **{name: rounded(row.values.get(name)) for name in names},
            "cka": rounded(row.values.get("cka"), 4),
            "gain": rounded(row.gain),
            "gain_error": rounded(row.gain_error),
            "mismatched": {True: "yes", False: "no", None: ""}[row.mismatched],
            # measures of the user's own
            **{
                name: rounded(row.values[name])
                for name in sorted(row.values.keys() - HEADINGS.keys())
            },
        }
        for record in records
        for row in separable(record)
    ]
    first = SEPARABILITY_COLUMNS.index(MEASURES[0])
    behind = SEPARABILITY_COLUMNS[first + len(MEASURES) :]
    return csv_text((*SEPARABILITY_COLUMNS[:first], *names, *behind), lines) if lines else None


def own(record: Record) -> list[str]:
    """Measures of a run that are not of this library."""
    return [name for name in headings_of(record.separability()) if name not in HEADINGS]


def rounded(number: float | None, digits: int = 2) -> float | None:
    """A number to so many digits behind the point.

    Percentage points have two, as accuracies are given.
    """
    return None if number is None else round(number, digits)


def latex_table(records: Sequence[Record], table: int, setting: Setting) -> str | None:
    """A table of the paper beside a setting's numbers, for a document that uses booktabs.

    None without any number.

    Returns:
        Test accuracies in percent, measured ones as mean ± deviation over seeds.
    """
    rows = [row for row in ROWS if row.table == table]
    numbers = {row: [measured(records, row, column, setting) for column in COLUMNS] for row in rows}
    if not any(
        measured(records, row, column, setting) for row in rows for column in own_columns(setting)
    ):
        return None
    lines = [
        " & ".join(
            [
                escape(row.name),
                format_hierarchy(row.hierarchy),
                *(f"{row.accuracy(column):.2f}" for column in COLUMNS),
                *(cell(number) for number in numbers[row]),
                seeds(numbers[row]),
            ]
        )
        for row in rows
    ]
    caption = (
        f"Table {ROMAN[table - 1]} of arXiv:2010.08038 ({rows[0].data}): test accuracy in "
        f"percent. Measured in the setting “{setting.title}”, mean ± deviation over seeds."
    )
    return LATEX % (
        escape(caption),
        f"tab:{ROMAN[table - 1].lower()}-{setting.key}",
        escape(setting.key),
        " \\\\\n".join(lines),
    )


LATEX_MARK = "of arXiv:2010.08038 ("  # in the caption of every table
LATEX = r"""\begin{table}
\caption{%s}
\label{%s}
\begin{tabular}{llrrrrr}
\toprule
& & \multicolumn{2}{c}{paper} & \multicolumn{2}{c}{measured: %s} & \\
\cmidrule(lr){3-4}\cmidrule(lr){5-6}
model & hierarchy & layer-wise & global & layer-wise & global & seeds \\
\midrule
%s \\
\bottomrule
\end{tabular}
\end{table}
"""


def cell(number: Measured | None) -> str:
    """Mean ± deviation in percent; a dash where nothing is measured."""
    if number is None:
        return "--"
    return f"{number.mean:.2f}" + (
        f" $\\pm$ {number.deviation:.2f}" if number.deviation is not None else ""
    )


def seeds(numbers: Sequence[Measured | None]) -> str:
    """Number of seeds; layer-wise and global ones where they differ."""
    counts = [str(len(number.seeds)) if number else "0" for number in numbers]
    return counts[0] if len(set(counts)) == 1 else "/".join(counts)


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return text.translate(SPECIAL).replace("±", r"$\pm$").replace("“", "``").replace("”", "''")
