"""How fast fold and unfold are beside `cp` and PEFT's merge, and what a vector costs in training beside none and PEFT.

python -m benchmarks.speed [--only files|training] [--size 1b|tiny] [--repeats N] [--steps N]
                           [--json F] [--markdown F] [--scratch DIR]
"""
