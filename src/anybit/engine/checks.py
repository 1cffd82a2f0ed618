"""Is what the native decoder is about to run what was written? Hashes before anything is used, the canary after."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybit.checkpoint.layout import INDEX
from anybit.engine.tensors import Shard, Tensors
from anybit.errors import FormatError, PromiseError

TOLERANCE = {16: 0.5, 8: 0.5, 4: 2.0, 2: 8.0}
"""Largest allowed difference of a canary logit, as a share of the spread of all logits, by `kv_bits`.

The stored logits are those of float activations and a float cache. Measured here: 0.03 to 0.08 with 16 and 8 bits, 0.2
to 0.6 with 4; wrong weights are off by 3 to 5, the height of the largest logits.
"""


def check_hashes(directory: Path, threads: int) -> None:
    """Compare every tensor with its sha256 in the ledger, shards side by side: 1.2 GB/s a thread.

    The ledger is read as plain JSON: `checkpoint.verify` looks at more, and imports more than this engine otherwise does.

    Raises:
        FormatError: the first tensor that is missing, damaged or altered.
    """
    hashes = _recorded(directory)
    names = defaultdict(list)
    for name, file in Tensors(directory).files.items():
        names[file].append(name)
    if odd := hashes.keys() ^ {name for several in names.values() for name in several}:
        raise FormatError(f"{directory}: {INDEX} and ledger.json disagree about '{min(odd)}'; quantize again")

    def check(file: str) -> None:
        shard = Shard(directory / file)
        for name in names[file]:
            if shard.sha256(name) != hashes[name]:
                raise FormatError(
                    f"{directory}: {name} in {file} was altered since it was written (sha256); restore it"
                )

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(check, sorted(names)):
            pass


def check_canary(
    directory: Path, prefill: Callable[[list[int]], NDArray[np.float32]], limit: int, kv_bits: int
) -> None:
    """Ask the tokens of the canary again; `prefill` gives logits [V]. Skipped where `limit` tokens cannot hold them.

    Raises:
        FormatError: no canary, or a damaged one. PromiseError: other answers than when it was written.
    """
    path = directory / "canary.json"
    try:
        record = json.loads(path.read_text())
        ids, top, spread = list(record["ids"]), np.array(record["top_ids"], int), float(record["spread"])
        expected = np.array(record["top_logits"], np.float32)
        allowed = max(TOLERANCE[kv_bits], float(record.get("allowed", 0.0)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is missing or damaged ({error}); restore it or quantize again") from None
    if len(ids) > limit:
        return
    difference = float(np.abs(np.asarray(prefill(ids))[top] - expected).max()) / max(spread, 1e-30)
    if not difference <= allowed:
        raise PromiseError(
            f"{directory}: the native decoder does not answer as when it was written (canary logits off by "
            f"{difference:.3g} of their spread, {allowed:.3g} allowed); run `anybit doctor`"
        )


def _recorded(directory: Path) -> Mapping[str, str]:
    """Tensor name to sha256."""
    path = directory / "ledger.json"
    try:
        ledger: dict[str, Any] = json.loads(path.read_text())
        rows = {f"{row['name']}.{key}": sha for row in ledger["tensors"] for key, sha in row["sha256"].items()}
        return rows | dict(ledger["float_tensors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is missing or damaged ({error}); restore it or quantize again") from None
