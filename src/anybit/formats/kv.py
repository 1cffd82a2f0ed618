"""How keys and values are cached: a frozen description, written to config.json and read by every engine.

A page is 64 tokens. Keys and values are codes with a range each: x ~ m + s * code, s and m float16, found from what is
cached and from nothing else (there is no scale before there is data). One range covers one token and head (`token`, as
QServe), or, for keys, one channel over a page (`channel`, as KIVI). With `channel`, `sink` or `window` pages are written in
16 bits and sealed later: page p before position 64 (p + 1) + window is written, so what a token sees depends on its
position alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from anybit.errors import FormatError

PAGE = 64
BITS = (16, 8, 4, 2)


@dataclass(frozen=True)
class KVSpec:
    """One cache.

    Attributes:
        key_bits, value_bits: 16 (float16), 8, 4 or 2.
        keys: what shares a range: `token`, or `channel` over the 64 tokens of a page.
        sink: first tokens that stay in 16 bits, a multiple of 64.
        window: newest tokens that stay in 16 bits beside those of the unfinished page, a multiple of 64.
        rotated: queries and keys get a Hadamard transform of each head after RoPE (QuaRot's R3), which spreads loud
            channels; head_dim must be a power of 2.

    Raises:
        FormatError: values outside these.
    """

    key_bits: int = 8
    value_bits: int = 8
    keys: Literal["token", "channel"] = "token"
    sink: int = 0
    window: int = 0
    rotated: bool = False

    def __post_init__(self) -> None:
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if bits not in BITS:
                raise FormatError(f"kv: {name} must be one of {', '.join(map(str, BITS))}, got {bits}")
        for name, tokens in (("sink", self.sink), ("window", self.window)):
            if not isinstance(tokens, int) or tokens < 0 or tokens % PAGE:
                raise FormatError(f"kv: {name} must be a multiple of {PAGE} tokens (whole pages), got {tokens}")
        if self.keys not in ("token", "channel") or (self.keys == "channel" and self.key_bits == 16):
            raise FormatError(
                f"kv: keys must be token, or channel below 16 bits; got {self.keys} at {self.key_bits} bits"
            )

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> KVSpec:
        """What `as_dict` wrote, from config.json or a recipe's options. Raises FormatError for keys it does not know."""
        if unknown := sorted(saved.keys() - cls.__dataclass_fields__.keys()):
            raise FormatError(f"kv: unknown option '{unknown[0]}'; known: {', '.join(cls.__dataclass_fields__)}")
        return cls(**saved)

    @classmethod
    def parse(cls, text: str) -> KVSpec:
        """From a word: `8`, `k8v4`, `k4v4-channel-sink64-window64-rotated`; bits first, the rest in any order.

        Raises:
            FormatError: anything else.
        """
        bits, *words = text.split("-")
        key, _, value = bits.removeprefix("k").partition("v") if bits.startswith("k") else (bits, "", bits)
        options: dict[str, Any] = {}
        try:
            options |= {"key_bits": int(key), "value_bits": int(value)}
            for word in words:
                if word in ("token", "channel"):
                    options["keys"] = word
                elif word == "rotated":
                    options["rotated"] = True
                else:
                    name = word.rstrip("0123456789")
                    options[name] = int(word.removeprefix(name))
        except ValueError:
            raise FormatError(
                f"'{text}' is not a cache; write for example 16, 8, k8v4 or k4v4-channel-sink64-window64-rotated"
            ) from None
        return cls.read(options)

    @property
    def word(self) -> str:
        """What `parse` reads."""
        parts = [f"k{self.key_bits}v{self.value_bits}", self.keys]
        parts += [f"{name}{tokens}" for name, tokens in (("sink", self.sink), ("window", self.window)) if tokens]
        return "-".join([*parts, *(["rotated"] if self.rotated else [])])

    @property
    def seals(self) -> bool:
        """Whether pages are written in 16 bits first; else every token is stored as codes at once."""
        return self.keys == "channel" or self.sink > 0 or self.window > 0

    def sealed(self, position: int) -> int:
        """Tokens from `sink` on that a query at `position` reads as codes; all earlier and later ones it reads in 16 bits.

        Returned as the end of that range, 0 where it is empty.
        """
        if not self.seals:
            return position + 1
        end = max(0, (position - self.window) // PAGE) * PAGE
        return end if end > self.sink else 0

    def bits_per_element(self, head_dim: int) -> tuple[float, float]:
        """Of a stored key and value element, with ranges; without sink, window and unfinished page."""
        key_run = PAGE if self.keys == "channel" else head_dim
        return (
            self.key_bits + (32 / key_run if self.key_bits < 16 else 0.0),
            self.value_bits + (32 / head_dim if self.value_bits < 16 else 0.0),
        )

    def as_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)

    def account(self, head_dim: int) -> dict[str, Any]:
        """For the ledger: scheme, bits per element, and where ranges come from."""
        keys, values = self.bits_per_element(head_dim)
        return {
            "scheme": self.word,
            "key_bits_per_element": keys,
            "value_bits_per_element": values,
            "ranges": "dynamic: minimum and maximum of what is cached, float16",
        }


def check_head(spec: KVSpec, head_dim: int) -> None:
    """Refuse, with a FormatError, a head that the spec does not fit."""
    if spec.rotated and head_dim & (head_dim - 1):
        raise FormatError(f"kv: rotated needs heads of a power of 2 channels, this model has {head_dim}; leave it out")
