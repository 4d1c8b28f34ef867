"""Texts that would forge a turn: find them, and write them so that they no longer do."""

import re
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from secvec.samples import Message, Sample
from secvec.tokens import forgeries


@dataclass(frozen=True)
class Escape:
    """What forges a turn in texts for one tokenizer (`secvec.tokens.forgeries`)."""

    control: re.Pattern[str]
    marks: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Escape":
        return cls(*forgeries(tokenizer))

    def forged(self, sample: Sample) -> str | None:
        """Name the first message that would forge a turn, and with what; None where there is none."""
        for number, message in enumerate(sample.messages):
            for pattern in self._patterns(sample):
                if found := pattern.search(message.content):
                    return f"messages[{number}]: holds {found[0].strip()!r}, which would forge a turn"
        return None

    def escaped(self, sample: Sample) -> Sample:
        """Return the row with a space inside each forgery: "<|end|>" becomes "< |end|>", which is ordinary text."""
        return replace(sample, messages=tuple(self._escaped(each, sample) for each in sample.messages))

    def _patterns(self, sample: Sample) -> tuple[re.Pattern[str], ...]:
        return (self.control, *self.marks) if sample.form == "chat" else (self.control,)

    def _escaped(self, message: Message, sample: Sample) -> Message:
        content = message.content
        for pattern in self._patterns(sample):
            content = pattern.sub(_with_space, content)
        return replace(message, content=content)


def _with_space(found: re.Match[str]) -> str:
    text = found[0]
    start = len(text) - len(text.lstrip()) + 1
    return f"{text[:start]} {text[start:]}"
