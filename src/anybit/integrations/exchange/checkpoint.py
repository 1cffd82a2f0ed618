"""An anybit checkpoint as the writers of other formats read it: layer by layer, shard by shard, after its hashes were checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from anybit.checkpoint.layout import read_config
from anybit.checkpoint.verify import verify, weight_map
from anybit.errors import InputError
from anybit.formats.affine import Affine
from anybit.formats.decoder import Form
from anybit.formats.form import precisions
from anybit.formats.planes import unpack
from anybit.formats.terms import CodeTerm, Term, dense, load_terms, tensor_specs
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.grid import Grid, grid
from anybit.layers.precision import available_precisions, width_read
from anybit.models.skeleton import empty_model


@dataclass(frozen=True)
class Layer:
    """One quantized layer, read at `bits` of its widths."""

    name: str
    form: Form
    tensors: Mapping[str, Tensor]
    bits: int

    def terms(self) -> list[Term]:
        """Its terms."""
        return load_terms(self.form, self.tensors)

    def values(self) -> Tensor:
        """float32 [N, K] at `bits`."""
        return dense(self.terms(), self.bits if len(precisions(self.form)) > 1 else None)

    def code(self, account: Account) -> CodeTerm:
        """Its only term (`rules.check_layer` refuses others). Raises InputError where it covers some columns only."""
        (term,) = self.terms()
        if not isinstance(term, CodeTerm) or term.columns != (0, term.shape[1]):
            raise account.refuse("codes for some of the columns", self.name)
        return term

    def grid(self, account: Account) -> Grid:
        """Its codes as a uniform grid. Raises InputError where they are none."""
        term = self.code(account)
        found = grid(term.decoder, unpack(term.planes, term.shape[1]), self.bits)
        if found is None:
            raise account.refuse(f"{term.decoder.kind.replace('_', '-')} codes, which are no uniform grid", self.name)
        return found

    def integer_grid(self, account: Account) -> Grid:
        """`grid` for formats whose zeros are integers. Where ours lie between codes (nested weights below their full width,
        bipolar ones) the full weight is rounded anew: SmolLM2 at 4 of 8 bits then has perplexity 18.5, 20.1 with the codes kept
        and their zeros rounded (16.1 exactly)."""
        found = self.grid(account)
        if found.has_integer_zeros:
            return found
        account.lose("zero points between codes; the full weight is rounded anew, to nearest", self.name)
        full = dense(self.terms())
        nearest = Affine.fit(full, found.bits, found.group_size)
        again = grid(nearest, nearest.encode(full), found.bits)
        assert again is not None
        return again


@dataclass(frozen=True)
class Checkpoint:
    """`directory` with its config; `precision` is the width nested layers are read at (None: all)."""

    directory: Path
    precision: int | None = None
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Checks every hash. Raises InputError for a damaged checkpoint or a precision it does not hold."""
        if not self.directory.is_dir():
            raise InputError(f"{self.directory}: no such directory; give one that `anybit quantize` wrote")
        object.__setattr__(self, "config", read_config(self.directory))
        offered = available_precisions(self.forms.values())
        if self.precision is not None and self.precision not in offered:
            raise InputError(f"precision {self.precision} is not in this checkpoint; it holds {list(offered)}")
        verify(self.directory)

    @property
    def forms(self) -> dict[str, Form]:
        """By layer name."""
        return dict(self.config["quantization_config"]["layers"])

    @property
    def kv(self) -> dict[str, Any] | None:
        """How keys and values are cached, where the checkpoint says so."""
        found: dict[str, Any] | None = self.config["quantization_config"].get("kv")
        return found

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name to shard."""
        return weight_map(self.directory)

    @cached_property
    def model_config(self) -> PretrainedConfig:
        """config.json as transformers reads it. Raises InputError for what it cannot."""
        try:
            return AutoConfig.from_pretrained(self.directory, trust_remote_code=False)
        except Exception as error:  # config classes validate with their own exceptions
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"{self.directory}/config.json: not a model this transformers can read ({reason})"
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        """Of what the checkpoint keeps in float; its config has it as `dtype` or, when it is older, as `torch_dtype`."""
        found = self.model_config.dtype
        return found if found in (torch.bfloat16, torch.float16) else torch.float32

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The model as transformers builds it, without weights, by module name."""
        return dict(empty_model(self.model_config).named_modules())

    def linears(self) -> list[str]:
        """Names of all nn.Linear but the head."""
        head = self.head
        return [name for name, m in self.modules.items() if isinstance(m, nn.Linear) and name != head]

    @property
    def head(self) -> str:
        """The module name of the output head."""
        top: Any = self.modules[""]
        head = top.get_output_embeddings()
        return next(name for name, module in self.modules.items() if module is head)

    def check_names(self, account: Account) -> None:
        """Refuse layers that transformers does not have under that name and shape: fused experts, transposed Conv1D."""
        for name, form in self.forms.items():
            weight = getattr(self.modules.get(name), "weight", None)
            if weight is None or list(weight.shape) != form["shape"]:
                raise account.refuse("experts or Conv1D layers as anybit stores them, one by one and [out, in]", name)

    def width(self, name: str) -> int:
        """Bits at which a layer is read."""
        offered = precisions(self.forms[name])
        return offered[-1] if self.precision is None else width_read(offered, self.precision)

    def layer(self, name: str) -> Layer:
        """A quantized layer with its tensors in memory."""
        tensors = {key: self.tensor(f"{name}.{key}") for key in tensor_specs(self.forms[name])}
        return Layer(name, self.forms[name], tensors, self.width(name))

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        with safe_open(self.directory / self.files[name], framework="pt") as shard:
            return shard.get_tensor(name)

    def shards(self) -> Iterator[tuple[list[str], list[str]]]:
        """Shard by shard: the layers whose codes lie in it, and the tensors that belong to no layer."""
        owned = {f"{name}.{key}" for name, form in self.forms.items() for key in tensor_specs(form)}
        by_file: dict[str, list[str]] = {}
        for name, file in self.files.items():
            by_file.setdefault(file, []).append(name)
        for file in sorted(by_file):
            layers = [name for name in self.forms if self.files[f"{name}.weight"] == file]
            yield layers, [name for name in by_file[file] if name not in owned]


def exact_float(values: Tensor, preferred: torch.dtype) -> Tensor:
    """values float32 in `preferred` if that holds every one of them, else as they are."""
    cast = values.to(preferred)
    return cast if torch.equal(cast.float(), values) else values
