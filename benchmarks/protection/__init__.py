"""How well unwanted behaviours are kept out and wanted skills are learned: behaviour x method x fine-tuning x seed.

python -m benchmarks.protection run --grid smoke --jobs 2
python -m benchmarks.protection run --behaviour guarded --method plain --method ours --seed 0
python -m benchmarks.protection table --grid smoke
python -m benchmarks.protection plot --grid lr -o plots
"""
