"""HTML built so that escaping is the default: plain strings are text, only `Html` is markup."""

from __future__ import annotations

import html


class Html(str):
    """Text that already is markup and is not escaped again."""


def element(name: str, *children: object, **attributes: object) -> Html:
    """`<name attributes>children</name>`.

    Args:
        name: tag name.
        children: `Html` goes in as it is, everything else as escaped text, None not at all.
        attributes: values are escaped; a trailing underscore of a name is dropped and inner ones become dashes
            (`class_`, `aria_label`); None leaves the attribute out.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{said}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """Children one after another, escaped where they are not `Html`."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None))
