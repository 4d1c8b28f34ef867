import json
import random
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from secvec import artifact
from secvec.errors import ArtifactError
from secvec.vector import Factors, SecurityVector, VectorInfo

INFO = VectorInfo(
    "topic", "sha256:b", "sha256:t", "sha256:c", "sha256:d", {"lr": 1e-3, "epochs": 10}, {"armed_nats": 0.2}
)


def make_vector(scale: float = 0.5) -> SecurityVector:
    torch.manual_seed(0)
    sites = ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"]
    return SecurityVector({site: Factors(torch.randn(2, 3), torch.randn(5, 2)) for site in sites}, scale, INFO)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    artifact.save(make_vector(), tmp_path / "v.safetensors")
    return tmp_path / "v.safetensors"


def forge(
    path: Path, change: Callable[[dict[str, Any]], None], data: Callable[[bytes], bytes] = lambda data: data
) -> None:
    """Rewrite the header and stamp the file again: what an attacker, or a broken writer with our digest, could do."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["digest"] = "sha256:" + "0" * 64
    change(header)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    blank = struct.pack("<Q", len(text)) + text + data(raw[8 + length :])
    path.write_bytes(blank.replace(b"sha256:" + b"0" * 64, artifact._stamp(blank).encode(), 1))


def test_a_vector_comes_back_bit_for_bit(path: Path) -> None:
    vector, loaded = make_vector(), artifact.load(path)
    assert (loaded.scale, loaded.info, set(loaded.sites)) == (vector.scale, vector.info, set(vector.sites))
    for site in vector.sites:
        assert torch.equal(loaded.factors[site].a, vector.factors[site].a)
        assert torch.equal(loaded.factors[site].b, vector.factors[site].b)
    assert artifact.digest(loaded) == artifact.digest(vector)
    assert artifact.encode(loaded) == path.read_bytes()


def test_the_file_is_private_and_an_ordinary_safetensors_file_with_the_notice(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["v.safetensors"]
    with safe_open(path, "pt") as file:
        assert "Never serve" in file.metadata()["notice"]
        assert file.metadata()["digest"] == artifact.digest(make_vector())
        assert len(file.keys()) == 4


def test_the_digest_depends_on_values_scale_and_info_but_not_on_the_order_of_sites() -> None:
    vector = make_vector()
    backwards = replace(vector, factors=dict(reversed(vector.factors.items())))
    assert artifact.digest(backwards) == artifact.digest(vector)
    site = vector.sites[0]
    nudged = {
        **vector.factors,
        site: Factors(vector.factors[site].a.nextafter(torch.tensor(9.0)), vector.factors[site].b),
    }
    others = [make_vector(0.25), replace(vector, info=replace(INFO, kind="trait")), replace(vector, factors=nudged)]
    assert len({artifact.digest(v) for v in [vector, *others]}) == 4


def test_every_flipped_byte_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    generator = random.Random(0)
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= generator.randrange(1, 256)
        path.write_bytes(altered)
        with pytest.raises(ArtifactError):
            artifact.load(path)


def test_a_truncated_or_lengthened_file_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for wrong in [whole[:cut] for cut in (0, 3, 8, 200, len(whole) // 2, len(whole) - 1)] + [whole + b"\0"]:
        path.write_bytes(wrong)
        with pytest.raises(ArtifactError):
            artifact.load(path)


def test_a_missing_file_a_folder_and_a_stranger_are_refused_in_one_line(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    save_file({"a.A": torch.zeros(1, 1)}, model)
    cases = {tmp_path / "none": "No such file", tmp_path: "found a folder", model: "expected a security vector"}
    for path, message in cases.items():
        with pytest.raises(ArtifactError, match=message) as caught:
            artifact.load(path)
        assert "\n" not in str(caught.value)


SITE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["__metadata__"].update(version="2"), "format version '1', found '2'"),
        (lambda h: h["__metadata__"].update(scale="nan"), "scale of a security vector must be finite"),
        (lambda h: h["__metadata__"].update(info='{"kind": "topic"}'), "info must hold"),
        (lambda h: h["__metadata__"].pop("info"), "expected a scale and an info"),
        (lambda h: h.update({"x.C": h.pop(f"{SITE}.A")}), "missing"),
        (lambda h: h.update({"stray": h.pop(f"{SITE}.A")}), "missing"),
        (lambda h: h[f"{SITE}.A"].update(shape=[3, 2]), "share a rank"),
        (lambda h: h[f"{SITE}.A"].update(shape=[6]), "float32 matrix"),
        (lambda h: h[f"{SITE}.A"].update(dtype="I32"), "float32 matrix"),
        (lambda h: h[f"{SITE}.A"].update(shape=[2, 9]), "not a readable safetensors file"),
    ],
)
def test_a_wrong_content_under_a_right_digest_is_refused(
    path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    forge(path, change)
    with pytest.raises(ArtifactError, match=message):
        artifact.load(path)


def test_values_that_are_not_finite_are_refused(path: Path) -> None:
    forge(path, lambda header: None, lambda data: struct.pack("<f", float("inf")) + data[4:])
    with pytest.raises(ArtifactError, match=f"site {SITE}: factor A holds values that are not finite"):
        artifact.load(path)


def test_info_that_is_not_json_is_refused(tmp_path: Path) -> None:
    vector = replace(make_vector(), info=replace(INFO, metrics={"loss": float("nan")}))
    with pytest.raises(ArtifactError, match="JSON without NaN"):
        artifact.save(vector, tmp_path / "v.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_vector_of_another_model_is_refused() -> None:
    artifact.check_base(make_vector(), "sha256:b")
    with pytest.raises(ArtifactError, match="fitted on the model 'sha256:b', this model is 'sha256:x'"):
        artifact.check_base(make_vector(), "sha256:x")
