"""A report as a page and as Markdown: its sections, and how they look; no torch."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from secvec.errors import MissingExtraError
from secvec.report_verdict import Verdict

# Inside an interval, and before a p-value.
_BREAKS = re.compile(r"(?<=\[[\d.%]{5},) (?=[\d.])|(?<=, p) (?=\d)")
_MARKDOWN = re.compile(r"([\\`*_\[\]|#~])")


@dataclass(frozen=True)
class Table:
    """Texts in rows. source: the file that the figures are from."""

    title: str
    source: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A picture, as SVG; legend: a name and a class of the page's colours each; table: the same as numbers."""

    svg: str
    legend: Sequence[tuple[str, str]]
    table: Table


@dataclass(frozen=True)
class Section:
    """words: what to know; missing: a line for each thing that was not measured; answers: hidden until opened."""

    title: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    answers: Sequence[Table] = ()
    missing: Sequence[str] = ()


def page(found: Verdict, parts: Sequence[Section]) -> str:
    """Return the page, which needs no network and no scripts. Raises MissingExtraError without jinja2."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "report") from error
    template = resources.files("secvec").joinpath("pages/report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["unbroken"] = _unbroken
    return environment.from_string(template).render(verdict=found, sections=parts)


def _unbroken(text: str) -> str:
    """Keep an interval, and a p-value, in one line."""
    return _BREAKS.sub("\u00a0", text)


def markdown(found: Verdict, parts: Sequence[Section]) -> str:
    """Return the same as Markdown; a picture is the table of its numbers."""
    lines = [f"# {_text(found.line)}"]
    for part in parts:
        lines += ["", f"## {_text(part.title)}"]
        lines += [f"\n{_text(each)}" for each in [*part.words, *part.missing]]
        for table in [*part.tables, *(chart.table for chart in part.charts), *part.answers]:
            lines += ["", *_rows(table)]
    return "\n".join(lines) + "\n"


def _rows(table: Table) -> Iterator[str]:
    if table.title:
        yield f"### {_text(table.title)}\n"
    yield f"| {' | '.join(map(_text, table.head))} |"
    yield "|" + "---|" * len(table.head)
    for row in table.rows:
        yield f"| {' | '.join(map(_text, row))} |"
    yield f"\nfrom {_text(table.source)}"


def _text(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line."""
    escaped = _MARKDOWN.sub(r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("\r", "").replace("\n", "<br>")
