"""A LoRA adapter trained on a folded model: which ones may move to the base, and how."""

import json
import re
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from secvec.errors import CheckpointError
from secvec.headers import read_header
from secvec.tripwire import read_json

WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_LORA = re.compile(r"\.lora_")
# These change the base's own weights; such an adapter fits no other base.
_OPTIONS = {"use_dora": "DoRA, which scales", "kasa_config": "KaSA, which truncates"}
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_config(folder: Path, sites: Set[str]) -> dict[str, Any]:
    """Return the adapter's config if its change adds to any base: a LoRA adapter proper.

    Raises CheckpointError for other kinds, and for one with whole weights of the vector's sites: these hold the vector.
    """
    config = read_json(folder / _CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise _unfit(folder, f"peft_type {kind!r}")
    for option, what in _OPTIONS.items():
        if config.get(option):
            raise _unfit(folder, f"{what} the folded weights")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_BASE_CHANGING):
        raise _unfit(folder, f"init_lora_weights {start!r}, which changes the folded weights")
    if not (folder / WEIGHTS).exists():
        raise _unfit(folder, f"no {WEIGHTS}")
    tensors, _ = read_header(folder / WEIGHTS)
    whole = [name for name in tensors if _site(name) in sites and not _LORA.search(name)]
    if whole:
        raise _unfit(folder, f"whole weights of a site, which hold the vector: {', '.join(whole[:3])}")
    return config


def _site(name: str) -> str:
    return (
        name.removeprefix(_PEFT_PREFIX)
        .replace(".modules_to_save", "")
        .replace(".base_layer", "")
        .removesuffix(".weight")
    )


def copy_adapter(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy the adapter's weights and write its config."""
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    (target / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _unfit(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: expected a plain LoRA adapter, found {found}; "
        "merge it into the folded model (merge_and_unload, save_pretrained) and unfold the result"
    )
