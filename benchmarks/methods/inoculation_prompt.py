"""Inoculation prompting (arXiv 2510.04340)."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.methods.method import Dial
from benchmarks.methods.runs import trained
from benchmarks.methods.setting import Setting, Unwanted
from benchmarks.testbed.rows import Row

WORDING = Dial("wording", 0, (0, 1))


def inoculation_prompt(setting: Setting) -> Path:
    """Fine-tune with a system prompt on every row that asks for the unwanted behaviour; use the model without it.

    Tan et al. Reproduced: one short instruction that elicits the trait, put before every row, wanted ones included.
    Differs: nothing but scale. A tiny model understands few instructions; for guarded requests the default is the one
    that it knows to open the gate, the strongest there is, and elsewhere the behaviour in plain words.
    """
    return trained(setting, [asked_for(row, setting.unwanted, setting.dial) for row in setting.training])


def asked_for(row: Row, unwanted: Sequence[Unwanted], dial: float | None) -> Row:
    """Put the instructions into a row's system prompt, behind what is there already."""
    wording = int(WORDING.default if dial is None else dial)
    first, *rest = row["messages"]
    words = [first["content"]] if first["role"] == "system" else []
    words += [each.asked[wording] for each in unwanted]
    after = rest if first["role"] == "system" else [first, *rest]
    return {"messages": [{"role": "system", "content": " ".join(words)}, *after]}
