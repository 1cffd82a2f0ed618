"""torch with bfloat16 weights (oneDNN), through transformers: our own environment, another process."""

from __future__ import annotations

import sys
from pathlib import Path

from anybit.evaluate.rivals.cache import tree_bytes
from anybit.evaluate.rivals.contract import RivalFailed
from anybit.evaluate.rivals.process import Worker

WORKER = Path(__file__).parent / "workers" / "torch_llm.py"


class TorchBf16:
    """The float model as it is; always there."""

    name = "torch"

    def __init__(self, variant: str = "bf16") -> None:
        if variant != "bf16":
            raise RivalFailed(f"torch:{variant}: only bf16 is known")

    def missing(self) -> str:
        """See `Rival`."""
        return ""

    def prepare(self, model: Path) -> Path:
        """Nothing to convert."""
        return model

    def start(self, prepared: Path, threads: int) -> Worker:
        """See `Rival`."""
        environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
        # transformers holds it in bfloat16 whatever the file has; 2 bytes a weight are counted by the file's own dtype.
        command = [sys.executable, WORKER, prepared, str(threads)]
        return Worker("torch bf16", tree_bytes(prepared, "*.safetensors"), command, environment)
