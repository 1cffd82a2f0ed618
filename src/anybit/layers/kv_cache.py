"""Keys and values in transformers' cache, held as `KVSpec` says: the same codes and ranges as the native decoder's pages.

A query sees what its position says (`KVSpec.sealed`) when tokens come one by one. Tokens that come together, as a prompt
does, all see what the first of them sees, so a prompt in one piece reads its own keys and values in 16 bits unless pages are
never open; cut it where a page begins to read what the native decoder reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from anybit.errors import InputError
from anybit.formats.kv import PAGE, KVSpec, check_head
from anybit.kernels.attention.reference import quantize
from anybit.kernels.hadamard.reference import transform


class Codes:
    """Keys or values of a run of tokens: codes that share bytes along the last axis, scale and minimum float16; [B, H, T, ...],
    or [B, H, pages, ...] where ranges are per channel. At 16 bits float16 [B, H, T, D] alone."""

    def __init__(self, bits: int, channels: bool) -> None:
        self.bits, self.channels, self.held = bits, channels, tuple[Tensor, ...]()

    def append(self, x: Tensor) -> None:
        """Float [B, H, T, D]; whole pages where ranges are per channel."""
        new = self._encode(x.float())
        self.held = tuple(torch.cat(pair, 2) for pair in zip(self.held, new, strict=True)) if self.held else new

    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.bits == 16:
            return (_half(x),)
        if self.channels:
            x = x.unflatten(2, (-1, PAGE)).transpose(-1, -2)
        codes, scale, minimum = quantize(x, self.bits)
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=x.device)
        return (codes.unflatten(-1, (-1, len(shifts))) << shifts).sum(-1, dtype=torch.uint8), scale, minimum

    def read(self) -> list[Tensor]:
        """Float32 [B, H, T, D]; nothing where there is nothing."""
        if len(self.held) < 3:
            return [x.float() for x in self.held]
        packed, scale, minimum = self.held
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=packed.device)
        codes = (packed[..., None] >> shifts & (2**self.bits - 1)).flatten(-2)
        x = minimum.float()[..., None] + scale.float()[..., None] * codes.float()
        return [x.transpose(-1, -2).flatten(2, 3) if self.channels else x]

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens`, whole pages where ranges are per channel."""
        self.held = tuple(x[:, :, : tokens // PAGE if self.channels else tokens] for x in self.held)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor [B, ...]."""
        self.held = tuple(change(x) for x in self.held)


def _half(x: Tensor) -> Tensor:
    """Nearest float16, saturated."""
    return x.float().clamp(-65504, 65504).half()


def _rotate(x: Tensor) -> Tensor:
    """Each head times the orthogonal Hadamard matrix, its own inverse."""
    return transform(x.float(), x.shape[-1])


class KVLayer(DynamicLayer):
    """One layer: first tokens in 16 bits, codes, newest tokens in 16 bits. Tensors are [B, H, T, D] as attention takes them.

    Of the newest tokens, a page's are kept until the next page is sealed, so that up to a page can be forgotten again. The base
    class's own tensors stay empty.
    """

    def __init__(self, spec: KVSpec) -> None:
        super().__init__()
        self.spec = spec
        self._codes = (Codes(spec.key_bits, spec.keys == "channel"), Codes(spec.value_bits, False))
        self._first: tuple[Tensor, ...] = ()  # keys and values, float16, as `_newest`
        self._newest: tuple[Tensor, ...] = ()
        self._length = self._sealed = self._from = 0  # tokens; end of the codes; position of the first of `_newest`

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens and return all keys and values as the first of them sees them, in the dtype they came in."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = _rotate(key_states) if self.spec.rotated else key_states
        if self.spec.seals:
            self._seal()
            new = (_half(keys), _half(value_states))
            self._newest = tuple(torch.cat(pair, 2) for pair in zip(self._newest, new, strict=True))
        else:
            for codes, x in zip(self._codes, (keys, value_states), strict=True):
                codes.append(x)
            self._sealed += keys.shape[2]
        self._length += keys.shape[2]
        return self.read()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty 16-bit tensors of the right sizes."""
        super().lazy_initialization(key_states, value_states)
        self._newest = key_states[:, :, :0].half(), value_states[:, :, :0].half()

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys, without the rotation, and values."""
        start = max(self._sealed, self.spec.sink if self._first else 0) - self._from
        keys, values = (
            torch.cat([*first, *codes.read(), newest[:, :, max(start, 0) :].float()], 2)
            for first, codes, newest in zip(
                ([x.float()] for x in self._first) if self._first else ([], []),
                self._codes,
                self._newest,
                strict=True,
            )
        )
        if self.spec.rotated:
            keys = _rotate(keys)
        return keys.to(self.dtype), values.to(self.dtype)

    def _seal(self) -> None:
        """Codes for the pages whose time has come; of the tokens in 16 bits, the last sealed page stays."""
        sink, end = self.spec.sink, self.spec.sealed(self._length)
        if sink and not self._first and self._length >= sink:
            self._first = tuple(x[:, :, :sink] for x in self._newest)
        start = max(self._sealed, sink)
        if end <= start:
            return
        for codes, x in zip(self._codes, self._newest, strict=True):
            codes.append(x[:, :, start - self._from : end - self._from])
        self._sealed = end
        before, self._from = self._from, max(end - PAGE, sink)
        self._newest = tuple(x[:, :, self._from - before :] for x in self._newest)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens, as if they had never come.

        Raises:
            InputError: what a sealed page held in 16 bits is gone.
        """
        length = self._length + min(tokens_to_remove, 0)
        if length == 0:
            self.reset()
            return
        end = length if not self.spec.seals else min(self._sealed, self.spec.sealed(length))
        lowest = max(end, self.spec.sink if self._first else 0)
        if self.spec.seals and (self._from > lowest or length < lowest):
            raise InputError(f"cannot forget down to token {length}: its page is sealed; keep {self._from} or more")
        for codes in self._codes:
            codes.crop(max(end - self.spec.sink, 0))
        self._length, self._sealed = length, end
        self._newest = tuple(x[:, :, : max(length - self._from, 0)] for x in self._newest)

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.spec)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams in another order."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the sequences."""
        self._each(lambda x: x[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        for codes in self._codes:
            codes.each(change)
        self._newest, self._first = tuple(map(change, self._newest)), tuple(map(change, self._first))


class KVCache(DynamicCache):
    """A layer of codes for each of the model's layers."""

    def __init__(self, spec: KVSpec, layers: int) -> None:
        Cache.__init__(self, layers=[KVLayer(spec) for _ in range(layers)])
        self.spec = spec


def cache_as(model: nn.Module, spec: KVSpec) -> None:
    """Make a transformers model cache keys and values by `spec`, in `forward` and `generate` alike. FormatError: heads that the
    spec does not fit."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    check_head(spec, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    first = not hasattr(model, "kv_spec")
    model.kv_spec = spec  # type: ignore[assignment]
    if first:
        model.register_forward_pre_hook(_put_cache, with_kwargs=True)


def _put_cache(model: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Ours in place of none, or of the empty one that `generate` makes."""
    given = options.get("past_key_values")
    wanted = options.get("use_cache")
    if isinstance(given, KVCache) or not (model.config.use_cache if wanted is None else wanted):
        return args, options
    if given is not None and (type(given) is not DynamicCache or given.get_seq_length() > 0):
        raise InputError(
            f"this model caches keys and values as {model.kv_spec.word}, not in a {type(given).__name__}; "
            "leave past_key_values out"
        )
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return args, {**options, "past_key_values": KVCache(model.kv_spec, layers)}
