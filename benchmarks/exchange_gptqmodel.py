"""Runs in the environment of GPTQModel: `exchange_gptqmodel.py DIRECTORY WINDOWS.npy NLL.npy`; see exchange.py.

That environment: torch 2.13 for CPUs and transformers 5.23, then gptqmodel 7.7.0 by `pip install --no-deps --no-build-isolation`
(it asks for torch 2.14) and what it imports: accelerate datasets defuser device-smi dill logbar pillow protobuf pypcre requests
threadpoolctl tokenicer.

Its plain torch kernel in float16 (it takes 16-bit floats only); the likelihood of every token of a window but the first.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import torch


@torch.inference_mode()
def main(directory: str, windows: str, out: str) -> None:
    """Score int64 windows [W, ctx] into float64 [W, ctx - 1], in nats."""
    gptqmodel = importlib.import_module("gptqmodel")
    model = gptqmodel.GPTQModel.load(
        directory, device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16
    ).model
    kinds = {type(module).__name__ for module in model.modules()}
    assert "TorchLinear" in kinds, "GPTQModel read the file as floats"
    scores = []
    for window in torch.from_numpy(np.load(Path(windows))):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        scores.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").double())
    np.save(Path(out), torch.stack(scores).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:4])
