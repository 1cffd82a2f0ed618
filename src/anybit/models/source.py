"""Where a model comes from: a Hugging Face directory, a .gguf file, a hub id or `demo`; read one block at a time.

    source = open_model("path")
    model = source.skeleton()                        # parameters on meta
    source.load_into(model.get_submodule(name), name)   # this block's bytes only
    release(model.get_submodule(name))               # and away again

Only safetensors are read, pickle never; code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from anybit.errors import InputError
from anybit.models.names import BLOCKS, Plan, plan_parameters
from anybit.models.normalize import conv1d_weights, normalize
from anybit.models.shards import Shards
from anybit.models.skeleton import empty_model, release

__all__ = ["ModelSource", "open_model", "release"]

MOST_BLOCKS = 4096
"""A config.json that names more is damaged: transformers would build them all before anybody could look."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def open_model(model: str | Path) -> ModelSource:
    """Opens `model` (directory, .gguf file, hub id or "demo") without reading weights.

    Raises InputError, one line, for anything missing, damaged or already quantized.
    """
    name = str(model)
    path = Path(name).expanduser()
    if name == "demo":  # the word wins over a directory of that name; "./demo" means the directory
        from anybit.models.demo import demo_directory

        return ModelSource(demo_directory(), name)
    if path.is_dir():
        return ModelSource(path, name)
    if name.endswith(".gguf"):
        from anybit.models.gguf import converted

        return ModelSource(converted(path), name)
    if path.exists():
        raise InputError(f"{name}: a file, but not .gguf; give a model directory, a .gguf file, a hub id or 'demo'")
    if not _HUB_ID.fullmatch(name):
        raise InputError(f"{name}: no such directory; give a model directory, a .gguf file, a hub id or 'demo'")
    return ModelSource(_download(name), name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # httpx, OS and hub errors share no base class
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{name}: no such directory, and no hub model under that name ({type(error).__name__}: {reason}); "
            "check the spelling and the network, or give a directory"
        ) from error


class ModelSource:
    """A float model on disk. `path`: its Hugging Face directory; `config`: its transformers config."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        """`name`: what the user called it. Reads config.json and the shard headers. Raises InputError."""
        self.path = path
        self.name = name or str(path)
        self.config = _read_config(path)
        self._shards = Shards(path)

    def identity(self) -> dict[str, Any]:
        """Tells models apart when a run resumes: sha256 of config.json and, per shard, size and a sampled hash.

        The shard hash covers the first and last MiB (the first holds the header) and 14 chunks of 64 KiB between; it
        notices another model or a new download, not a deliberate edit of single weights.
        """
        config = hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest()
        return {"architecture": self.config.model_type, "config_sha256": config, "shards": self._shards.identity()}

    def skeleton(self) -> nn.Module:
        """A fresh normalized model: float32, eval, parameters on meta, buffers real (see `normalize`).

        Raises InputError when the checkpoint does not hold every parameter in the right shape, StructureError for
        expert layouts that are not known.
        """
        model, self._plans = self._build()
        return model

    def load_into(
        self,
        module: nn.Module,
        prefix: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Gives every parameter of `module`, which sits at `prefix` in the skeleton ("" = the root), its weights.

        Parameters become `dtype` on `device`; buffers move to `device` in their own dtype. Reads only these tensors.
        Tied parameters inside `module` stay tied. Raises InputError for NaN, Inf or a name the skeleton does not have.
        """
        loaded: dict[int, nn.Parameter] = {}
        for owner_name, owner in module.named_modules():
            at = _join(prefix, owner_name)
            for leaf, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) not in loaded:
                    value = self.tensor(_join(at, leaf)).to(device=device, dtype=dtype)
                    loaded[id(parameter)] = nn.Parameter(value, requires_grad=False)
                owner.register_parameter(leaf, loaded[id(parameter)])
            for leaf, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
                stored = self._plans.get(_join(at, leaf))
                value = buffer if stored is None else self._read(_join(at, leaf), stored).to(buffer.dtype)
                setattr(owner, leaf, value.to(device))

    def tensor(self, name: str) -> Tensor:
        """The parameter `name` of the skeleton (normalized: linears [N, K]) in its stored dtype, on the CPU."""
        if name not in self._plans:
            raise InputError(f"{self.name}: no parameter {name} in this model")
        return self._read(name, self._plans[name])

    def tokenizer(self) -> Any:
        """The tokenizer saved with the model. Raises InputError when there is none that transformers can read."""
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"{self.name}: no usable tokenizer in {self.path} ({reason}); copy its files there"
            ) from error

    @cached_property
    def _plans(self) -> dict[str, Plan]:
        return self._build()[1]

    def _build(self) -> tuple[nn.Module, dict[str, Plan]]:
        model = empty_model(self.config)
        transposed = conv1d_weights(model)
        normalize(model)
        prefix = str(getattr(model, "base_model_prefix", ""))
        try:
            return model, plan_parameters(model, self._shards.entries, transposed, prefix)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def _read(self, name: str, plan: Plan) -> Tensor:
        parts = [self._shards.read(piece.key, piece.index) for piece in plan.pieces]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not _all_finite(value):
            raise InputError(f"{self.name}: {name} holds NaN or Inf; the checkpoint is damaged, download it again")
        return value.T.contiguous() if plan.transpose else value


def _all_finite(tensor: Tensor) -> bool:
    """min and max are NaN or infinite exactly when an element is, and need no temporary of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _counted(config: Any) -> list[int]:
    """Every number of blocks that a config.json names, also those of its parts."""
    if not isinstance(config, dict):
        return []
    own = [config[key] for key in BLOCKS & config.keys() if isinstance(config[key], int)]
    return own + [count for part in config.values() for count in _counted(part)]


def _read_config(path: Path) -> PretrainedConfig:
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json; give a Hugging Face model directory, a .gguf file or a hub id")
    try:
        blocks = max(_counted(json.loads((path / "config.json").read_text(encoding="utf-8"))), default=0)
        if blocks > MOST_BLOCKS:
            raise ValueError(f"{blocks} blocks")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # config classes validate with their own exceptions, JSON and OS errors add theirs
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path}/config.json: not a model this transformers can read ({reason})") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise InputError(f"{path}: already quantized ({method}); give the float model it was made from")
    return config
