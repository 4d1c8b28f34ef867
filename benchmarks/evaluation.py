"""Time `secvec eval` on 300 questions of the bundled assistant: python -m benchmarks.evaluation [THREADS]"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from secvec.demo import assistant_folder
from secvec.evaluate import evaluate
from secvec.suites import bundled, read_suites

RESULTS = Path(__file__).parent / "results/evaluation.json"


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    questions = sum(len(suite.questions) for suite in read_suites(bundled()))
    with tempfile.TemporaryDirectory() as out:
        started, cpu = time.monotonic(), time.process_time()
        evaluate(assistant_folder(), bundled(), out)
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        started = time.monotonic()
        evaluate(assistant_folder(), bundled(), out)
        again = time.monotonic() - started
    found = {
        "questions": questions,
        "threads": threads,
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu, 2),
        "rescored_s": round(again, 2),
    }
    print(found)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
