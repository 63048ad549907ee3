"""HTML from values: everything that was read from a file is escaped here."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NOTHING = "–"


@dataclass(frozen=True)
class Markup:
    """Text that is HTML already."""

    html: str


@dataclass(frozen=True)
class Number:
    """A cell that is sorted by a value and shows a text."""

    value: float | None
    text: str


@dataclass(frozen=True)
class Column:
    """A column's heading; ``group`` spans those beside it that have the same."""

    name: str
    group: str = ""
    note: str = ""


def text(value: Any) -> str:
    """A value as HTML."""
    return value.html if isinstance(value, Markup) else html.escape(str(value))


def tag(name: str, content: Any = "", **attributes: Any) -> Markup:
    """An element; ``class_`` is ``class``, other underscores are hyphens."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{text(content)}</{name}>")


def join(parts: Iterable[Any], between: str = "") -> Markup:
    return Markup(between.join(map(text, parts)))


def items(entries: Iterable[Any]) -> Markup:
    """A list."""
    return tag("ul", join(tag("li", entry) for entry in entries))


def percent(value: float | None, digits: int = 2) -> Number:
    return Number(value, NOTHING if value is None else f"{value:.{digits}f}")


def points(value: float | None, digits: int = 2) -> Number:
    """A difference, with its sign."""
    value = None if value is None else round(value, digits) + 0.0  # no minus before 0.00
    return Number(value, NOTHING if value is None else f"{value:+.{digits}f}".replace("-", "−"))


def uncertain(mean: float | None, deviation: float | None, seeds: int) -> Number:
    """A mean with its deviation and the number of seeds."""
    if mean is None:
        return Number(None, NOTHING)
    spread = f" ± {deviation:.2f}" if deviation is not None else ""
    return Number(mean, f"{mean:.2f}{spread} ({seeds})")


def cell(value: Any, heading: bool) -> Markup:
    if isinstance(value, Number):
        return tag("td", value.text, class_="number", data_value="" if value.value is None else f"{value.value:.6g}")
    return tag("th", value, scope="row") if heading else tag("td", value)


def table(caption: Any, columns: Sequence[Column], rows: Iterable[Sequence[Any]], tall: bool = False) -> Markup:
    """A table that can be sorted by its columns, in a box of its own that scrolls."""
    body = join(tag("tr", join(cell(value, not index) for index, value in enumerate(row))) for row in rows)
    head = headings(columns)
    inner = join([tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", body)])
    return tag("div", tag("table", inner, class_="sortable"), class_="scroll tall" if tall else "scroll", tabindex=0)


def headings(columns: Sequence[Column]) -> Markup:
    """One line of headings, or two where columns are grouped."""
    names = join(
        tag("th", tag("button", column.name, type="button", title=column.note or None), scope="col", aria_sort="none")
        for column in columns
    )
    if not any(column.group for column in columns):
        return tag("tr", names)
    groups: list[list[Any]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            groups[-1][1] += 1
        else:
            groups.append([column.group, 1])
    spans = join(tag("th" if name else "td", name, colspan=span, class_="group") for name, span in groups)
    return join([tag("tr", spans), tag("tr", names, class_="names")])


def section(key: str, title: str, *content: Any) -> Markup:
    return tag("section", join([tag("h2", title), *content]), id=key)
