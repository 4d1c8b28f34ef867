"""Tried: two vectors of the same rows, which differ in where their fits started, in effect together."""

from dataclasses import replace
from pathlib import Path

from benchmarks.methods.fitted import fitted
from benchmarks.methods.runs import trained
from benchmarks.methods.setting import Setting


def twins(setting: Setting) -> Path:
    """The same as `halves` without its other rows: each vector of a behaviour has all of them."""
    seeds = (setting.fit.seed, setting.fit.seed + 1)
    vectors = [vector for seed in seeds for vector in fitted(setting, replace(setting.fit, seed=seed))]
    twice = replace(setting, unwanted=[*setting.unwanted] * len(seeds))
    return trained(twice, setting.training, vectors=vectors, calibrate=True)
