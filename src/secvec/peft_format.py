"""Read and write PEFT's LoRA folders, for interoperation: only their format is used, never their arming.

Scaling follows PEFT: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv 2312.03732).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from secvec.artifact import NOTICE
from secvec.atomic import atomic_write
from secvec.companions import TRANSPOSED_MODELS
from secvec.errors import ArtifactError, SiteError
from secvec.provenance import digest_file, digest_model, versions
from secvec.ranges import new_folder
from secvec.sites import layer_of
from secvec.tripwire import read_json
from secvec.vector import Factors, SecurityVector, VectorInfo

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_(?P<factor>[AB])\.weight")
# Options under which the effective change is more, or something else, than scale * B @ A at linear layers.
_BEYOND_LORA = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "use_qalora", "alora_invocation_tokens"),
    *("layer_replication", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# These initialisations subtract something from the base's weights, so that A and B alone are not the change.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
UNKNOWN = "unknown"


def from_peft(folder: str | Path, *, info: VectorInfo | None = None) -> SecurityVector:
    """Read a PEFT LoRA folder (adapter_config.json, adapter_model.safetensors) as a security vector.

    info: where the vector comes from. Without it the base is the model folder that the adapter names, which must then
    be on this disk. Raises ArtifactError for anything but plain LoRA on linear layers inside the numbered blocks.
    """
    folder = Path(folder)
    config = _plain_config(folder)
    factors = _factors(folder)
    scales = {site: _scale(config, site, pair.rank, folder) for site, pair in factors.items()}
    scale = Counter(scales.values()).most_common(1)[0][0]
    even = {site: _rescaled(pair, scales[site], scale) for site, pair in factors.items()}
    return SecurityVector(even, scale, info if info is not None else _info(config, folder))


def to_peft(vector: SecurityVector, folder: str | Path, base_model: str) -> None:
    """Write a vector as a PEFT LoRA folder, which must be new; mode 0600, like the vector's own file.

    base_model: what the adapter names as its base, a folder or a hub id.
    """
    tensors = {
        f"base_model.model.{site}.lora_{name}.weight": tensor.detach().cpu().contiguous()
        for site, pair in vector.factors.items()
        for name, tensor in (("A", pair.a), ("B", pair.b))
    }
    config = json.dumps(_config(vector, base_model), indent=2).encode()
    with new_folder(Path(folder).absolute()) as partial:
        for name, data in ((CONFIG, config), (WEIGHTS, to_safetensors(tensors, {"format": "pt", "notice": NOTICE}))):
            with atomic_write(partial / name, mode=0o600) as file:
                file.write(data)


def _config(vector: SecurityVector, base_model: str) -> dict[str, Any]:
    ranks = {site: pair.rank for site, pair in vector.factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    odd = {f"^{re.escape(site)}": r for site, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": vector.scale * rank,
        "rank_pattern": odd,
        "alpha_pattern": {pattern: vector.scale * r for pattern, r in odd.items()},
        "target_modules": sorted(vector.sites),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": _stores_transposed(base_model),
        "init_lora_weights": True,
    }


def _stores_transposed(base_model: str) -> bool:
    path = Path(base_model) / "config.json"
    return path.exists() and read_json(path).get("model_type") in TRANSPOSED_MODELS


def _plain_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise _refused(folder, f"peft_type {kind!r}")
    if (bias := config.get("bias", "none")) != "none":
        raise _refused(folder, f"bias {bias!r}")
    if str(start := config.get("init_lora_weights")).lower().startswith(_BASE_CHANGING):
        raise _refused(folder, f"init_lora_weights {start!r}")
    for option in _BEYOND_LORA:
        if config.get(option):
            raise _refused(folder, f"{option} {config[option]!r}")
    return config


def _factors(folder: Path) -> dict[str, Factors]:
    """Pair the tensors of the adapter file; each must be a LoRA factor of a linear layer in a numbered block."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _read_tensors(folder / WEIGHTS).items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.ndim != 2 or not tensor.is_floating_point():
            raise _refused(folder, f"tensor {name} {tuple(tensor.shape)} {tensor.dtype}")
        pairs.setdefault(match["site"], {})[match["factor"]] = tensor.to(torch.float32)
    for site, pair in pairs.items():
        _check_site(site, folder)
        if pair.keys() != {"A", "B"}:
            raise _refused(folder, f"only factor {', '.join(pair)} of site {site}")
    return {site: Factors(pair["A"], pair["B"]) for site, pair in sorted(pairs.items())}


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: expected the adapter's weights as safetensors, found {error}") from error


def _check_site(site: str, folder: Path) -> None:
    try:
        layer_of(site)
    except SiteError as error:
        raise _refused(folder, f"an adapter on {site}, outside the numbered blocks") from error


def _scale(config: Mapping[str, Any], site: str, rank: int, folder: Path) -> float:
    stated = _by_pattern(config.get("rank_pattern"), site, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), site, config.get("lora_alpha"))
    if stated != rank or not isinstance(alpha, int | float):
        raise _refused(folder, f"r {stated!r} and lora_alpha {alpha!r} where site {site} has rank {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    """Look a site up as PEFT does: the first pattern that matches the end of its name."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", site)), default)


def _rescaled(pair: Factors, scale: float, common: float) -> Factors:
    """Move what a site's scale differs from the common one into its B."""
    return pair if scale == common else Factors(pair.a, (pair.b.double() * (scale / common)).float())


def _info(config: Mapping[str, Any], folder: Path) -> VectorInfo:
    base = Path(str(config.get("base_model_name_or_path")))
    if not (base / "config.json").exists():
        raise ArtifactError(
            f"{folder}: expected the base model in the folder {str(base)!r} that the adapter names, found none; "
            "download it and set base_model_name_or_path, or pass info="
        )
    source = {"source": "peft", "adapter": digest_file(folder / WEIGHTS)}
    return VectorInfo(UNKNOWN, digest_model(base), UNKNOWN, UNKNOWN, UNKNOWN, fit=source, versions=versions())


def _refused(folder: Path, found: str) -> ArtifactError:
    return ArtifactError(
        f"{folder}: expected a plain LoRA adapter on linear layers of the numbered blocks, found {found}; "
        "such a change is not scale * B @ A: train the adapter without it"
    )
