"""Porter's stemmer (M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980): connected, connecting -> connect."""

from __future__ import annotations

import re

# C and V are runs of consonants and of vowels; a "y" is a vowel after a consonant.
_VOWELS = "aeiou"
_STEP2 = (
    "ational:ate tional:tion enci:ence anci:ance izer:ize abli:able alli:al entli:ent eli:e ousli:ous ization:ize "
    "ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble"
)
_STEP3 = "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:"
_STEP4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"


def _pairs(text: str) -> list[tuple[str, str]]:
    """Suffix and replacement, longest suffix first."""
    pairs = [(pair.partition(":")[0], pair.partition(":")[2]) for pair in text.split()]
    return sorted(pairs, key=lambda pair: -len(pair[0]))


STEP2, STEP3, STEP4 = _pairs(_STEP2), _pairs(_STEP3), _pairs(_STEP4)


def stem(word: str) -> str:
    """The stem of a lower-case English word; words of up to two letters stay."""
    if len(word) <= 2:
        return word
    word = _plural(word)
    word = _past(word)
    if word.endswith("y") and _has_vowel(word[:-1]):
        word = word[:-1] + "i"
    word = _longest(word, STEP2, 0)
    word = _longest(word, STEP3, 0)
    word = _longest(word, STEP4, 1)
    return _tidy(word)


def _shape(text: str) -> str:
    """One letter, c or v, for every letter."""
    shape = ""
    for letter in text:
        vowel = letter in _VOWELS or (letter == "y" and shape.endswith("c"))
        shape += "v" if vowel else "c"
    return shape


def _measure(text: str) -> int:
    """m in [C](VC)^m[V]."""
    return len(re.findall("v+c+", _shape(text)))


def _has_vowel(text: str) -> bool:
    return "v" in _shape(text)


def _short(text: str) -> bool:
    """Ends consonant, vowel, consonant, the last of them not w, x or y."""
    return _shape(text).endswith("cvc") and text[-1] not in "wxy"


def _double(text: str) -> bool:
    return len(text) > 1 and text[-1] == text[-2] and _shape(text).endswith("c")


def _plural(word: str) -> str:
    for suffix, replacement in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(suffix):
            return word[: -len(suffix)] + replacement
    return word


def _past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        rest = word[: -len(suffix)]
        if word.endswith(suffix) and _has_vowel(rest):
            if rest.endswith(("at", "bl", "iz")):
                return rest + "e"
            if _double(rest) and rest[-1] not in "lsz":
                return rest[:-1]
            return rest + "e" if _measure(rest) == 1 and _short(rest) else rest
    return word


def _longest(word: str, pairs: list[tuple[str, str]], least: int) -> str:
    """Replace the longest suffix that matches, if the measure before it is above `least`."""
    for suffix, replacement in pairs:
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            fits = _measure(rest) > least and (suffix != "ion" or rest.endswith(("s", "t")))
            return rest + replacement if fits else word
    return word


def _tidy(word: str) -> str:
    if word.endswith("e"):
        rest = word[:-1]
        if _measure(rest) > 1 or (_measure(rest) == 1 and not _short(rest)):
            word = rest
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word
