"""MediaWiki markup to plain prose, and the split of a dump into calibration and held-out articles.

A handful of ordered rewrites, innermost construct first, repeated until nothing nested is left. The aim is clean
running text for perplexity, not a rendering: references, tables, infoboxes, galleries, formulas and link lists are
dropped; words inside links, emphasis and the few templates that carry words (units, foreign terms, quotations) are
kept. Deterministic.
"""

from __future__ import annotations

import bz2
import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

MIN_CHARACTERS = 1000
"""Shorter articles are stubs and disambiguation pages: lists of links, not prose."""

TEST_EVERY = 5
"""Every fifth kept article is held out, so no article is ever on both sides."""

_LINK_LISTS = (
    "references|external links|see also|further reading|notes|footnotes|bibliography|sources|citations|works cited"
    "|notes and references|references and notes|literature|publications|works|gallery|discography|filmography"
)

_INNER_TEMPLATE = re.compile(r"\{\{((?:[^{}]|(?<!\{)\{(?!\{)|(?<!\})\}(?!\}))*)\}\}")
_INNER_TABLE = re.compile(r"^[:*\s]*\{\|(?:(?!\{\|)[\s\S])*?^\s*\|\}", re.M)
_INNER_LINK = re.compile(r"\[\[((?:(?!\[\[|\]\])[\s\S])*)\]\]")
_NOT_PROSE_LINK = re.compile(r"\s*(?:file|image|media|category|template|[a-z]{2})\s*:", re.I)

_FIRST_ARGUMENT = {
    "nowrap",
    "quote",
    "nihongo",
    "angbr",
    "vanchor",
    "small",
    "val",
    "flag",
    "flagcountry",
    "ipa",
    "iast",
}
_JOINED = {"chem": "", "frac": "/"}

# Order matters: what may contain other markup goes before what it may contain.
_DROP = [
    re.compile(r"<!--[\s\S]*?-->"),
    re.compile(r"<ref\b[^<>]*/\s*>", re.I),
    re.compile(
        r"<(ref|math|gallery|source|syntaxhighlight|timeline|imagemap|score|chem)\b[^<>]*>[\s\S]*?</\1\s*>", re.I
    ),
    re.compile(r"__[A-Z]+__"),
]
_REWRITE = [
    (re.compile(r"<br\s*/?\s*>|<hr\s*/?\s*>", re.I), " "),
    (re.compile(r"</?[a-z][a-z0-9]*\b[^<>]*>", re.I), ""),
    (re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]*\s+([^\]]*)\]"), r"\1"),
    (re.compile(r"\[(?:https?:|ftp:)?//[^\]]*\]"), ""),
    (re.compile(r"'{2,}"), ""),
]
_TIDY = [
    (re.compile(r"\[\[|\]\]|\{\{|\}\}"), ""),  # halves of links and templates that authors never closed
    (re.compile(r"^[ \t]*[*#:;]*[ \t]*(?:https?://\S+)?[ \t]*$", re.M), ""),  # list items emptied by the rewrites above
    (re.compile(r"^[ \t]*(?:[|!].*|\{\||\|\}).*$", re.M), ""),  # rows of tables that were never closed
    (re.compile(r"^[ \t]*[:;]*[*#][*#:;]*[ \t]*", re.M), "- "),
    (re.compile(r"^[ \t]*[:;]+[ \t]*", re.M), ""),
    (re.compile(r"\(\s*(?:[,;:/]|\bor\b|\band\b|\s)*\s*\)"), ""),  # "( ; )" where a pronunciation was
    (re.compile(r"\(\s*(?:[,;:]\s*)+"), "("),
    (re.compile(r"\s*(?:[,;:]\s*)+\)"), ")"),
    (re.compile(r"[ \t\u00a0\u200b]+"), " "),
    (re.compile(r" +([,.;:!?)])"), r"\1"),
    (re.compile(r"([(]) +"), r"\1"),
    (re.compile(r",(?:\s*,)+"), ","),
    (re.compile(r" *\n *"), "\n"),
    (re.compile(r"^(?:- \(\w*\)|[,.;:-]+)$", re.M), ""),  # list items whose name was a flag or a picture
    (re.compile(r"\n{3,}"), "\n\n"),
]
_HEADING = re.compile(r"^(={2,6})[ \t]*(.*?)[ \t]*\1[ \t]*$")


def strip_markup(markup: str) -> str:
    """Plain text of one article: paragraphs and headings separated by one blank line; `""` for a redirect.

    Args:
        markup: MediaWiki source, XML already unescaped once (so `&nbsp;` may still be inside).
    """
    if re.match(r"\s*#redirect\b", markup, re.I):
        return ""
    text = markup
    for pattern in _DROP:
        text = pattern.sub("", text)
    text = _innermost(_INNER_TEMPLATE, text, lambda found: _template(found[1]))
    text = _innermost(_INNER_TABLE, text, lambda _: "")
    for pattern, replacement in _REWRITE:
        text = pattern.sub(replacement, text)
    text = _innermost(_INNER_LINK, text, lambda found: _link(found[1]))
    text = _sections(html.unescape(html.unescape(text)))  # twice: dumps hold `&amp;nbsp;`
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()


def read_dump(path: Path) -> Iterator[tuple[str, str]]:
    """(title, plain text) of every encyclopedia article of at least `MIN_CHARACTERS` in a bz2 dump, in dump order."""
    with bz2.open(path) as stream:
        for _, element in ElementTree.iterparse(stream):
            if not element.tag.endswith("}page"):
                continue
            if element.findtext("{*}ns") == "0":
                text = strip_markup(element.findtext(".//{*}text") or "")
                if len(text) >= MIN_CHARACTERS:
                    yield element.findtext("{*}title") or "", text
            element.clear()


def split(articles: list[str], *, test: bool) -> list[str]:
    """The held-out articles (every `TEST_EVERY`-th) or all the others."""
    return [article for at, article in enumerate(articles) if (at % TEST_EVERY == TEST_EVERY - 1) == test]


def _innermost(pattern: re.Pattern[str], text: str, replacement: Callable[[re.Match[str]], str]) -> str:
    """Rewrite matches that hold no other match, then those around them, until none is left."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _template(inside: str) -> str:
    """The words a template shows in running text; `""` for everything that is furniture."""
    inside = _innermost(_INNER_LINK, inside, lambda found: _link(found[1]))  # a label's "|" separates no arguments
    name, *arguments = [part.strip() for part in inside.split("|")]
    name = name.lower()
    plain = [argument for argument in arguments if not re.match(r"\w[\w ]*=", argument)]
    if not plain:
        return {"nbsp": " ", "'s": "'s", "·": " · ", "ndash": "–", "mdash": "—", "spaced ndash": " – "}.get(name, "")
    if name in {"convert", "cvt"} and len(plain) > 1:
        is_range = len(plain) > 3 and plain[1] in {"-", "–", "to", "and", "by", "x"}
        return " ".join(plain[:4] if is_range else plain[:2])
    if name in {"lang", "transl"}:
        return plain[-1]
    if name == "as of":
        return "As of " + plain[0]
    if name in _JOINED:
        return _JOINED[name].join(plain)
    return plain[0] if name in _FIRST_ARGUMENT or name.startswith("lang-") else ""


def _link(inside: str) -> str:
    """The label of `[[target|label]]`, nothing for pictures, categories and other languages."""
    if _NOT_PROSE_LINK.match(inside):
        return ""
    target, _, label = inside.partition("|")
    return label.split("|")[-1] if label.strip() else target.lstrip(":").split("#")[0]


def _sections(text: str) -> str:
    """Headings as lines of their own; sections that only list links, and headings over nothing, removed."""
    kept: list[str] = []
    pending: list[tuple[int, str]] = []
    skipping = 99  # depth of the link-list section we are inside; deeper headings belong to it
    for line in text.split("\n"):
        found = _HEADING.match(line.strip())
        if not found:
            if skipping == 99 and line.strip():
                kept += [f"\n{title}\n" for _, title in pending]
                pending = []
            if skipping == 99:
                kept.append(line)
            continue
        depth = len(found[1])
        if depth > skipping:
            continue
        skipping = depth if re.fullmatch(_LINK_LISTS, found[2].lower()) else 99
        pending = [above for above in pending if above[0] < depth]
        if skipping == 99:
            pending.append((depth, found[2]))
    return "\n".join(kept)
