"""What a vector costs on one GPU, on models of real shapes with random weights: nothing is downloaded.

python -m benchmarks.gpu [--shape llama-2-7b ...] [--job lora ...] [--budget-s 400] [--json F] [--markdown F]
python -m benchmarks.gpu --toy     the same on a model of 1e5 parameters, on a CPU in seconds: shows that it runs

benchmarks/results/gpu-*.json are of one model on an H200: the eight minutes for all three were not to be had.
"""
