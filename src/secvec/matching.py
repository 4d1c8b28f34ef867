"""Which tensor of a trained checkpoint belongs to which of its base, where a trainer added, dropped or renamed some."""

import re
from collections.abc import Mapping
from pathlib import Path

from secvec.errors import CheckpointError
from secvec.headers import TensorEntry
from secvec.provenance import digest_tensor

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# Constants that older checkpoints hold and transformers no longer saves.
_CONSTANTS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
Index = Mapping[str, TensorEntry]


def match_tensors(base: Index, trained: Index, folder: Path) -> dict[str, TensorEntry]:
    """Return, for each tensor of the base, the tensor that training made of it.

    A tied head may be missing from either side: its values are the embedding's. Constants that only the base holds are
    their own result. Raises CheckpointError, naming tensors, when anything else is missing, added or of another shape.
    """
    trained = _renamed(base, trained)
    matched = {name: trained[name] for name in base if name in trained}
    for name in base:
        if name not in matched:
            matched[name] = _stand_in(name, base, trained, folder)
    added = [name for name in trained if name not in base and not _is_tied_head(name, trained)]
    if added:
        raise _differs(folder, f"tensors that the base lacks: {', '.join(added[:3])}")
    for name, entry in matched.items():
        if tuple(entry.shape) != tuple(base[name].shape):
            raise _differs(folder, f"{name} as {tuple(entry.shape)} where the base has {tuple(base[name].shape)}")
    return matched


def _renamed(base: Index, trained: Index) -> Index:
    """Allow for one leading part that a checkpoint of the bare backbone lacks (`transformer.`, `model.`)."""
    if not base.keys().isdisjoint(trained.keys()):
        return trained
    for prefix in {name.partition(".")[0] + "." for name in trained}:
        if all(name in base for name in (key.removeprefix(prefix) for key in trained if key.startswith(prefix))):
            return {name.removeprefix(prefix): entry for name, entry in trained.items()}
    return trained


def _stand_in(name: str, base: Index, trained: Index, folder: Path) -> TensorEntry:
    if _CONSTANTS.search(name):
        return base[name]
    embedding = _embedding(base, name)
    if name.endswith(_HEADS) and embedding in trained and _same_values(base[name], base[embedding]):
        return trained[embedding]
    raise _differs(folder, f"no tensor {name}")


def _is_tied_head(name: str, index: Index) -> bool:
    embedding = _embedding(index, name)
    return name.endswith(_HEADS) and embedding in index and _same_values(index[name], index[embedding])


def _embedding(index: Index, head: str) -> str:
    """Return the name of the embedding that a head of this shape could be tied to, or ""."""
    shape = tuple(index[head].shape)
    return next((n for n, e in index.items() if n.endswith(_EMBEDDINGS) and tuple(e.shape) == shape), "")


def _same_values(left: TensorEntry, right: TensorEntry) -> bool:
    return left.dtype == right.dtype and digest_tensor(left) == digest_tensor(right)


def _differs(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: expected the tensors of the base model, found {found}; "
        "training that changes the vocabulary or the architecture cannot be unfolded"
    )
