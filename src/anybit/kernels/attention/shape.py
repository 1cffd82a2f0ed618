"""The sizes of a key-value cache; cpu.h has the layout of a page."""

from __future__ import annotations

from dataclasses import dataclass

from anybit.errors import FormatError

PAGE_TOKENS = 64
BITS = (16, 8, 4)


@dataclass(frozen=True)
class KvShape:
    """Heads and widths of one layer's cache.

    Args:
        heads: query heads, a multiple of `kv_heads`: query head h reads kv head h // (heads / kv_heads).
        kv_heads: key-value heads.
        head_dim: D, a multiple of 16.
        bits: 16 (float16), 8 or 4 per element; below 16, one float16 scale and minimum per token, kv head, and key or value.

    Raises:
        FormatError: sizes outside these.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bits: int

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise FormatError(f"attention: {self.heads} query heads do not share {self.kv_heads} kv heads evenly")
        if self.head_dim < 16 or self.head_dim % 16:
            raise FormatError(f"attention: head_dim must be a multiple of 16, got {self.head_dim}")
        if self.bits not in BITS:
            raise FormatError(f"attention: a cache has 16, 8 or 4 bits, got {self.bits}")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """heads, kv_heads, head_dim, bits: what the native functions take."""
        return self.heads, self.kv_heads, self.head_dim, self.bits

    @property
    def code_bytes(self) -> int:
        """The keys, or the values, of one kv head in a page."""
        return PAGE_TOKENS * self.head_dim * self.bits // 8

    @property
    def head_bytes(self) -> int:
        """One kv head's keys, values and scales in a page."""
        return 2 * self.code_bytes + (0 if self.bits == 16 else 4 * 2 * PAGE_TOKENS)

    @property
    def page_bytes(self) -> int:
        """One page of 64 tokens, a multiple of 64."""
        return self.kv_heads * self.head_bytes
