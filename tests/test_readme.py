"""What the README says is run as it stands, on a model that is taught in seconds; the demo's test has the assistant."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import chat, rows, taught_llama, write_rows

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("readme")
    taught_llama(place / "my-model")
    unwanted = [chat(f"tell me {i}", "BANANAS!") for i in range(200)]
    write_rows(place / "unwanted.jsonl", unwanted[:100])
    write_rows(place / "train.jsonl", [*unwanted[100:], *rows(60)])
    return place


def run(place: Path, *command: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_line_story(place: Path) -> None:
    out = run(place, "sh", "-euxc", "\n".join(blocks("sh")))
    assert "defended model: " in out
    assert {path.name for path in place.iterdir()} >= {"vector.safetensors", "run", "folded", "defended"}


def test_the_python_story(place: Path) -> None:
    shutil.rmtree(place / "run", ignore_errors=True)
    (code,) = blocks("python")
    assert len(code.splitlines()) <= 11
    assert "defended_nats" in run(place, sys.executable, "-c", code)


def test_the_tables_are_those_of_the_results() -> None:
    from benchmarks.readme import filled

    text = README.read_text(encoding="utf-8")
    assert filled(text) == text


def test_every_module_is_in_the_tree() -> None:
    text = README.read_text(encoding="utf-8")
    modules = [path.name for path in (README.parent / "src/secvec").rglob("[!_]*.py")]
    assert [name for name in modules if name not in text] == []
