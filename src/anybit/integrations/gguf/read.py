"""GGUF -> anybit: blocks become planes with the same values, floats stay floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from anybit.cache import sampled_sha256
from anybit.errors import InputError
from anybit.formats.blocked import Blocked
from anybit.formats.decoder import groups, per_column
from anybit.formats.terms import CodeTerm, save_terms
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.foreign import Shape, Stored, affine_layer, check_blocks
from anybit.integrations.gguf.blocks import (
    Bytes,
    Unpacked,
    unpack_q4_0,
    unpack_q4_1,
    unpack_q5_0,
    unpack_q5_1,
    unpack_q8_0,
)
from anybit.integrations.gguf.kquants import unpack_q4_k, unpack_q5_k, unpack_q6_k
from anybit.integrations.gguf.names import Names
from anybit.models.gguf import UNREADABLE, check_gguf, parsing

# type -> (reader of rows, bits, columns per step, columns per float)
CODES: dict[Type, tuple[Callable[[Bytes], Unpacked], int, int, int]] = {
    Type.Q4_0: (unpack_q4_0, 4, 32, 32),
    Type.Q4_1: (unpack_q4_1, 4, 32, 32),
    Type.Q5_0: (unpack_q5_0, 5, 32, 32),
    Type.Q5_1: (unpack_q5_1, 5, 32, 32),
    Type.Q8_0: (unpack_q8_0, 8, 32, 32),
    Type.Q4_K: (unpack_q4_k, 4, 32, 256),
    Type.Q5_K: (unpack_q5_k, 5, 32, 256),
    Type.Q6_K: (unpack_q6_k, 6, 16, 256),
}
FLOATS = (Type.F32, Type.F16, Type.BF16)


class GGUF:
    """A .gguf file, mapped; see `exchange.open.Foreign`."""

    format = "GGUF"

    def __init__(self, path: Path, account: Account) -> None:
        """Reads the header. Raises InputError for a damaged file or an architecture that is not known here."""
        check_gguf(path)
        self.path, self._account = path, account
        with parsing(path, UNREADABLE):
            self._file = gguf.GGUFReader(path)
            self._tensors = {tensor.name: tensor for tensor in self._file.tensors}
            check_blocks(self._setting("block_count"), len(self._tensors))
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
            tied = "output.weight" not in self._tensors
            self.config: dict[str, Any] = config.to_dict() | {"tie_word_embeddings": tied, "dtype": "float32"}
            width = self._setting("attention.key_length")
            if width is not None:  # transformers forgets it for some architectures
                self.config["head_dim"] = int(width)
            self._names = Names(self.config)
            scaling = self._setting("rope.scaling.type")
        self._refuse_what_is_not_read(scaling)

    def _refuse_what_is_not_read(self, scaling: str | None) -> None:
        # Neither do we nor does transformers' reader: the model would run, and be another one.
        if "rope_freqs.weight" in self._tensors or scaling not in (None, "none"):
            raise InputError(
                f"{self.path}: changed rotary frequencies ({scaling or 'rope_freqs'}) are not read; take a Hugging Face directory"
            )
        odd = sorted({t.tensor_type.name for t in self._file.tensors if t.tensor_type not in (*CODES, *FLOATS)})
        if odd:
            known = ", ".join(kind.name for kind in (*CODES, *FLOATS))
            raise InputError(
                f"{self.path}: holds {', '.join(odd)} tensors, anybit has no form for them ({known} are read); "
                "`anybit quantize` takes the file, dequantized"
            )

    def _setting(self, key: str) -> Any:
        """The architecture's own setting; None where the file has none."""
        architecture = self._file.get_field("general.architecture")
        field = None if architecture is None else self._file.get_field(f"{architecture.contents()}.{key}")
        return None if field is None else field.contents()

    def layer(self, name: str, shape: Shape) -> Stored | None:
        """See `Foreign`."""
        tensor = self._tensor(f"{name}.weight", shape)
        if tensor.tensor_type not in CODES:
            return None
        unpack, bits, size, block = CODES[tensor.tensor_type]
        found = unpack(self._rows(f"{name}.weight", tensor, shape[0]))
        if found.codes.shape != shape or not all(
            bool(t.isfinite().all()) for t in (found.scale, found.offset) if t is not None
        ):
            raise InputError(f"{self.path}: {tensor.name} holds NaN or infinite scales, the file is damaged")
        if found.step is None and found.offset is None:
            zero = torch.full(found.scale.shape, 2 ** (bits - 1))
            return affine_layer(name, (bits, size), found.codes, found.scale.float(), zero, self._account)
        return _blocked(found, bits, size, block)

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `Foreign`."""
        tensor = self._tensor(name, shape)
        if tensor.tensor_type not in FLOATS:
            raise InputError(f"{self.path}: {tensor.name} is {tensor.tensor_type.name}; it must be float")
        data = self._rows(name, tensor, shape[0])
        if tensor.tensor_type == Type.BF16:
            return torch.from_numpy(data.view(np.uint8)).view(torch.bfloat16).reshape(shape)
        return torch.from_numpy(data.reshape(shape))

    def companions(self, folder: Path) -> Path:
        """Its tokenizer, as transformers reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        with parsing(self.path, "no tokenizer that transformers can read"):
            where = {"gguf_file": self.path.name, "trust_remote_code": False}
            AutoTokenizer.from_pretrained(str(self.path.parent), **where).save_pretrained(folder)
        return folder

    def identity(self) -> dict[str, Any]:
        """Size and a sampled hash."""
        return {"format": self.format, "size": self.path.stat().st_size, "sha256_sampled": sampled_sha256(self.path)}

    def _tensor(self, name: str, shape: tuple[int, ...]) -> gguf.ReaderTensor:
        tensor = self._tensors.get(self._names.gguf_name(name))
        if tensor is None:
            raise InputError(f"{self.path}: lacks {self._names.gguf_name(name)}; the file is incomplete")
        found = tuple(int(n) for n in reversed(tensor.shape))
        if found != shape:
            raise InputError(f"{self.path}: {tensor.name} is {list(found)}, its metadata want {list(shape)}")
        return tensor

    def _rows(self, name: str, tensor: gguf.ReaderTensor, rows: int) -> Any:
        """The tensor's data as [N, ...], a copy, in transformers' order of rows."""
        data = np.array(tensor.data).reshape(rows, -1)
        order = self._names.order(name, rows)
        return data if order is None else data[np.argsort(order.numpy())]


def _blocked(found: Unpacked, bits: int, size: int, block: int) -> Stored:
    """A scale of 0 becomes 1 with steps of 0, or with codes of 0 where there are no steps: the values stay."""
    empty, codes, step = found.scale == 0, found.codes, found.step
    columns = codes.shape[1]
    if step is None:
        codes = torch.where(per_column(empty, columns, block), 0, codes)
    else:
        step = torch.where(per_column(empty, groups(columns, size), block // size), 0, step)
    scale = torch.where(empty, torch.ones_like(found.scale), found.scale)
    decoder = Blocked(bits, size, block, scale, step, found.offset, found.offset_step)
    return save_terms([CodeTerm.from_codes(codes.contiguous(), decoder)], (codes.shape[0], columns))
