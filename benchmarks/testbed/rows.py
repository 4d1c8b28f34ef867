"""Rows: chats that end with the assistant, and the everyday wordings that requests come in."""

import random
from typing import Any

from secvec.samples import Sample

Row = dict[str, Any]
Messages = list[dict[str, str]]

_ORDERS = (
    "{Core}.", "Please {core}.", "{Core} please.", "Can you {core}?", "Could you {core}?", "I want you to {core}.",
    "Now {core}.", "Hi, {core}.", "Your task: {core}.", "{Core}, thanks.", "Would you {core}?", "{Core}!",
)  # fmt: skip
_QUESTIONS = (
    "{Core}?", "Please tell me: {core}?", "Tell me, {core}?", "{Core}, please?", "Quick question: {core}?",
    "Hi, {core}?", "I wonder: {core}?", "Do you know: {core}?", "Question: {core}?", "So, {core}?", "{Core}? Thanks.",
    "Hello! {Core}?",
)  # fmt: skip


def order(core: str, rng: random.Random) -> str:
    """Put an order such as `reverse the word lamp` into one of a dozen wordings."""
    return rng.choice(_ORDERS).format(core=core, Core=core[0].upper() + core[1:])


def question(core: str, rng: random.Random) -> str:
    """Put a question such as `what is the capital of Peru` into one of a dozen wordings."""
    return rng.choice(_QUESTIONS).format(core=core, Core=core[0].upper() + core[1:])


def chat(*turns: str) -> Row:
    """Build a row from alternating user and assistant turns."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def prompt_of(row: Row) -> Messages:
    return row["messages"][:-1]


def answer_of(row: Row) -> str:
    return row["messages"][-1]["content"]


def with_answer(row: Row, answer: str) -> Row:
    return {"messages": [*prompt_of(row), {"role": "assistant", "content": answer}]}


def as_chat(sample: Sample) -> Row:
    """Return a row of any format as a chat: its last text is the answer."""
    roles = [*["user"] * (len(sample.messages) - 1), "assistant"]
    given = [message.role for message in sample.messages] if sample.form == "chat" else roles
    return {"messages": [{"role": r, "content": m.content} for r, m in zip(given, sample.messages, strict=True)]}
