"""A checkpoint run by the native decoder: no transformers model, no PyTorch and no Python inside a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybit.checkpoint.layout import read_config
from anybit.engine import build, checks
from anybit.engine.architectures import Architecture, architecture
from anybit.engine.drafting.pass_times import PassTimes
from anybit.engine.weight_bytes import WeightBytes
from anybit.errors import InputError, KernelUnavailable
from anybit.formats.kv import PAGE, KVSpec, check_head
from anybit.kernels import native
from anybit.layers.precision import Precision, available_precisions

Floats = NDArray[np.float32]
DEFAULT_TOKENS = 8192
CACHED_BYTES = 2 << 20


class NativeModel:
    """Weights, key-value cache and workspace of one model. Sequences live in slots 0..max_sequences-1.

    Every row's logits depend on the tokens of its own sequence alone (and on which of them were prompt), bit for bit: not on
    how a prompt is cut, what else runs in the same call, or the number of threads. Calls from several threads must not overlap.

    Attributes:
        facts: sizes of the model.
        context: longest sequence, in tokens.
        kv: how keys and values are cached.
        end_ids: ids that end a text.
        times: of passes that made text.
        precision: bits at which nested weights are read from the next call on. The cache stays as it is: whoever shares the
            model among requests writes it before each request's pass.
    """

    def __init__(
        self, directory: Path, decoder: Any, facts: Architecture, kept: list[Any], context: int, kv: KVSpec
    ) -> None:
        """See `open`."""
        self.kv = kv
        self._decoder, self._kept = decoder, kept
        self.facts, self.context = facts, context
        self.end_ids = _end_ids(directory)
        self.precision: Precision = kept[0]
        self.times = PassTimes()

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        kv: KVSpec | int | None = None,
        max_tokens: int | None = None,
        max_sequences: int = 8,
        threads: int | None = None,
        verify: bool = True,
    ) -> NativeModel:
        """Read a checkpoint that `anybit quantize` wrote, with its files and answers checked.

        Args:
            directory: the checkpoint.
            kv: the cache; a number stands for so many bits with ranges per token. Default: what the checkpoint says, else 8.
            max_tokens: that the cache holds, all sequences together; default: the model's context, at most 8192.
            max_sequences: slots.
            threads: of all native kernels in this process; default: as they are.
            verify: compare every tensor with the ledger's sha256 first, and the canary's logits at the end
                (`checks.TOLERANCE`); 0.3 s a gigabyte with two threads, and one prompt of 16 tokens.

        Raises:
            InputError: a number out of range. FormatError: damaged or altered files. PromiseError: the canary's logits
                differ.
            KernelUnavailable: the model cannot run natively, with the reason.
        """
        path = Path(directory)
        if not path.is_dir():
            raise InputError(f"{directory}: no such directory; give one that `anybit quantize` wrote")
        config = read_config(path)
        forms = config["quantization_config"]["layers"]
        if reason := build.refusal(config, forms):
            raise KernelUnavailable(f"{directory} cannot run in the native decoder: {reason}; use the torch engine")
        facts = architecture(config)
        tokens = min(facts.context, DEFAULT_TOKENS) if max_tokens is None else max_tokens
        if tokens < 1 or max_sequences < 1:
            raise InputError(f"need max_tokens >= 1 and max_sequences >= 1, not {tokens}, {max_sequences}")
        spec = _cache_spec(kv, config, facts.head_dim)
        if threads is not None:
            native.set_threads(threads)
        if verify:
            checks.check_hashes(path, native.loaded().threads())
        precision = Precision(available_precisions(forms.values()))
        context = min(tokens, facts.context)
        builder = build.Builder(path, facts, config, forms, context, [precision])
        model = builder.build()
        model.set_precision(precision.cell.ctypes.data)
        model.rotated_keys = spec.rotated
        rows = min(pass_rows(facts), tokens)
        decoder = native.loaded().decoder.Decoder(model, _native_spec(spec), tokens, max_sequences, rows)
        opened = cls(path, decoder, facts, builder.kept, context, spec)
        if verify:
            checks.check_canary(path, opened.prefill, context, min(spec.key_bits, spec.value_bits))
            opened.reset()
            opened.weight_bytes()
        return opened

    def forward(self, rows: Sequence[tuple[int, int]], wanted: Sequence[int], *, prompt: bool = False) -> Floats:
        """Append tokens to sequences and return logits.

        Args:
            rows: (token id, slot), each the next position of its slot.
            wanted: ascending indices into `rows`.
            prompt: read them as text that is given, not generated: where the processor has a bfloat16 matrix unit, blocks
                multiply bfloat16 activations there, which is several times faster for many rows and agrees with the
                integers of decoding to rounding only. Either way the number of rows changes nothing.

        Returns:
            float32 [len(wanted), vocabulary].

        Raises:
            InputError: an id or slot out of range, or a full cache; nothing has changed then.
        """
        out = np.empty((len(wanted), self.facts.vocab), np.float32)
        self._run(self._decoder.logits, rows, wanted, prompt, out.ctypes.data)
        return out

    def top(
        self, rows: Sequence[tuple[int, int]], wanted: Sequence[int], k: int = 1, *, prompt: bool = False
    ) -> tuple[Floats, NDArray[np.int32]]:
        """As `forward`, but only the k <= 64 largest logits, float32, and their ids, int32 [len(wanted), k], best first.

        Equal logits are in the order of their ids.
        """
        values, ids = np.empty((len(wanted), k), np.float32), np.empty((len(wanted), k), np.int32)
        self._run(self._decoder.top, rows, wanted, prompt, k, values.ctypes.data, ids.ctypes.data)
        return values, ids

    def prefill(self, ids: Sequence[int], slot: int = 0) -> Floats:
        """Append a prompt to a slot; logits float32 [vocabulary] after its last token."""
        return self.forward([(token, slot) for token in ids], [len(ids) - 1], prompt=True)[0]

    def step(self, tokens: Mapping[int, int]) -> Floats:
        """Append one token to each of some slots, {slot: id}; logits float32 [len(tokens), vocabulary] in that order."""
        return self.forward([(token, slot) for slot, token in tokens.items()], range(len(tokens)))

    def logits(self, ids: Sequence[int], slot: int = 0, *, prompt: bool = False) -> Floats:
        """Logits float32 [len(ids), vocabulary] of a text that replaces what the slot held, as if decoded token by token
        (`prompt`: as if given, see `forward`)."""
        self.reset(slot)
        return self.forward([(token, slot) for token in ids], range(len(ids)), prompt=prompt)

    def set_offsets(self, offsets: Sequence[int]) -> None:
        """Bits that each layer's nested weights add to `precision` from the next call on; a sum that a weight does not offer is
        read at the next wider width it does offer, or at its widest or narrowest. The head follows `precision` alone.

        Raises:
            InputError: not one offset for each layer.
        """
        if len(offsets) != self.facts.layers:
            raise InputError(f"this model has {self.facts.layers} layers, got {len(offsets)} precision offsets")
        self._decoder.set_offsets(np.array(offsets, np.int32).ctypes.data)

    def weight_bytes(self) -> WeightBytes:
        """Bytes of weights that kernels were given since this was last called: `planned_bytes` says what they should be."""
        return WeightBytes(*self._decoder.weight_bytes())

    def last_keys_values(self, slot: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys (after RoPE) and values of the last layer as attention sees them, with the rounding of the cache, each float32
        [kv_heads, T, head_dim]; of all T positions, whatever the layer's window."""
        shape = (self.facts.kv_heads, self.length(slot), self.facts.head_dim)
        keys, values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._decoder.read_cache(self.facts.layers - 1, slot, keys.ctypes.data, values.ctypes.data)
        if self.kv.rotated:  # back: the matrix is its own inverse
            keys = np.einsum("htd,de->hte", keys, _hadamard(shape[-1]))
        return keys, values

    def length(self, slot: int = 0) -> int:
        """Tokens a slot holds."""
        return int(self._decoder.length(self._slot(slot)))

    def truncate(self, slot: int, length: int) -> None:
        """Forget a slot's tokens from `length` on, as if they had never been run.

        Raises:
            InputError: more than the slot holds; or so far back that what a page held in 16 bits is gone (`KVSpec`: a cache
                that seals pages keeps it for another page's length).
        """
        if not 0 <= length <= self.length(slot):
            raise InputError(f"slot {slot} holds {self.length(slot)} tokens, cannot keep {length}")
        try:
            self._decoder.truncate(slot, length)
        except ValueError as error:
            raise InputError(f"slot {slot}: {error}") from None

    @property
    def slots(self) -> int:
        """Sequences that fit at once."""
        return int(self._decoder.slots())

    @property
    def free_pages(self) -> int:
        """Pages of `PAGE` tokens that no slot and nobody else holds."""
        return int(self._decoder.free_tokens()) // PAGE

    def attach_pages(self, slot: int, pages: Sequence[int]) -> None:
        """Let an empty slot begin with these pages, which stay shared; only where the cache does not seal (`KVSpec.seals`)."""
        numbers = np.array(pages, np.uint32)
        self._decoder.attach(self._slot(slot), numbers.ctypes.data, len(numbers))

    def hold_page(self, slot: int, index: int) -> int:
        """Keep a full page of a slot beyond the slot's own use of it; its number."""
        return int(self._decoder.hold(self._slot(slot), index))

    def release_page(self, page: int) -> None:
        """Undo one `hold_page`."""
        self._decoder.release(page)

    def reset(self, slot: int = 0) -> None:
        """Empty a slot."""
        self._decoder.truncate(self._slot(slot), 0)

    def _slot(self, slot: int) -> int:
        if not 0 <= slot < self._decoder.slots():
            raise InputError(f"slot {slot} is not one of {self._decoder.slots()}; raise max_sequences")
        return slot

    def _run(self, call: Any, rows: Sequence[tuple[int, int]], wanted: Sequence[int], *rest: int) -> None:
        batch = np.array(rows, np.int32).reshape(-1, 2).T.copy()
        want = np.array(wanted, np.int32)
        if len(want) and (want[0] < 0 or want[-1] >= len(rows) or (want[1:] < want[:-1]).any()):
            raise InputError(f"wanted rows must ascend within 0..{len(rows) - 1}, got {list(wanted)}")
        try:
            call(batch[0].ctypes.data, batch[1].ctypes.data, len(rows), want.ctypes.data, len(want), *rest)
        except ValueError as error:
            raise InputError(str(error)) from None


def _cache_spec(kv: KVSpec | int | None, config: Mapping[str, Any], head_dim: int) -> KVSpec:
    """What was asked for, else what the checkpoint says, else 8 bits."""
    if isinstance(kv, int):
        kv = KVSpec(kv, kv)
    saved = config["quantization_config"].get("kv")
    spec = kv or (KVSpec.read(saved) if saved else KVSpec())
    check_head(spec, head_dim)
    return spec


def _native_spec(spec: KVSpec) -> tuple[int, int, bool, bool, int, int]:
    """As native/decoder/bind.cpp takes it."""
    channels = spec.keys == "channel"
    return spec.key_bits, spec.value_bits, channels, spec.seals, spec.sink // PAGE, spec.window // PAGE


def _hadamard(size: int) -> Floats:
    """The orthogonal Sylvester-Hadamard matrix [size, size]."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(size))


def pass_rows(facts: Architecture) -> int:
    """Rows that go through the layers at once: decoding a weight is shared by all of them, but their widest activations,
    as bfloat16, should stay in the second-level cache."""
    return 512 if 512 * 2 * facts.intermediate <= CACHED_BYTES else 256


def _end_ids(directory: Path) -> frozenset[int]:
    """Ids that end a text: the generation config's, else the model configuration's."""
    for file in ("generation_config.json", "config.json"):
        if (directory / file).is_file():
            ends = json.loads((directory / file).read_text()).get("eos_token_id")
            if ends is not None:
                return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()
