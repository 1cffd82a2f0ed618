"""What an exported model predicts, inside OpenVINO's environment: `openvino_nll.py DIRECTORY THREADS WINDOWS OUT`.

WINDOWS is int64 [W, ctx] (.npy); OUT becomes float64 [W, ctx - 1] (.npy), the negative log-likelihoods of tokens 1.. of
each window. Activations stay float32, so what is measured is the weights alone.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np


def main(directory: str, threads: int, windows_file: str, out_file: str) -> None:
    """Score every window from an empty cache."""
    openvino: Any = importlib.import_module("openvino")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
    options = exact | {"INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(f"{directory}/openvino_model.xml", "CPU", options)
    request = model.create_infer_request()
    names = {name for port in model.inputs for name in port.names}
    scored = []
    for window in np.load(windows_file):
        ids = window[None]
        everything = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.reset_state()
        request.infer({name: value for name, value in everything.items() if name in names})
        logits = request.get_tensor("logits").data[0, :-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        normalizer = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        scored.append(normalizer - logits[np.arange(len(window) - 1), window[1:]])
    np.save(out_file, np.stack(scored))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
