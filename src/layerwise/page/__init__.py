"""The report's page: one HTML file with all its styles, figures and numbers in it."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from layerwise import __version__
from layerwise.evidence import Evidence
from layerwise.page.embedded import embedded
from layerwise.page.markup import Column, Markup, Number, join, percent, section, table, tag, text
from layerwise.page.results import claims, hierarchies, paper_tables
from layerwise.page.story import broken, headline, overview
from layerwise.records import Record
from layerwise.tables import hierarchy

MARKER = '<meta name="generator" content="layerwise report">'  # in the head of what may be overwritten
NO_FIGURES = "There are no figures: matplotlib is not installed; pip install 'layerwise[plots]' and write the report again."
SECTIONS = {
    "headline": "Headline",
    "runs-read": "What was run",
    "claims": "Claims",
    "tables": "Tables",
    "figures": "Figures",
    "epochs": "Over epochs",
    "hierarchies": "Hierarchies",
    "runs": "Runs",
    "broken": "Problems",
}


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it."""

    name: str
    caption: str
    svg: str


def render(evidence: Evidence, pictures: Sequence[Picture] | None) -> str:
    """The page.

    Args:
        pictures: None where they cannot be drawn.
    """
    parts = [
        headline(evidence),
        overview(evidence),
        claims(evidence),
        paper_tables(evidence),
        figures(pictures),
        epochs(),
        hierarchies(),
        runs(evidence.records),
        broken(evidence),
    ]
    return Template(source("page.html")).substitute(
        style=source("page.css"),
        script=source("charts.js") + source("page.js"),
        navigation=join((tag("a", name, href=f"#{key}") for key, name in SECTIONS.items()), " ").html,
        content=join(parts, "\n").html,
        data=embedded(evidence).html,
        version=__version__,
    )


def source(name: str) -> str:
    return (files("layerwise.page") / name).read_text(encoding="utf-8")


def figures(pictures: Sequence[Picture] | None) -> Markup:
    if pictures is None:
        return section("figures", "Figures", tag("p", NO_FIGURES))
    return section("figures", "Figures", *map(figure, pictures))


def figure(picture: Picture) -> Markup:
    """An image with its caption; as data, so that no two figures' identifiers meet in one document."""
    data = b64encode(picture.svg.encode()).decode()
    image = Markup(f'<img alt="{text(picture.caption)}" src="data:image/svg+xml;base64,{data}" loading="lazy">')
    return tag(
        "figure",
        join([tag("div", image, class_="wide", tabindex=0), tag("figcaption", picture.caption)]),
        id=f"figure-{picture.name}",
    )


def epochs() -> Markup:
    note = (
        "Test accuracy in percent; full lines are layer-wise, dashed ones global. With several seeds: the mean, and a band of "
        "one standard deviation. Point at a chart, touch it, or move along it with the arrow keys to read its values."
    )
    charts = tag("div", "", class_="charts", id="charts")
    return section("epochs", "Accuracy over epochs", tag("p", note), charts)


def runs(records: Sequence[Record]) -> Markup:
    """A table of all runs; the script fills in what is said of each when it is opened."""
    columns = [Column(name) for name in ("run", "rows", "scale", "rule", "loss", "hierarchy", "data", "seed", "epochs")]
    columns += [Column("test, %"), Column("time, min"), Column("state")]
    found = Markup(
        '<p class="filters"><label>Find runs <input type="search" id="find"></label> <span id="found" role="status"></span></p>'
    )
    listed = table("All runs; each name leads to its details", columns, map(run_row, range(len(records)), records), tall=True)
    details = join(map(run_details, range(len(records)), records), "\n")
    return section("runs", "Runs", found, listed, tag("div", details, id="details"))


def run_row(index: int, record: Record) -> tuple[object, ...]:
    run, match = record.run, record.match
    seconds = (record.result or {}).get("seconds")
    minutes = seconds / 60 if isinstance(seconds, int | float) else None
    return (
        tag("a", f"{run.model} {index + 1}", href=f"#run-{index}"),
        ", ".join(row.label for row in match.rows) if match else "none of the paper's",
        match.scale if match else "",
        run.rule,
        "" if run.rule in ("global", "checkpointed") else run.loss,
        hierarchy(record),
        run.data,
        Number(run.seed, str(run.seed)),
        Number(len(record.epochs), f"{len(record.epochs)} of {run.epochs}"),
        percent(record.test_accuracy),
        percent(minutes, 1),
        "finished" if record.result else "not finished",
    )


def run_details(index: int, record: Record) -> Markup:
    """A line that opens."""
    score = f"{record.test_accuracy:.2f} %" if record.test_accuracy is not None else "not finished"
    line = join([f"{record.run.model} {index + 1}: {score}, seed {record.run.seed} ", tag("small", record.path)])
    return tag("details", join([tag("summary", line), tag("div", "", class_="run")]), id=f"run-{index}", data_run=index)
