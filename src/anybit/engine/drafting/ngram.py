"""Adaptive multi-level n-grams (ANPD, arXiv 2404.08698, methods/anpd.md section 2): what followed these tokens most often.

All levels are one tree: the node at depth n stands for a run of n tokens that occurred, and counts how often. Adding a token
makes one step in each level, and the best child of a node is kept up to date, so both adding and looking up cost O(N).
"""

from __future__ import annotations

from collections.abc import Sequence

_SHIFT = 32  # a child's key is node << _SHIFT | token
_NONE = 0  # no node
_ROOT = 1


class NgramDrafter:
    """Counts the prompt once and every certain token; guesses are not counted, so they cannot feed on themselves.

    The continuation seen most often wins, the most recent of equals; the longest context that has one is asked.
    """

    free = True

    def __init__(self, order: int = 5, longest: int = 7, shortest: int = 1, excluded: Sequence[range] = ()) -> None:
        """The paper's order N = 5 and K = 7 tokens a guess.

        Args:
            order: N >= 2; contexts have up to N - 1 tokens.
            longest: K, most tokens in a guess.
            shortest: fewest tokens of context that count as known; 2 leaves out what merely follows a frequent word.
            excluded: positions of the prompt that teach nothing and end every context, such as a chat template's headers.
        """
        if not 1 <= shortest < order:
            raise ValueError(f"need 1 <= shortest < order, not {shortest} and {order}")
        self.longest, self._order, self._shortest, self._excluded = longest, order, shortest, excluded
        self.start([])

    def start(self, prompt_ids: Sequence[int]) -> None:
        """See `Drafter`."""
        self._children: dict[int, int] = {}
        self._count, self._best, self._token = [0, 0], [_NONE, _NONE], [-1, -1]  # of each node
        self._clear()
        for position, token in enumerate(prompt_ids):
            if any(position in region for region in self._excluded):
                self._clear()
            else:
                self._push(token)

    def update(self, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        for token in tokens:
            self._push(token)

    @property
    def level(self) -> int:
        """Tokens of context that the first guessed one rests on."""
        return self._known(self._context)

    def propose(self, limit: int) -> list[int]:
        """See `Drafter`."""
        context, guess = list(self._context), list[int]()
        while len(guess) < min(limit, self.longest) and (level := self._known(context)):
            token = self._token[self._best[context[level]]]
            guess.append(token)
            context[1:] = [self._children.get(node << _SHIFT | token, _NONE) for node in context[:-1]]
        return guess

    def _clear(self) -> None:
        self._context = [_ROOT] + [_NONE] * (self._order - 1)  # [n]: node of the last n tokens

    def _known(self, context: list[int]) -> int:
        for level in range(self._order - 1, self._shortest - 1, -1):
            if self._best[context[level]] != _NONE:
                return level
        return 0

    def _push(self, token: int) -> None:
        """Counts `token` after each context, and moves on."""
        nodes = [_ROOT] + [_NONE] * self._order
        for level, node in enumerate(self._context):
            if node == _NONE:
                break  # longer contexts do not exist either: the text is too short
            child = nodes[level + 1] = self._child(node, token)
            self._count[child] += 1
            if self._count[child] >= self._count[self._best[node]]:
                self._best[node] = child
        self._context = nodes[: self._order]

    def _child(self, node: int, token: int) -> int:
        child = self._children.setdefault(node << _SHIFT | token, len(self._count))
        if child == len(self._count):
            self._count.append(0)
            self._best.append(_NONE)
            self._token.append(token)
        return child
