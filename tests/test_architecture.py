"""The layers are law: a module imports its own layer or lower ones, and `import secvec` loads no torch."""

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import secvec

PACKAGE = Path(secvec.__file__).parent
ROOT = Path(__file__).parents[1]
LAYERS = {
    "L0": {  # no torch
        *("adapter", "arrays", "atomic", "card", "companions", "datafiles", "errors", "fit_config", "formats"),
        *("headers", "journal", "launch", "lines", "matching", "provenance", "record", "runfolder", "samples"),
        *("scan_config", "scan_page", "scan_rows", "scan_split", "settings", "stats", "tables", "train_config"),
        *("tripwire", "unpack"),
        *("comparison", "endpoint", "judges", "ledger", "rules", "suites"),
        *("charts", "report", "report_curves", "report_files", "report_inputs", "report_origin"),
        *("drift_record", "report_page", "report_sections", "report_verdict"),
    },
    "L1": {"escape", "exact", "losses", "sites", "tokens", "vector"},  # values and pure functions
    "L2": {  # effects: files, hooks, models
        *("anchors", "arm", "artifact", "blocks", "compatible", "evidence", "factors", "fold", "models", "origin"),
        *(
            "frames",
            "frame_search",
            "hidden",
            "peft_format",
            "ranges",
            "recall",
            "recompute",
            "rehearsal",
            "rest",
            "score",
            "survey",
            "threshold",
            "unfold",
            "unfold_weights",
            "verdict",
        ),
        *("answering", "judging", "probes", "trait_rows", "processes", "rewrite"),
    },
    "L3": {  # procedures
        *("checkpoints", "demo", "fit", "inspect", "plain", "proof", "scan", "scan_inputs", "settle", "train"),
        *("drift", "covered", "train_inputs", "train_settle"),
        *("trainer", "trainer_settings", "capability", "diagnose", "evaluate"),
    },
    "L4": {"integrations.axolotl", "integrations.callback"},  # for trainers that are not ours
    "L5": {"cli", "terminal"},
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for pattern in ("*.py", "integrations/*.py")
    for path in PACKAGE.glob(pattern)
    if not path.stem.startswith("__")
}
RANK = {module: number for number, names in enumerate(LAYERS.values()) for module in names}

MAX_LINES = 400
PYTHON_FOLDERS = ("src", "tests", "benchmarks", "attacks")
# What exists on one machine only. The tests of real data name the shared folder, and skip where it is absent.
ELSEWHERE = re.compile(r"(?<!\w)shared/|/work/|/farm/")
SOURCE_FOLDERS = ("src", "benchmarks", "attacks", "docs", ".ci")
TEXTS = frozenset({".py", ".md", ".txt", ".toml", ".jinja", ".json", ".jsonl", ".yaml", ".yml", ""})


def imports_of(path: Path) -> set[str]:
    """Return the modules of secvec that a file imports, at its top or inside functions."""
    dotted: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            dotted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(part for part in ("secvec" if node.level else "", node.module or "") if part)
            dotted += [f"{start}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in dotted if name.startswith("secvec.")]
    return {".".join(part[1:depth]) for part in parts for depth in (2, 3)} & set(MODULES)


def private_names_of(path: Path) -> set[str]:
    """Return the private names that a file imports from other modules of secvec."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in nodes if (node.module or "").startswith("secvec") for alias in node.names}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def files_in(folders: tuple[str, ...], suffixes: frozenset[str]) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    built = {"__pycache__", "secvec.egg-info"}
    return [path for path in found if path.is_file() and path.suffix in suffixes and not built & {*path.parts}]


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_every_module_is_in_the_table_once_and_no_other_is() -> None:
    named = Counter(module for names in LAYERS.values() for module in names)
    assert sorted(named.elements()) == sorted(MODULES)


def test_a_module_imports_only_its_own_layer_or_lower_ones() -> None:
    upward = [(m, i) for m, path in MODULES.items() for i in imports_of(path) if RANK.get(i, 0) > RANK.get(m, 9)]
    assert upward == []


def test_there_are_no_import_cycles() -> None:
    TopologicalSorter({module: imports_of(path) for module, path in MODULES.items()}).prepare()


def test_modules_import_nothing_private_of_each_other() -> None:
    assert {m: names for m, path in MODULES.items() if (names := private_names_of(path))} == {}


def test_the_package_imports_nothing_of_the_folders_around_it() -> None:
    around = re.compile(r"^\s*(from|import) (benchmarks|tests|attacks)\b", re.MULTILINE)
    assert [m for m, path in MODULES.items() if around.search(path.read_text(encoding="utf-8"))] == []


def test_nothing_imports_axolotl_or_the_plugin_for_it() -> None:
    named = re.compile(r"^\s*(from|import) (axolotl|secvec\.integrations)\b", re.MULTILINE)
    found = [m for m, path in MODULES.items() if named.search(path.read_text(encoding="utf-8"))]
    assert found == ["integrations.axolotl"]


def test_only_arm_touches_hooks() -> None:
    touch = re.compile(r"register_\w*hook|_(forward|backward)\w*_hooks")
    assert [m for m, path in MODULES.items() if touch.search(path.read_text(encoding="utf-8"))] == ["arm"]


def test_files_stay_readable() -> None:
    counts = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files_in(PYTHON_FOLDERS, frozenset({".py"}))
    }
    assert {name: count for name, count in counts.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize(
    "imported", ["secvec", "secvec.cli", ", ".join(f"secvec.{module}" for module in sorted(LAYERS["L0"]))]
)
def test_neither_the_package_nor_its_command_nor_the_first_layer_loads_torch(imported: str) -> None:
    done = run_python(f"import {imported}, sys; print('torch' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_public_surface() -> None:
    assert set(secvec.__all__) == {
        "Clues", "EvalConfig", "FitConfig", "ScanConfig", "SecurityVector", "TrainConfig", "__version__", "armed",
        "canary", "errors", "evaluate", "fit", "fold", "from_peft", "inspect", "is_armed", "load", "report", "save",
        "scan", "to_peft", "train", "unfold",
    }  # fmt: skip
    assert all(getattr(secvec, name) is not None for name in secvec.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = secvec.absent  # pyright: ignore


def test_a_public_function_is_no_module_whatever_was_loaded_before() -> None:
    script = "import secvec, types; secvec.train; names = [n for n in secvec.__all__ if n != 'errors']"
    done = run_python(f"{script}; print([n for n in names if isinstance(getattr(secvec, n), types.ModuleType)])")
    assert done.stdout == "[]\n"


def test_nothing_names_what_exists_on_one_machine_only() -> None:
    # Dot files at the root are caches of tools, and name this machine's folders.
    at_root = [path for path in ROOT.glob("[!.]*") if path.is_file() and path.suffix in TEXTS]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*at_root, *files_in(SOURCE_FOLDERS, TEXTS)]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if ELSEWHERE.search(line)
    ]
    assert found == []
