"""`anybit import`: another engine's checkpoint as one of ours, with its codes as they are, a ledger and a canary.

One block in memory at a time: its layers are read, checked, written, and the canary's tokens go through what was written.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from anybit.blocks import Quantized
from anybit.calibration.entry import Entry
from anybit.calibration.progress import Progress, silent
from anybit.calibration.statistics import BlockCall
from anybit.checkpoint.canary import CANARY, echoes, write_canary
from anybit.checkpoint.finish import finish_directory
from anybit.checkpoint.layout import shard_name
from anybit.checkpoint.ledger import IMPORTED, Row, check_numbers, form_word, row
from anybit.checkpoint.partial import Partial, check_apart, write_json, write_shard
from anybit.errors import InputError, PromiseError
from anybit.formats.decoder import Form
from anybit.formats.terms import stored_bits
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.open import Foreign, open_foreign
from anybit.layers.linear import Terms, kernel_name
from anybit.layers.swap import quantized, tie_head
from anybit.models.normalize import conv1d_weights, normalize
from anybit.models.skeleton import empty_model, release
from anybit.models.structure import Structure, find_structure

CANARY_TOKENS = 16
ECHOES = 8


def import_checkpoint(
    path: str | Path,
    *,
    out: str | Path,
    allow_loss: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the GPTQ, AWQ, compressed-tensors or GGUF checkpoint at `path` as an anybit checkpoint into directory `out`.

    Returns `format, path, lossless, layers, bits_per_weight, size_bytes, notes`.

    Raises:
        InputError: a checkpoint that cannot be read, or holds what anybit has no word for. `out` does not exist then.
    """
    account = Account("anybit", allow_loss)
    partial = Partial(Path(out))
    check_apart(partial.out, Path(path))
    foreign = open_foreign(Path(path), account)
    identity = {"imported": foreign.identity()}
    partial.begin(identity, resume=False, overwrite=overwrite)
    with _nothing_left_behind(partial):
        adoption = Adoption(foreign, partial, account)
        adoption.run(progress or silent)
        source = foreign.companions(partial.state / "source")
        if not (source / "config.json").is_file():
            write_json(source / "config.json", foreign.config)
        ledger = adoption.ledger(str(path), identity)
        finished = finish_directory(partial, source, adoption.shards, ledger, adoption.forms, adoption.rows)
    return {
        "format": foreign.format,
        "path": str(out),
        "lossless": account.lossless,
        "layers": len(finished.tensors),
        "bits_per_weight": finished.bits_per_weight,
        "size_bytes": finished.size_bytes,
        "notes": account.lines(),
    }


@contextmanager
def _nothing_left_behind(partial: Partial) -> Iterator[None]:
    """Remove the unfinished directory when the block fails: an import is quick, there is nothing to resume."""
    try:
        yield
    finally:
        shutil.rmtree(partial.root, ignore_errors=True)


class Adoption:
    """The state of one import: forms and ledger rows so far, and the canary's hidden states."""

    def __init__(self, foreign: Foreign, partial: Partial, account: Account) -> None:
        self.foreign, self.partial, self.account = foreign, partial, account
        config = _model_config(foreign.config)
        self.model, self.dtype = _skeleton(config), config.dtype
        self.structure: Structure = find_structure(self.model)
        self.shards = len(self.structure.blocks) + 2
        self.forms: dict[str, Form] = {}
        self.rows: list[Row] = []
        self.kept: dict[str, tuple[int, int]] = {}  # float tensors: elements, bytes

    def run(self, progress: Progress) -> None:
        """Everything but the ledger."""
        structure, blocks = self.structure, self.structure.blocks
        self._shard(1, [structure.embedding, *structure.pre])
        if structure.tied:
            self._tie()
        ids = torch.arange(CANARY_TOKENS) * 7919 % structure.geometry.vocab
        entry = Entry(self.model, blocks)
        streams = [entry.hidden(ids)]
        for index, name in enumerate(blocks):
            progress("import blocks", index, len(blocks))
            self._shard(index + 2, [name])
            streams = self._with_echoes(streams)
            call = BlockCall(self.model.get_submodule(name), entry.arguments(ids)[index])
            with torch.no_grad():
                streams = [call.run(hidden) for hidden in streams]
            release(self.model.get_submodule(name))
            self.model.get_submodule(name).apply(_forget)
        progress("import blocks", len(blocks), len(blocks))
        ends = [structure.final_norm] if structure.final_norm else []
        self._shard(self.shards, ends if structure.tied else [*ends, structure.head])
        streams = self._with_echoes(streams)
        answer, *echoed = [entry.logits(ids, hidden)[-1] for hidden in streams]
        if not bool(answer.isfinite().all()):
            raise InputError(
                "the imported model answers with NaN or infinity; the checkpoint is damaged, download it again"
            )
        write_canary(self.partial.root / CANARY, ids, answer, echoed)
        if not self.forms:
            raise InputError(
                "no layer of this checkpoint holds codes anybit reads; give it to `anybit quantize` instead"
            )

    def ledger(self, model: str, identity: dict[str, Any]) -> dict[str, Any]:
        """The account for `finish_directory`."""
        kept_weights, kept_bytes = (sum(sizes[i] for sizes in self.kept.values()) for i in (0, 1))
        weights = kept_weights + sum(form["shape"][0] * form["shape"][1] for form in self.forms.values())
        size = kept_bytes + sum(stored_bits(form) for form in self.forms.values()) // 8
        dtype = self.dtype if isinstance(self.dtype, torch.dtype) else torch.float32
        sizes = {"size_bytes": size, "float_bytes": weights * dtype.itemsize, "bits_per_weight": 8 * size / weights}
        return {"model": model, "recipe": f"imported from {self.foreign.format}", "identity": identity, **sizes}

    def _with_echoes(self, streams: list[Tensor]) -> list[Tensor]:
        """From the first layer on that rounds its input, be it in a late block."""
        rounds = any("activations" in form for form in self.forms.values())
        return [*streams, *echoes(streams[0], ECHOES)] if rounds and len(streams) == 1 else streams

    def _tie(self) -> None:
        embedding, head = self.structure.embedding, self.structure.head
        if embedding in self.forms:
            tie_head(self.model, embedding, head)
        else:
            self.model.get_submodule(head).weight = self.model.get_parameter(f"{embedding}.weight")

    def _shard(self, number: int, names: list[str]) -> None:
        """Read the modules `names` into the model and write them as one shard."""
        tensors: dict[str, Tensor] = {}
        for top in names:
            module = self.model.get_submodule(top)
            for inner, each in list(module.named_modules()):
                name = ".".join(filter(None, (top, inner)))
                if isinstance(each, nn.Linear | nn.Embedding):
                    tensors |= self._codes(name, each)
                tensors |= self._floats(name, each)
        write_shard(self.partial.root / shard_name(number, self.shards), tensors)

    def _codes(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of a linear or embedding that holds codes; our layer stands in its place then."""
        rows, columns = module.get_parameter("weight").shape
        stored = self.foreign.layer(name, (rows, columns))
        if stored is None:
            return {}
        form, tensors = stored
        notes = [f"imported from {self.foreign.format}: codes and scales as they were"]
        facts = {"calibration_tokens": 0, "error": 0.0, "kernel": kernel_name(form, 1), "notes": notes}
        try:
            found = Quantized(name, form, tensors, row(name, form_word(form), form, tensors, **facts))
        except PromiseError as error:
            raise InputError(f"{error}; the checkpoint is damaged, download it again") from None
        self.forms[name] = form
        self.rows.append(found.row.model_copy(update={"planned": IMPORTED}))
        layer = quantized(module, form)
        layer.fill(tensors)
        self.model.set_submodule(name, layer)
        if module._parameters.get("bias") is not None:
            bias = self._read(f"{name}.bias", module.get_parameter("bias"))
            layer.register_parameter("bias", nn.Parameter(bias.float(), requires_grad=False))
            tensors = tensors | {"bias": bias}
        return {f"{name}.{key}": tensor for key, tensor in tensors.items()}

    def _floats(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """Parameters of the module itself that are floats, loaded into it."""
        if name in self.forms:
            return {}
        tensors = {}
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            value = self._read(f"{name}.{leaf}", parameter)
            module.register_parameter(leaf, nn.Parameter(value.float(), requires_grad=False))
            tensors[f"{name}.{leaf}"] = value
        return tensors

    def _read(self, name: str, parameter: Tensor) -> Tensor:
        value = self.foreign.floats(name, tuple(parameter.shape))
        if not value.is_floating_point():
            raise InputError(f"{name} is {value.dtype} and not float; config.json says nothing of codes there")
        try:
            check_numbers(name, {"value": value.float()})
        except PromiseError as error:
            raise InputError(f"{error}; the checkpoint is damaged, download it again") from None
        self.kept[name] = (value.numel(), value.numel() * value.element_size())
        return value


def _model_config(config: dict[str, Any]) -> PretrainedConfig:
    """As transformers reads it. Raises InputError for what it cannot."""
    try:
        return AutoConfig.for_model(**copy.deepcopy(config))
    except Exception as error:  # config classes validate with their own exceptions
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"config.json: not a model this transformers can read ({reason})") from error


def _skeleton(config: PretrainedConfig) -> nn.Module:
    """The model of `config`, without weights. Raises InputError for kinds of modules that anybit stores under other names."""
    kind, model = config.model_type, empty_model(config)
    before = {name for name, _ in model.named_parameters()}
    if conv1d_weights(model):
        raise InputError(f"{kind}: its linears are Conv1D, transposed; only nn.Linear layers are imported")
    normalize(model)
    if {name for name, _ in model.named_parameters()} != before:
        raise InputError(f"{kind}: fused experts are not imported yet; only models of plain nn.Linear layers are")
    return model


def _forget(module: nn.Module) -> None:
    """Drop what a quantized layer has prepared from tensors that were let go."""
    if isinstance(module, Terms):
        module.forget()
