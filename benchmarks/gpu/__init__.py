"""What a vector costs on one GPU, on models of real shapes with random weights: nothing is downloaded.

python -m benchmarks.gpu [--shape llama-2-7b ...] [--budget-s 400] [--json F] [--markdown F]
python -m benchmarks.gpu --toy     the same on a model of 1e5 parameters, on a CPU in seconds: shows that it runs

Only the toy run has been seen so far: no GPU was at hand, so no figure of it is in this repository.
"""
