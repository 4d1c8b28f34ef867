"""The examples on the real files that they are for; each skips where its file is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from secvec.rules import Choice, FinalNumber
from secvec.suites import read_suites

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
FILES = [
    ("gsm8k", "gsm8k/test.jsonl", {"gsm8k": 1319}),
    ("truthfulqa", "truthfulqa/TruthfulQA.csv", {"truthfulqa": 817}),
    ("mmlu", "mmlu/test/anatomy_test.csv", {"mmlu-anatomy_test": 135}),
    ("xstest", "xstest/xstest_prompts.csv", {"xstest-safe": 250, "xstest-unsafe": 200}),
]


@pytest.mark.parametrize(("kind", "name", "counts"), FILES)
def test_real_files_become_suites(kind: str, name: str, counts: dict[str, int], tmp_path: Path) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"needs {name}, which is not here")
    script = [sys.executable, ROOT / "examples/convert_suites.py", kind, DATA / name, "-o", tmp_path]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    suites = read_suites(done.stdout.splitlines())
    found = {suite.name: len(suite.questions) for suite in suites}
    assert found.keys() == counts.keys() and all(found[each] >= counts[each] * 0.95 for each in counts)
    (rule, *_) = suites[0].questions[0].scorers
    if isinstance(rule, FinalNumber):
        assert rule.score("So she makes 9 * 2 = $18 a day.")
    if isinstance(rule, Choice):
        assert len(rule.choices) > len(rule.correct) >= 1
