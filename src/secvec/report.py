"""One page for people who were not there: what was trained, what was shown, what was not measured; no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from secvec.atomic import atomic_write
from secvec.errors import CheckpointError, InputError, UsageError
from secvec.provenance import digest_file, versions
from secvec.report_inputs import Inputs, read_inputs
from secvec.report_page import markdown, page
from secvec.report_sections import sections
from secvec.report_verdict import Verdict, verdict
from secvec.tripwire import read_json

FORMAT = "secvec.report"
MAX_BYTES = 2_000_000


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
    UsageError on an `out` that is no page or would replace other files, MissingExtraError without jinja2. Then nothing
    is written.
    """
    out = Path(out)
    if out.suffix != ".html" or out.is_dir():
        raise UsageError(f"{out}: expected the name of a page, such as report.html")
    _refuse_others(out)
    inputs = read_inputs(folders, with_text=with_text)
    found, parts = verdict(inputs), sections(inputs, with_text=with_text)
    texts = {
        ".html": page(found, parts),
        ".md": markdown(found, parts),
        ".json": json.dumps(_document(found, inputs), indent=2, allow_nan=False) + "\n",
    }
    if (size := len(texts[".html"].encode("utf-8", "replace"))) > MAX_BYTES:
        raise InputError(f"{out}: expected a page under {MAX_BYTES:,} bytes, found {size:,}; give fewer folders")
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        with atomic_write(out.with_suffix(suffix), mode=0o600 if with_text else 0o644) as file:
            # Half a surrogate pair in an answer has no UTF-8.
            file.write(text.encode("utf-8", "replace"))
    return Report(found, {"page": out, "markdown": out.with_suffix(".md"), "json": out.with_suffix(".json")})


def _refuse_others(out: Path) -> None:
    """Refuse to replace files that are no earlier report's: those beside the page were not named by the user."""
    document = out.with_suffix(".json")
    if document.is_file() and _format(document) == FORMAT:
        return
    for path in (out.with_suffix(".md"), document):
        if path.exists():
            raise UsageError(
                f"{path}: expected a new file or an earlier report's, found another one; name another page"
            )


def _format(path: Path) -> object:
    try:
        return read_json(path).get("format")
    except CheckpointError:
        return None


def _document(found: Verdict, inputs: Inputs) -> dict[str, Any]:
    return {
        "format": FORMAT,
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
