from pathlib import Path

import pytest
import torch
from checkpoints import llama, random_vector, save_model
from safetensors.torch import load_file

from secvec.fold import fold
from secvec.provenance import digest_model
from secvec.unfold import unfold


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def weight_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [False, True])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, shards: bool) -> None:
    model = llama(dtype=dtype)
    base = save_model(model, tmp_path / "base", shards=shards)
    vector = random_vector(model, base=digest_model(base))
    fold(base, [vector], tmp_path / "folded")
    report = unfold(tmp_path / "folded", tmp_path / "back")
    assert weight_bytes(tmp_path / "back") == weight_bytes(base)
    assert (report.sites_changed, report.vector_share) == (0, 1.0)
