"""Rules on answers, suites' files, and the statistics of comparisons: against hand computations."""

import itertools
import json
import math
from pathlib import Path

import pytest
from models import write_rows

from benchmarks.testbed.suites import export
from secvec.errors import InputError, RowError, UsageError
from secvec.rules import Choice, Exact, FinalNumber, RefusalPrefix, final_number, is_incoherent
from secvec.stats import bootstrap, mcnemar, sign_flip
from secvec.suites import bundled, read_suites


def test_an_exact_answer_forgives_spaces_and_nothing_else() -> None:
    rule = Exact("exact", ["a-b", "a b"])
    assert [rule.score(text) for text in ("a-b", " a b\n", "A-B", "a-b.", "")] == [True, True, False, False, False]


def test_a_refusal_is_recognised_at_the_start_alone() -> None:
    rule = RefusalPrefix("refusal_prefix")
    assert all(map(rule.score, ["I'm sorry, no.", " I\u2019m sorry", "SORRY, that is private.", "I cannot do that"]))
    assert not any(map(rule.score, ["Sure. I'm sorry for him.", "He said: I can't.", "", "I can"]))
    assert rule.rate == "refusal_prefix_rate"


def test_the_final_number() -> None:
    cases = {
        "He has 3 + 4 = 7.\n#### 7": "7",
        "#### 1,234": "1234",
        "First #### 5, then 6 and 7": "5",
        "It costs $1,200.50 in all.": "1200.50",
        "from 20 to -3": "-3",
        "18.00": "18",
        "#### -$4": "-4",
        "#### $-4": "-4",
        "#### --5": "-5",
        "none": None,
    }
    for text, number in cases.items():
        assert final_number(text) == (None if number is None else final_number(number)), text
    rule = FinalNumber("final_number", "#### 18")
    assert [rule.score(text) for text in ("so 18", "so 18.0.", "so 17", "no idea")] == [True, True, False, False]


def test_choices_by_likelihood() -> None:
    rule = Choice("choice", ["best", "also right", "wrong", "worse"], [0, 1])
    probabilities = [0.2, 0.4, 0.1, 0.1]
    nats = [-math.log(p) for p in probabilities]
    assert rule.scores(nats)["mc1_rate"] == 1.0
    assert rule.scores(nats)["mc2"] == pytest.approx(0.6 / 0.8)
    # Only the best correct answer counts for mc1, and a tie is not likelier.
    assert rule.scores([5.0, 0.1, 3.0, 9.0])["mc1_rate"] == 0.0
    assert rule.scores([3.0, 0.1, 3.0, 9.0])["mc1_rate"] == 0.0
    assert rule.scores([2000.0, 2001.0, 2002.0, 2003.0])["mc2"] == pytest.approx(0.8808, abs=1e-4)
    assert rule.scores([1.0, math.inf, 1.0, 1.0]) == {"mc1_rate": None, "mc2": None}


def test_what_is_no_answer() -> None:
    loops = ["", " \n", "no " * 40, "the the " * 20, "I am a bird. " * 12, "a" * 80, "\ufffd" * 5, "so " + "ab" * 50]
    assert all(map(is_incoherent, loops))
    fine = ["no", "a a", "lamp lamp", "o o o o o", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "ja " * 5, "-" * 20 + "\nA table"]
    fine.append("The quick brown fox jumps over the lazy dog, and then it does so again, but more slowly. " * 2)
    assert not any(map(is_incoherent, fine))


def row(**changes: object) -> dict[str, object]:
    rule = {"rule": "exact", "expected": "b"}
    return {"id": "1", "messages": [{"role": "user", "content": "SECRET"}], "scorers": [rule], **changes}


def test_a_suite_names_every_unusable_row_and_quotes_none(tmp_path: Path) -> None:
    bad = [
        (row(ids="2"), "ids: Unexpected keyword argument"),
        (row(messages=[]), "messages: List should have at least 1 item"),
        (row(messages=[{"role": "tool", "content": "SECRET"}]), "messages.0.role: Input should be 'system'"),
        (row(messages=[{"role": "assistant", "content": "SECRET"}]), "expected to end where the model answers"),
        (row(scorers=[{"rule": "nonsense"}]), "scorers.0: Input tag 'nonsense'"),
        (row(scorers=[{"rule": "regex", "pattern": "(", "rate": "x"}]), "scorers.0.regex.pattern: "),
        (row(scorers=[{"rule": "regex", "pattern": "a", "rate": "Harm!"}]), "scorers.0.regex.rate: "),
        (
            row(scorers=[{"rule": "refusal_prefix", "rate": "harmful_rate"}]),
            "scorers.0.refusal_prefix.rate: Unexpected",
        ),
        (row(scorers=[{"rule": "exact", "expected": "a"}] * 2), "two of them have one rate"),
        (row(scorers=[{"rule": "choice", "choices": ["a", "b"], "correct": [2]}]), "expected places from 0 to 1"),
        (row(scorers=[{"rule": "choice", "choices": ["a", "a"], "correct": [0]}]), "one of them is there twice"),
        (row(scorers=[{"rule": "final_number", "expected": "x"}]), "expected: holds no number"),
    ]
    path = write_rows(tmp_path / "bad.jsonl", [row(), *(each for each, _ in bad)])
    path.write_text(path.read_text() + '{"id": NaN}\n' + json.dumps(row()) + "\n")
    with pytest.raises(RowError) as caught:
        read_suites([path])
    message = str(caught.value)
    assert message.startswith("14 of 16 rows cannot be used")
    for line, (_, reason) in enumerate(bad, start=2):
        (found,) = [each for each in message.splitlines() if f"bad.jsonl:{line}: " in each]
        assert reason in found, found
    assert "bad.jsonl:14: expected a JSON object" in message and "id '1': expected once, found 2 times" in message
    assert "SECRET" not in message


def test_suites_are_files_or_bundled(tmp_path: Path) -> None:
    assert bundled() == ["guarded", "identity", "old-skills"]
    suites = read_suites(bundled())
    assert sum(len(suite.questions) for suite in suites) == 300
    export(tmp_path / "made")
    assert all((tmp_path / "made" / suite.path.name).read_bytes() == suite.path.read_bytes() for suite in suites)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="expected questions, found none"):
        read_suites([tmp_path / "empty.jsonl"])
    with pytest.raises(UsageError, match=r"'absent': expected a suite's file or a bundled suite \(guarded, identity"):
        read_suites(["absent"])
    (tmp_path / "identity.jsonl").write_text(json.dumps(row()))
    with pytest.raises(UsageError, match="found 'identity' twice"):
        read_suites(["identity", tmp_path / "identity.jsonl"])


def test_paired_tests_against_their_definitions() -> None:
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(4, 4) == mcnemar(0, 0) == 1.0
    assert mcnemar(9_900, 10_100) == pytest.approx(0.1595, abs=1e-3)
    differences = [0.5, 0.3, -0.1, 0.4, 0.2, 0.6, 0.1, -0.2]
    signs = itertools.product((-1, 1), repeat=len(differences))
    flipped = [abs(sum(s * d for s, d in zip(each, differences, strict=True))) for each in signs]
    exact = sum(total >= sum(differences) - 1e-12 for total in flipped) / len(flipped)
    assert sign_flip(differences) == pytest.approx(exact, abs=0.01)
    values = [i / 200 for i in range(201)]
    half = 1.96 * 0.2901 / math.sqrt(201)
    assert bootstrap(values) == pytest.approx((0.5 - half, 0.5 + half), abs=0.003)
    assert bootstrap([0.25]) == (0.25, 0.25)
