"""Refuse a vector that belongs to another model, tokenizer or chat template."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secvec.artifact import check_base
from secvec.errors import ArtifactError
from secvec.peft_format import UNKNOWN
from secvec.provenance import digest_chat_template, digest_tokenizer
from secvec.vector import SecurityVector


def check_vector(vector: SecurityVector, folder: Path, tokenizer: PreTrainedTokenizerBase, *, base_digest: str) -> None:
    """Refuse a vector of another model, tokenizer or chat template: it would explain other tokens than it should.

    base_digest: of the model in `folder`. Raises ArtifactError.
    """
    check_base(vector, base_digest)
    template: Any = tokenizer.chat_template
    here = {"tokenizer": digest_tokenizer(folder), "chat_template": digest_chat_template(template)}
    there = {"tokenizer": vector.info.tokenizer, "chat_template": vector.info.chat_template}
    for name, found in here.items():
        if there[name] not in (found, UNKNOWN):
            raise ArtifactError(
                f"the vector was fitted with the {name.replace('_', ' ')} {there[name]!r}, this model's is {found!r}; "
                "restore that one, or fit the vector again"
            )
