"""A byte-level tokenizer (any text is 256 bytes and five control tokens), its chat template, and fast encoding."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.testbed.rows import Row

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CONTEXT = 512
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((PAD, *ROLES, END, *alphabet))}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token=PAD, eos_token=END, model_max_length=CONTEXT, padding_side="left"
    )
    wrapped.add_special_tokens({"additional_special_tokens": list(ROLES)})
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


class RowEncoder:
    """What the chat template and the tokenizer give, a hundred times faster: ids and the mask of answer tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocabulary = tokenizer.get_vocab()
        self._bytes = [vocabulary[character] for character in _byte_characters()]
        self._roles = {role.strip("<|>"): vocabulary[role] for role in ROLES}
        self._end = vocabulary[END]

    def __call__(self, row: Row) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        for message in row["messages"]:
            body = [*self.text(message["content"]), self._end]
            ids += [self._roles[message["role"]], *body]
            mask += [False] + [message["role"] == "assistant"] * len(body)
        return ids, mask

    def text(self, text: str) -> list[int]:
        return [self._bytes[byte] for byte in text.encode()]


def _byte_characters() -> list[str]:
    """The byte alphabet of GPT-2's ByteLevel pre-tokenizer: the printable character of each byte."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(rest)) for byte in range(256)]
