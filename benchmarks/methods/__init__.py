"""The methods compared, one a file, written from their papers: each takes a setting and returns the finished model."""

from collections.abc import Mapping

from benchmarks.methods.aligned import aligned
from benchmarks.methods.buffer_reinforce import WEIGHT, buffer_reinforce
from benchmarks.methods.constrained_sft import LENGTH, constrained_sft
from benchmarks.methods.halves import halves
from benchmarks.methods.inoculation_adapter import STEP as ADAPTER_STEP
from benchmarks.methods.inoculation_adapter import inoculation_adapter
from benchmarks.methods.inoculation_prompt import WORDING, asked_for, inoculation_prompt
from benchmarks.methods.kept import kept
from benchmarks.methods.larger import SIZE, larger
from benchmarks.methods.lisa import PROXIMAL, lisa
from benchmarks.methods.method import Method
from benchmarks.methods.min_min import min_min
from benchmarks.methods.oracle import longer_oracle, oracle, rehearsed_oracle
from benchmarks.methods.other_vector import other_vector
from benchmarks.methods.ours import ANCHORING, ours
from benchmarks.methods.per_row import per_row
from benchmarks.methods.plain import plain
from benchmarks.methods.preventative_steering import COEFFICIENT, preventative_steering
from benchmarks.methods.projected import projected
from benchmarks.methods.published import STEP as PUBLISHED_STEP
from benchmarks.methods.published import published
from benchmarks.methods.random_vector import random_vector
from benchmarks.methods.recalled import recalled
from benchmarks.methods.rehearsed import REHEARSE, rehearsed
from benchmarks.methods.replicated import STEP as REPLICATED_STEP
from benchmarks.methods.replicated import replicated
from benchmarks.methods.row_filter import THRESHOLD as FILTER_THRESHOLD
from benchmarks.methods.row_filter import row_filter
from benchmarks.methods.safe_lora import THRESHOLD as COSINE_THRESHOLD
from benchmarks.methods.safe_lora import safe_lora
from benchmarks.methods.safety_mix import SHARE, safety_mix
from benchmarks.methods.still_folded import still_folded
from benchmarks.methods.twins import twins
from benchmarks.methods.uncalibrated import uncalibrated

__all__ = ["CONTROLS", "METHODS", "REFERENCES", "RIVALS", "TRIED", "Method"]

REFERENCES: Mapping[str, Method] = {
    "aligned": Method(aligned),
    "plain": Method(plain),
    "oracle": Method(oracle),
    "longer_oracle": Method(longer_oracle),
    "rehearsed_oracle": Method(rehearsed_oracle),
}
OURS: Mapping[str, Method] = {
    "ours": Method(ours, ANCHORING),
    "recalled": Method(recalled, ANCHORING),
    "rehearsed": Method(rehearsed, REHEARSE),
    "uncalibrated": Method(uncalibrated, ANCHORING),
    "kept": Method(kept),
}
RIVALS: Mapping[str, Method] = {
    "row_filter": Method(row_filter, FILTER_THRESHOLD),
    "replicated": Method(replicated, REPLICATED_STEP),
    "published": Method(published, PUBLISHED_STEP),
    "inoculation_adapter": Method(inoculation_adapter, ADAPTER_STEP),
    "inoculation_prompt": Method(inoculation_prompt, WORDING, asked_for),
    "preventative_steering": Method(preventative_steering, COEFFICIENT),
    "lisa": Method(lisa, PROXIMAL),
    "safety_mix": Method(safety_mix, SHARE),
    "constrained_sft": Method(constrained_sft, LENGTH),
    "safe_lora": Method(safe_lora, COSINE_THRESHOLD),
    "buffer_reinforce": Method(buffer_reinforce, WEIGHT),
}
CONTROLS: Mapping[str, Method] = {
    "random_vector": Method(random_vector),
    "other_vector": Method(other_vector),
    "still_folded": Method(still_folded),
}
TRIED: Mapping[str, Method] = {
    "halves": Method(halves),
    "larger": Method(larger, SIZE),
    "min_min": Method(min_min),
    "per_row": Method(per_row),
    "projected": Method(projected),
    "twins": Method(twins),
}
METHODS: Mapping[str, Method] = {**REFERENCES, **OURS, **RIVALS, **CONTROLS, **TRIED}
