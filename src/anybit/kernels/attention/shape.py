"""The sizes of a key-value cache; cpu.h has the layout of a page."""

from __future__ import annotations

from dataclasses import dataclass

from anybit.errors import FormatError

PAGE_TOKENS = 64
BITS = (16, 8, 4, 2)


@dataclass(frozen=True)
class KvShape:
    """Heads and widths of one layer's cache.

    Args:
        heads: query heads, a multiple of `kv_heads`: query head h reads kv head h // (heads / kv_heads).
        kv_heads: key-value heads.
        head_dim: D, a multiple of 16.
        key_bits: 16 (float16), 8, 4 or 2 per element; below 16 with float16 scales and minima.
        value_bits: the same for values, which have one range per token and head; 0: as keys.
        channels: keys have one range per channel and page of 64 tokens, not one per token and head. Then pages are
            written open, in 16 bits, and sealed when they are full.

    Raises:
        FormatError: sizes outside these.
    """

    heads: int
    kv_heads: int
    head_dim: int
    key_bits: int
    value_bits: int = 0
    channels: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_bits", self.value_bits or self.key_bits)
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise FormatError(f"attention: {self.heads} query heads do not share {self.kv_heads} kv heads evenly")
        if self.head_dim < 16 or self.head_dim % 16 or self.head_dim > 512:
            raise FormatError(f"attention: head_dim must be a multiple of 16 up to 512, got {self.head_dim}")
        for bits in (self.key_bits, self.value_bits):
            if bits not in BITS:
                raise FormatError(f"attention: a cache has 16, 8, 4 or 2 bits, got {bits}")
        if self.channels and self.key_bits == 16:
            raise FormatError("attention: 16-bit keys have no ranges, neither per channel nor per token")

    @property
    def sizes(self) -> tuple[int, int, int, int, int, bool]:
        """What the native functions take."""
        return self.heads, self.kv_heads, self.head_dim, self.key_bits, self.value_bits, self.channels

    @property
    def opened(self) -> KvShape:
        """The same in 16 bits."""
        return KvShape(self.heads, self.kv_heads, self.head_dim, 16)

    @property
    def key_bytes(self) -> int:
        """Codes of one kv head's keys in a page."""
        return PAGE_TOKENS * self.head_dim * self.key_bits // 8

    @property
    def value_bytes(self) -> int:
        """Codes of one kv head's values in a page."""
        return PAGE_TOKENS * self.head_dim * self.value_bits // 8

    @property
    def key_ranges(self) -> int:
        """Of one kv head's keys in a page, four bytes each."""
        return 0 if self.key_bits == 16 else self.head_dim if self.channels else PAGE_TOKENS

    @property
    def value_ranges(self) -> int:
        """Of one kv head's values in a page, four bytes each."""
        return 0 if self.value_bits == 16 else PAGE_TOKENS

    @property
    def head_bytes(self) -> int:
        """One kv head's keys, values and ranges in a page."""
        return self.key_bytes + self.value_bytes + 4 * (self.key_ranges + self.value_ranges)

    @property
    def page_bytes(self) -> int:
        """One page of 64 tokens, a multiple of 64."""
        return self.kv_heads * self.head_bytes
