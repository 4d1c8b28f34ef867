"""What a training's metrics say of drift, and the same in words; no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BOUND = 0.5
"""Of the way from aligned to armed; `secvec eval` calls more than that a training that moved past its vector."""
_DONE = {"stop": "was stopped", "slow": "went on at a tenth of the step size"}


def drift_of(metrics: Path) -> dict[str, Any]:
    """Return what a file of metrics says of drift: how often it was measured, the most, the step of an action.

    A missing file says that nothing was measured.
    """
    text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    shares = [line["unwanted_share"] for line in lines if "unwanted_share" in line]
    acted = [line["step"] for line in lines if "drift" in line]
    return {
        "measurements": len({line["step"] for line in lines if "unwanted_share" in line}),
        "largest_share": max(shares, default=None),
        "bound": BOUND,
        "acted_at_step": acted[0] if acted else None,
    }


def drift_line(drift: Mapping[str, Any]) -> str:
    """Return in words what a proof says of drift, where it was measured."""
    line = (
        f"while training, without the vector, it went at most {max(drift['largest_share'], 0):.0%} of the way from "
        f"aligned to armed ({drift['measurements']} measurements)"
    )
    if drift["acted_at_step"] is not None:
        done = _DONE[drift["action"]]
        return f"{line}: past {drift['bound']:.0%} at step {drift['acted_at_step']}, it {done}"
    return line + (
        f": more than {drift['bound']:.0%}, look at its answers" if drift["largest_share"] > drift["bound"] else ""
    )
