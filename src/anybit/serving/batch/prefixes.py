"""Pages of prompts that were read before, kept for prompts that begin alike.

A page's keys and values depend on the tokens up to its end and on the precision that read them, and on nothing else (bit for
bit: `NativeModel`). So its name is a hash of just that. Only pages full of prompt are kept: what a model generates is cached
through other kernels than a prompt.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from anybit.engine.native import NativeModel
from anybit.formats.kv import PAGE


class Prefixes:
    """Which page of the model's cache holds what; of those that no slot uses, the one read longest ago goes first when room is
    needed.

    A cache that seals pages (`KVSpec`) has part of its tokens elsewhere; nothing is kept of it.

    Attributes:
        enabled: whether anything is kept.
    """

    def __init__(self, model: NativeModel, enabled: bool = True) -> None:
        self._model, self._pages = model, OrderedDict[bytes, int]()
        self._used: dict[int, set[bytes]] = {}  # by each slot: to forget these would free nothing
        self.enabled = enabled and not model.kv.seals

    def __len__(self) -> int:
        return len(self._pages)

    def attach(self, slot: int, prompt_ids: Sequence[int], bits: int) -> int:
        """Give an empty slot the longest known beginning of a prompt, all of it but the last token at the most; its tokens."""
        names = self._names(prompt_ids[:-1], bits)
        known = next((at for at, name in enumerate(names) if name not in self._pages), len(names))
        for name in reversed(names[:known]):  # what others rest on stays longer
            self._pages.move_to_end(name)
        self._used[slot] = set(names[:known])
        if known:
            self._model.attach_pages(slot, [self._pages[name] for name in names[:known]])
        return known * PAGE

    def keep(self, slot: int, prompt_ids: Sequence[int], bits: int) -> None:
        """Remember the full pages of a prompt that `slot` has read."""
        names = self._names(prompt_ids, bits)
        self._used[slot] = set(names)
        for at, name in reversed(list(enumerate(names))):
            if name in self._pages:
                self._pages.move_to_end(name)
            else:
                self._pages[name] = self._model.hold_page(slot, at)

    def leave(self, slot: int) -> None:
        """A slot was emptied."""
        self._used.pop(slot, None)

    def make_room(self, pages: int) -> None:
        """Forget pages that no slot uses until so many are free, or none is left to forget."""
        if self._model.free_pages >= pages:
            return
        used = set[bytes]().union(*self._used.values())
        for name in [name for name in self._pages if name not in used]:
            if self._model.free_pages >= pages:
                return
            self._model.release_page(self._pages.pop(name))

    def _names(self, ids: Sequence[int], bits: int) -> list[bytes]:
        """A name for each full page; it holds those before, as each is hashed with the name of its predecessor."""
        if not self.enabled:
            return []
        names, name = list[bytes](), bytes([bits])
        for end in range(PAGE, len(ids) + 1, PAGE):
            name = hashlib.blake2b(name + np.asarray(ids[end - PAGE : end], "<i4").tobytes(), digest_size=16).digest()
            names.append(name)
        return names
