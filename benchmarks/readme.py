"""Write the README's tables from the committed results: python -m benchmarks.readme [--check]

benchmarks/results/demo-SEED.json are `runs/demo/results.json` of `secvec demo --seed SEED`, and speed.json is from
`python -m benchmarks.speed --json`; protection/runs.jsonl is from `python -m benchmarks.protection run`, large.jsonl
beside it from the commands in testbed-large.md; stories.jsonl is from `python -m benchmarks.stories`, elsewhere.jsonl
from `python -m benchmarks.elsewhere`; gpu-*.json are from `python -m benchmarks.gpu --json`.
"""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import stories
from benchmarks.elsewhere import bench as elsewhere
from benchmarks.gpu import measure as gpu
from benchmarks.protection.lines import read_lines
from benchmarks.protection.summary import rivals, summary, wear

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
LARGE_LR = {"full": 1e-4}
MODELS = ("aligned", "plain", "defended")
RATES = {
    "unwanted_rate": "complies with guarded requests (unwanted)",
    "refusal_rate": "refuses guarded requests",
    "new_skill": "new skill, exact",
    "old_skills": "old skills, exact",
}


def demo_table() -> str:
    """Return the demo's rates: each seed's, with the 95 % interval of the first."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("demo-*.json"))]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    lines = [
        f"| seeds {seeds}; in brackets the 95 % interval of seed {runs[0]['seed']} | n | aligned | plain | defended |",
        "|---|---|---|---|---|",
    ]
    for rate, name in RATES.items():
        cells = [_cell(runs, model, rate) for model in MODELS]
        lines.append(f"| {name} | {runs[0]['n'][rate]} | {' | '.join(cells)} |")
    totals = ", ".join(f"{run['seconds']['total']:.0f}" for run in runs)
    lines += ["", f"`make demo` took {totals} s in all on two cores ({_phases(runs)})."]
    return "\n".join(lines)


def _cell(runs: list[dict[str, Any]], model: str, rate: str) -> str:
    low, high = runs[0]["ci95"][model][rate]
    return f"{', '.join(f'{run[model][rate]:.3f}' for run in runs)} ({low:.3f}-{high:.3f})"


def _phases(runs: list[dict[str, Any]]) -> str:
    names = [name for name in runs[0]["seconds"] if name != "total"]
    return ", ".join(f"{name.replace('_', ' ')} {mean(run['seconds'][name] for run in runs):.0f} s" for name in names)


def speed_table() -> str:
    """Return the rows of the speed report: medians, and the ratio of ours to theirs."""
    if not (RESULTS / "speed.json").exists():
        return "Not measured yet."
    rows = json.loads((RESULTS / "speed.json").read_text())
    lines = ["| what | against | ours | theirs | unit | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (
            row["what"],
            row["against"],
            f"{row['ours']:g}",
            f"{row['theirs']:g}",
            row["unit"],
            f"{row['ratio']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def protection_table() -> str:
    """Return ours on every behaviour that it was run on."""
    return summary(read_lines([RESULTS / "protection/runs.jsonl"]))


def wear_table() -> str:
    """Return ours in trainings that are harder than the usual one."""
    return wear(read_lines([RESULTS / "protection/runs.jsonl"]))


def rivals_table() -> str:
    """Return all methods on the behaviours that the rivals were run on."""
    return rivals(read_lines([RESULTS / "protection/runs.jsonl"]), ("guarded", "facts", "caps"))


def large_table() -> str:
    """Return the larger assistant's table: ours on every behaviour, and beside the published method."""
    lines = read_lines([RESULTS / "protection/large.jsonl"])
    both = rivals(lines, ("guarded", "facts", "sums", "caps"), LARGE_LR)
    return f"{summary(lines, LARGE_LR)}\n\n{both}"


def stories_table() -> str:
    """Return the story model's table, references first."""
    lines = stories.read(RESULTS / "stories.jsonl")
    order = [(behaviour, method) for behaviour in stories.BEHAVIOURS for method in stories.METHOD_NAMES]
    return stories.table(sorted(lines, key=lambda line: order.index((line["behaviour"], line["method"]))))


def elsewhere_table() -> str:
    """Return what was measured in another small world."""
    lines = elsewhere.read(RESULTS / "elsewhere.jsonl")
    order = list(elsewhere.BEHAVIOURS)
    return elsewhere.table(sorted(lines, key=lambda line: order.index(line["behaviour"])))


def gpu_table() -> str:
    """Return what was measured on a GPU, by all runs of `python -m benchmarks.gpu`: the last of several."""
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]
    rows = [gpu.Measured(**row) for document in documents for row in document["rows"]]
    latest = {(row.model, row.what, row.context, row.way): row for row in rows if row.seconds is not None}
    return gpu.table(list(latest.values())).strip()


def filled(text: str) -> str:
    """Return the README with its tables made anew."""
    tables = {
        "demo": demo_table,
        "protection": protection_table,
        "wear": wear_table,
        "large": large_table,
        "rivals": rivals_table,
        "stories": stories_table,
        "elsewhere": elsewhere_table,
        "speed": speed_table,
        "gpu": gpu_table,
    }
    for name, table in tables.items():
        mark = f"<!-- {name} table"
        before, rest = text.split(mark, 1)
        comment, rest = rest.split("\n", 1)
        _, after = rest.split("<!-- end -->", 1)
        text = f"{before}{mark}{comment}\n{table()}\n<!-- end -->{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    new = filled(readme.read_text())
    if "--check" in sys.argv and new != readme.read_text():
        sys.exit("README.md differs from its results; run python -m benchmarks.readme")
    readme.write_text(new)
