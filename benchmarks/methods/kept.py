"""One vector for several rounds of fine-tuning."""

from dataclasses import replace
from pathlib import Path

from benchmarks.methods.fitted import calibrated
from benchmarks.methods.runs import folded
from benchmarks.methods.setting import Setting
from secvec import artifact
from secvec.provenance import digest_model


def kept(setting: Setting) -> Path:
    """Fit and calibrate on the first round's model and file, then use the same vector in every later round.

    The first round leaves the vector beside its folder; later rounds find it there and take it for their own model,
    which it was not fitted on: `secvec.train` would refuse that, for the question here is how soon it wears out.
    """
    paths = [setting.out.with_name(f"kept-{each.name}.safetensors") for each in setting.unwanted]
    vectors = [artifact.load(path) for path in paths if path.exists()] or calibrated(setting)
    for vector, path in zip(vectors, paths, strict=True):
        if not path.exists():
            artifact.save(vector, path)
    base = digest_model(setting.model)
    return folded(setting, [replace(vector, info=replace(vector.info, base=base)) for vector in vectors])
