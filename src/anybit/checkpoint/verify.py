"""Is a checkpoint on disk what its ledger says? Shapes, hashes and numbers, before any of it is used."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from anybit.checkpoint.layout import INDEX, read_config
from anybit.checkpoint.ledger import IMPORTED, Ledger, check_numbers, form_word, tensor_sha256
from anybit.errors import FormatError
from anybit.formats.terms import tensor_specs


def verify(directory: Path) -> Ledger:
    """The ledger of a checkpoint whose every tensor was read and found as recorded.

    Raises:
        FormatError: the first thing that is missing, truncated, altered or not as planned, with its name and file.
    """
    forms = read_config(directory)["quantization_config"]["layers"]
    ledger = Ledger.read(directory)
    files = weight_map(directory)
    rows = {row.name: row for row in ledger.tensors}
    if rows.keys() != forms.keys():
        odd = sorted(rows.keys() ^ forms.keys())[0]
        raise FormatError(f"{directory}: ledger and config.json disagree about '{odd}'; quantize again")
    for name, form in forms.items():
        row = rows[name]
        if form_word(form) != row.actual or row.planned not in (row.actual, IMPORTED):
            planned = row.actual if row.planned == IMPORTED else row.planned
            raise FormatError(f"{directory}: '{name}' is {form_word(form)}, the ledger planned {planned}")
        wanted = {key: f"{name}.{key}" for key in tensor_specs(form)}
        found = {key: _read(directory, files, full) for key, full in wanted.items()}
        for key, (shape, dtype) in tensor_specs(form).items():
            if tuple(found[key].shape) != shape or found[key].dtype != dtype:
                raise FormatError(f"{directory}: {wanted[key]} is not {dtype} {list(shape)}")
            if tensor_sha256(found[key]) != row.sha256.get(key):
                raise FormatError(
                    f"{directory}: {wanted[key]} in {files[wanted[key]]} was altered since it was written (sha256)"
                )
        check_numbers(name, found)
    for name, expected in ledger.float_tensors.items():
        if tensor_sha256(_read(directory, files, name)) != expected:
            raise FormatError(f"{directory}: {name} in {files[name]} was altered since it was written (sha256)")
    return ledger


def weight_map(directory: Path) -> dict[str, str]:
    """Tensor name to shard file.

    Raises:
        FormatError: the index is missing or damaged, or names what is not in `directory`.
    """
    path = directory / INDEX
    try:
        files = dict(json.loads(path.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} is missing or damaged ({error}); restore it or quantize again") from None
    here = {file.name for file in directory.iterdir()}
    for name, file in files.items():
        if not isinstance(file, str) or file not in here:  # gone, or a path that leads elsewhere
            raise FormatError(
                f"{path}: '{name}' is in {str(file)[:80]!r}, which is not there; restore it or quantize again"
            )
    return files


def _read(directory: Path, files: dict[str, str], name: str) -> Tensor:
    if name not in files:
        raise FormatError(f"{directory}: tensor {name} is in no shard")
    path = directory / files[name]
    try:
        with safe_open(path, framework="pt") as shard:
            return shard.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{path} cannot be read ({error}); it is truncated or damaged, restore it or quantize again"
        ) from None
