"""The report's page: one HTML file with its styles, its script and all numbers in it."""

from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from layerwise.paper.verdicts import INCONSISTENCIES, Evidence
from layerwise.report.figure_data import all_figures
from layerwise.report.page import results, story
from layerwise.report.page.cells import column_groups, is_number_cell
from layerwise.report.page.embedded import embedded
from layerwise.report.page.runs import RUN_COLUMNS, run_rows
from layerwise.utils.version import version
from layerwise.utils.words import counted

# in the head of what may be overwritten
MARKER = '<meta name="generator" content="layerwise report">'
# a template each
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


def render(evidence: Evidence) -> str:
    """The page. Every text in it is escaped, whatever a folder of runs holds."""
    figures = all_figures(evidence)
    return (
        environment()
        .get_template("page.html")
        .render(
            headline=story.headline(evidence),
            overview=story.overview(evidence),
            problems=story.problems(evidence),
            claims=list(results.claims(evidence)),
            claims_over_scales=results.claims_over_scales(evidence),
            paper_tables=results.paper_tables(evidence),
            figures=figures,
            hierarchies=results.hierarchies(),
            runs=run_rows(evidence.records),
            data=embedded(evidence, figures),
        )
    )


def environment() -> Environment:
    """Templates of this package, and the constants and functions that they use."""
    made = Environment(
        loader=PackageLoader(__name__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    made.tests["number_cell"] = is_number_cell
    made.globals |= constants()
    return made


def constants() -> dict[str, Any]:
    return {
        "marker": Markup(MARKER),
        "sections": SECTIONS,
        "version": version(),
        "source": source,
        "counted": counted,
        "column_groups": column_groups,
        "marks": results.MARKS,
        "agreement": results.AGREEMENT,
        "claim_columns": results.CLAIM_COLUMNS,
        "run_columns": RUN_COLUMNS,
        "inconsistencies": INCONSISTENCIES,
    }


def source(name: str) -> Markup:
    """A style sheet or script as it is."""
    return Markup((files(__name__) / "templates" / name).read_text(encoding="utf-8"))
