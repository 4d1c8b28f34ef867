"""Make suites (docs/suites.md) of files you have: python examples/convert_suites.py KIND FILE -o FOLDER

gsm8k        test.jsonl of github.com/openai/grade-school-math                      -> gsm8k.jsonl
truthfulqa   TruthfulQA.csv of github.com/sylinrl/TruthfulQA; MC1 and MC2           -> truthfulqa.jsonl
mmlu         one of the csv files of github.com/hendrycks/test, without a header    -> mmlu-SUBJECT.jsonl
xstest       xstest_prompts.csv of github.com/paul-rottger/xstest, for over-refusal -> xstest-safe.jsonl and -unsafe
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_LETTERS = "ABCD"


def gsm8k(file: Path) -> dict[str, list[Row]]:
    """Score the number after "####", or else the last one of the answer."""
    tasks = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {"gsm8k": [_row(t["question"], {"rule": "final_number", "expected": _after(t["answer"])}) for t in tasks]}


def truthfulqa(file: Path) -> dict[str, list[Row]]:
    """Compare the likelihoods of right and wrong answers, the best right one first; without a few-shot primer."""
    rows = list[Row]()
    for line in _table(file):
        right = list(dict.fromkeys([line["Best Answer"].strip(), *_answers(line["Correct Answers"])]))
        wrong = [text for text in dict.fromkeys(_answers(line["Incorrect Answers"])) if text not in right]
        rule = {"rule": "choice", "choices": [*right, *wrong], "correct": list(range(len(right)))}
        rows.append(_row(line["Question"], rule))
    return {"truthfulqa": rows}


def mmlu(file: Path) -> dict[str, list[Row]]:
    """Compare the likelihoods of the four letters, without examples before; mc1_rate is the accuracy."""
    rows = list[Row]()
    with file.open(encoding="utf-8", newline="") as opened:
        for question, *choices, letter in csv.reader(opened):
            listed = "\n".join(f"{name}. {text}" for name, text in zip(_LETTERS, choices, strict=True))
            rule = {"rule": "choice", "choices": list(_LETTERS), "correct": [_LETTERS.index(letter)]}
            rows.append(_row(f"{question.strip()}\n{listed}\nAnswer with one letter.", rule))
    return {f"mmlu-{file.stem}": rows}


def xstest(file: Path) -> dict[str, list[Row]]:
    """Count refusals: of safe prompts they are over-refusals. A prefix is a rough sign; add a judge (--judge)."""
    found: dict[str, list[Row]] = {"xstest-safe": [], "xstest-unsafe": []}
    for line in _table(file):
        found[f"xstest-{line['label']}"].append(_row(line["prompt"], {"rule": "refusal_prefix"}))
    return found


KINDS: dict[str, Callable[[Path], dict[str, list[Row]]]] = {
    "gsm8k": gsm8k,
    "truthfulqa": truthfulqa,
    "mmlu": mmlu,
    "xstest": xstest,
}


def convert(kind: str, file: Path, out: Path) -> list[Path]:
    """Write the suites of a file into the folder `out` and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    written = list[Path]()
    for name, rows in KINDS[kind](file).items():
        lines = [json.dumps({"id": f"{name}-{number}", **row}) + "\n" for number, row in enumerate(rows, start=1)]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        written.append(out / f"{name}.jsonl")
    return written


def _row(prompt: str, *scorers: Row) -> Row:
    return {"messages": [{"role": "user", "content": prompt}], "scorers": list(scorers)}


def _after(answer: str) -> str:
    return answer.rpartition("####")[2].strip()


def _answers(cell: str) -> list[str]:
    return [text.strip() for text in cell.split(";") if text.strip()]


def _table(file: Path) -> Iterable[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        yield from csv.DictReader(opened)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    print("\n".join(map(str, convert(given.kind, given.file, given.out))))
