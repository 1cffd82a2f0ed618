"""What a format could not say: refused with the reason or, where losses are accepted, written as near as it goes and listed."""

from __future__ import annotations

from anybit.errors import InputError


class Account:
    """Notes and losses of one export or import into `format`."""

    def __init__(self, format: str, allow_loss: bool) -> None:
        self.format, self.allow_loss = format, allow_loss
        self._notes: dict[str, None] = {}
        self._losses: dict[str, list[str]] = {}

    @property
    def lossless(self) -> bool:
        """Whether everything was said exactly so far."""
        return not self._losses

    def note(self, text: str) -> None:
        """Something a user should know that costs nothing."""
        self._notes[text] = None

    def lose(self, what: str, where: str) -> None:
        """`what` (an object: "a zero point between codes") of `where`, a layer or file, is written as near as it goes.

        Raises:
            InputError: losses were not allowed.
        """
        if not self.allow_loss:
            raise InputError(
                f"{self.format} cannot say {what} ({where}); choose another format, or pass --allow-loss to have the "
                "nearest written and every loss listed"
            )
        self._losses.setdefault(what, []).append(where)

    def refuse(self, what: str, where: str) -> InputError:
        """The error for something that has no nearest: raise it."""
        return InputError(
            f"{self.format} cannot say {what} ({where}); keep the anybit checkpoint, or choose another format"
        )

    def lines(self) -> list[str]:
        """Losses first, each with where it happened; then notes."""
        lost = [f"lost: {what}: {_places(where)}" for what, where in self._losses.items()]
        return [*lost, *self._notes]


def _places(where: list[str]) -> str:
    places = list(dict.fromkeys(where))
    return places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"
