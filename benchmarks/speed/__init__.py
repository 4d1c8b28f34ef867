"""How fast fold and unfold are, beside copying the same bytes and beside PEFT's merge.

python -m benchmarks.speed [--size 1b|tiny] [--json F] [--markdown F] [--repeats N] [--scratch DIR]
"""
