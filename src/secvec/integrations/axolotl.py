"""A plugin that arms the model which Axolotl trains: for 4-bit bases, as a folded folder needs no plugin.

    plugins: [secvec.integrations.axolotl.SecurityVectorPlugin]
    security_vector: vector.safetensors
    security_vector_unwanted: unwanted.jsonl

Axolotl goes on without a plugin that it cannot import. What was trained armed has `security_vector_armed.json` in its
output folder; without that file it was not. Optional: nothing imports this module, and Axolotl has its own licence.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

from secvec import artifact
from secvec.arm import arm, disarm, is_armed
from secvec.errors import UsageError
from secvec.integrations.callback import SecurityVectorCallback

_FUSED = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class SecurityVectorArgs(BaseModel):
    """The plugin's part of the config: the vector's file, and the rows that it was fitted on."""

    security_vector: str
    security_vector_unwanted: str


class SecurityVectorPlugin(BasePlugin):  # pyright: ignore[reportUntypedBaseClass]
    """Arm the model as soon as it is loaded, before adapters are; disarm it when it is trained."""

    def get_input_args(self) -> str:
        return f"{__name__}.{SecurityVectorArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        # Switched on by default, they compute with the weights and not through the modules; the canary refuses them.
        for name in _FUSED:
            cfg.setdefault(name, False)

    def post_model_build(self, cfg: Any, model: Any) -> None:
        if cfg.rl:
            raise UsageError(f"rl: {cfg.rl}: the reference model would be armed too; train a folded model instead")
        arm(model, artifact.load(cfg.security_vector))

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[SecurityVectorCallback]:
        vector = artifact.load(cfg.security_vector)
        return [SecurityVectorCallback([vector], cfg.security_vector_unwanted, max_length=cfg.sequence_len)]

    def post_train(self, cfg: Any, model: Any) -> None:
        if is_armed(model):
            disarm(model)
