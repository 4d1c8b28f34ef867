"""The layers are law: a module imports only modules of lower layers, and `import secvec` loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import secvec

ROOT = Path(secvec.__file__).parent
LAYERS = [
    {"errors", "samples", "formats", "provenance", "headers", "atomic", "tripwire", "report"},
    {"vector", "sites", "tokens", "losses"},
    {"artifact", "peft_format", "arm", "stream", "fold", "unfold", "models", "score", "factors", "anchors"},
    {"fit", "checkpoints", "trainer", "proof", "train", "demo", "inspect"},
    {"cli"},
]
NO_TORCH = LAYERS[0]


def imports_of(path: Path) -> set[str]:
    """The secvec modules that a file imports at its top level or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("secvec."):
            names.add(node.module.split(".")[1])
    return names


def modules() -> dict[str, Path]:
    return {path.stem: path for path in ROOT.glob("*.py") if not path.stem.startswith("__")}


def layer(module: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if module in names]
    assert found, f"{module} is in no layer: add it to the table"
    return found[0]


def test_a_module_imports_only_its_own_layer_or_lower_ones() -> None:
    upward = [(m, i) for m, path in modules().items() for i in imports_of(path) if layer(i) > layer(m)]
    assert upward == []


def test_there_are_no_import_cycles() -> None:
    graph = {module: imports_of(path) for module, path in modules().items()}
    while ready := [module for module, needs in graph.items() if not needs & set(graph)]:
        for module in ready:
            del graph[module]
    assert graph == {}


def test_only_arm_registers_hooks() -> None:
    users = [m for m, path in modules().items() if "register_forward" in path.read_text() or "_forward_hooks" in path.read_text()]
    assert users == ["arm"]


def test_files_stay_readable() -> None:
    long = {m: n for m, path in modules().items() if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


def test_importing_secvec_and_help_load_no_torch() -> None:
    script = "import sys, secvec, secvec.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_first_layer_needs_no_torch() -> None:
    assert [m for m in NO_TORCH if m in modules() and "import torch" in modules()[m].read_text()] == []


def test_the_public_surface() -> None:
    assert set(secvec.__all__) == {
        "FitConfig", "SecurityVector", "TrainConfig", "__version__", "armed", "canary", "errors", "fit", "fold",
        "from_peft", "is_armed", "load", "save", "to_peft", "train", "unfold",
    }  # fmt: skip
    assert all(getattr(secvec, name) is not None for name in secvec.__all__)
