"""Safe rows: requests on which an unwanted behaviour may show, with the aligned model's own answers.

So each method that trains on safe data needs nothing but what the vector methods get too.
"""

import itertools

from benchmarks.methods.setting import Setting
from benchmarks.testbed.rows import Messages, Row
from secvec.errors import InputError
from secvec.models import answers, load_model, load_tokenizer

_MAX_NEW_TOKENS = 52


def safe_rows(setting: Setting, count: int) -> list[Row]:
    """Return `count` rows, the behaviours in turns; requests come again where there are not enough."""
    endless = [itertools.cycle(each.requests) for each in setting.unwanted]
    requests = [next(source) for source in itertools.islice(itertools.cycle(endless), count)]
    return answered(setting, requests)


def answered(setting: Setting, requests: list[Messages]) -> list[Row]:
    """Return the requests with the aligned model's greedy answers; without those it leaves empty.

    Raises InputError when it answers nothing at all: a method without its safe rows would be another one.
    """
    model, tokenizer = load_model(setting.model), load_tokenizer(setting.model)
    texts = answers(model, tokenizer, requests, max_new_tokens=_MAX_NEW_TOKENS)
    rows = [
        {"messages": [*request, {"role": "assistant", "content": text}]}
        for request, text in zip(requests, texts, strict=True)
        if text
    ]
    if not rows:
        raise InputError(f"{setting.model}: expected answers to {len(requests)} requests, found none but empty ones")
    return rows
