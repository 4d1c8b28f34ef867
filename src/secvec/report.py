"""One page for people who were not there: what was trained, what was shown, what was not measured; no torch."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from secvec.atomic import atomic_write
from secvec.errors import InputError, MissingExtraError, UsageError
from secvec.provenance import digest_file, versions
from secvec.report_inputs import Inputs, read_inputs
from secvec.report_sections import Section, Table, sections
from secvec.report_verdict import Verdict, verdict

MAX_BYTES = 2_000_000
# Inside an interval, and before a p-value.
_BREAKS = re.compile(r"(?<=\[[\d.%]{5},) (?=[\d.])|(?<=, p) (?=\d)")
_MARKDOWN = re.compile(r"([\\`*_\[\]|#~])")


@dataclass(frozen=True)
class Report:
    """verdict: one line; files: those written, by `page`, `markdown` and `json`."""

    verdict: Verdict
    files: Mapping[str, Path]


def report(folders: Sequence[str | Path], out: str | Path, *, with_text: bool = False) -> Report:
    """Write what the folders of `train`, `scan`, `eval` and `demo` hold as a page, as Markdown and as JSON.

    out: the page, `NAME.html`, which needs no network and is under 2 MB; `NAME.md` and `NAME.json` are written beside
    it. with_text: put a few questions and answers in; the files are then readable by their owner alone.

    Raises InputError on a folder of another kind, CheckpointError on a file in it that is damaged or was altered,
    UsageError on an `out` that is no page, MissingExtraError without jinja2. Then nothing is written.
    """
    out = Path(out)
    if out.suffix != ".html" or out.is_dir():
        raise UsageError(f"{out}: expected the name of a page, such as report.html")
    inputs = read_inputs(folders, with_text=with_text)
    found, parts = verdict(inputs), sections(inputs, with_text=with_text)
    texts = {
        ".html": _page(found, parts),
        ".md": _markdown(found, parts),
        ".json": json.dumps(_document(found, inputs), indent=2, allow_nan=False) + "\n",
    }
    if (size := len(texts[".html"].encode())) > MAX_BYTES:
        raise InputError(f"{out}: expected a page under {MAX_BYTES:,} bytes, found {size:,}; give fewer folders")
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        with atomic_write(out.with_suffix(suffix), mode=0o600 if with_text else 0o644) as file:
            file.write(text.encode())
    return Report(found, {"page": out, "markdown": out.with_suffix(".md"), "json": out.with_suffix(".json")})


def _page(found: Verdict, parts: Sequence[Section]) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "report") from error
    template = resources.files("secvec").joinpath("pages/report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["unbroken"] = lambda text: _BREAKS.sub("\u00a0", text)
    return environment.from_string(template).render(verdict=found, sections=parts)


def _markdown(found: Verdict, parts: Sequence[Section]) -> str:
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


def _document(found: Verdict, inputs: Inputs) -> dict[str, Any]:
    return {
        "format": "secvec.report",
        "version": 1,
        "verdict": asdict(found),
        **TypeAdapter(Inputs).dump_python(inputs, mode="json"),
        "sources": _sources(inputs),
        "versions": dict(versions()),
    }


def _sources(inputs: Inputs) -> Mapping[str, str]:
    """Return the digest of each file that figures are from."""
    files = [
        run.folder / name for run in inputs.runs for name in ("run.json", "state.json", "metrics.jsonl", "proof.json")
    ]
    files += [scan.folder / name for scan in inputs.scans for name in ("summary.json", "scan.jsonl")]
    files += [evaluation.file for evaluation in inputs.evaluations]
    return {str(path): digest_file(path) for path in files if path.is_file()}
