"""Fine-tune all weights of a folded model in several processes of a Ray cluster: `hf_trainer.py`, unchanged, in each.

secvec fold MODEL --vector vector.safetensors -o folded
python examples/ray_train.py folded train.jsonl trained
secvec unfold trained -o defended

All machines of the cluster must see the three paths. With GPUs: `ScalingConfig(num_workers=..., use_gpu=True)`.
"""

import os
import sys
from pathlib import Path

import hf_trainer
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

PROCESSES = 2


def main(folded: str, data: str, out: str) -> None:
    paths = {"folded": folded, "data": data, "out": out}
    absolute = {name: str(Path(path).absolute()) for name, path in paths.items()}
    # The workers do not find the scripts in this folder by themselves.
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}})
    TorchTrainer(
        lambda given: hf_trainer.main(given["folded"], given["data"], given["out"]),
        train_loop_config=absolute,
        scaling_config=ScalingConfig(num_workers=PROCESSES),
        run_config=RunConfig(storage_path=f"{absolute['out']}.ray"),
    ).fit()


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it sends usage statistics
    main(*sys.argv[1:])
