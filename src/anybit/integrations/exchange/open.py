"""A checkpoint of another engine, opened: which reader, which configuration, where its floats are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from anybit.checkpoint.layout import METHOD
from anybit.errors import FormatError, InputError
from anybit.integrations import awq, gptq
from anybit.integrations.compressed_tensors import read as compressed_tensors
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.foreign import Shape, Stored, check_blocks
from anybit.models.names import BLOCKS
from anybit.models.shards import Shards


class Foreign(Protocol):
    """What is imported: layers with codes as forms of ours, everything else as floats, by transformers' names."""

    @property
    def format(self) -> str:
        """For people."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """As transformers writes config.json, without quantization_config."""
        ...

    def layer(self, name: str, shape: Shape) -> Stored | None:
        """Form and tensors of a linear or embedding [N, K]; None where it holds floats."""
        ...

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter that holds floats."""
        ...

    def companions(self, folder: Path) -> Path:
        """A directory with the tokenizer's files; `folder` may be used to make it."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells it from others."""
        ...


class LayerReader(Protocol):
    """What gptq.py, awq.py and compressed_tensors/read.py offer."""

    @property
    def names(self) -> tuple[str, ...]:
        """Last parts of the names of a layer's tensors."""
        ...

    @property
    def format(self) -> str:
        """For people."""
        ...

    def layer(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Stored:
        """A layer of ours."""
        ...


READERS: dict[str, Callable[[Mapping[str, Any], Account], LayerReader]] = {
    "gptq": gptq.Reader,
    "awq": awq.Reader,
    "compressed-tensors": compressed_tensors.Reader,
}


def open_foreign(path: Path, account: Account) -> Foreign:
    """Opens a directory or a .gguf file. Raises InputError for what is not there, not quantized, or of another kind."""
    if path.is_file() and path.suffix == ".gguf":
        from anybit.integrations.gguf.read import GGUF

        return GGUF(path, account)
    if not path.is_dir():
        raise InputError(
            f"{path}: no such directory or .gguf file; give a checkpoint in one of: {', '.join(READERS)}, gguf"
        )
    config = _read_json(path / "config.json")
    quantization = config.pop("quantization_config", None)
    if quantization is None and (path / "quantize_config.json").is_file():
        quantization = {"quant_method": "gptq", **_read_json(path / "quantize_config.json")}
    if not isinstance(quantization, dict):
        raise InputError(f"{path}: not quantized; give it to `anybit quantize` instead")
    method = str(quantization.get("quant_method"))
    if method == METHOD:
        raise InputError(f"{path}: an anybit checkpoint already; use it as it is")
    if method not in READERS:
        raise InputError(f"{path}: quantized with '{method}', which is not read; these are: {', '.join(READERS)}, gguf")
    reader, shards = READERS[method](quantization, account), Shards(path)
    for key in BLOCKS & config.keys():
        check_blocks(config[key], len(shards.entries))
    return Directory(path, config, reader, shards)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.parent}: no {path.name}; give a Hugging Face directory or a .gguf file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; download it again")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


@dataclass(frozen=True)
class Directory:
    """A Hugging Face directory whose linears a `LayerReader` understands."""

    path: Path
    config: dict[str, Any]
    reader: LayerReader
    shards: Shards

    @property
    def format(self) -> str:
        """The reader's."""
        return self.reader.format

    def layer(self, name: str, shape: Shape) -> Stored | None:
        """See `Foreign`."""
        found = [key for key in self.reader.names if f"{name}.{key}" in self.shards.entries]
        if found == ["weight"] or not found:
            return None
        most = max(math.prod(shape), 2)  # 2: the weight's shape is a tensor too
        for key in found:  # before any is read: a header may claim terabytes of a sparse file
            if math.prod(self.shards.entries[f"{name}.{key}"].shape) > most:
                raise FormatError(f"{name}.{key} holds more numbers than a weight {list(shape)}; download it again")
        return self.reader.layer(name, shape, {key: self.shards.read(f"{name}.{key}") for key in found})

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `Foreign`."""
        if name not in self.shards.entries:
            raise InputError(
                f"{self.path}: {name} is in no shard; config.json describes another model, or a shard is gone"
            )
        found = self.shards.entries[name].shape
        if found != shape:
            raise InputError(f"{self.path}: {name} is {list(found)}, config.json wants {list(shape)}")
        return self.shards.read(name)

    def companions(self, folder: Path) -> Path:
        """Itself."""
        return self.path

    def identity(self) -> dict[str, Any]:
        """Sizes and hashes of its shards."""
        return {"format": self.format, "shards": self.shards.identity()}
