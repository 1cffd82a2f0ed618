"""`anybit recipes`: which methods there are, and one of them in full."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from anybit.cli.options import Json
from anybit.cli.output import plain, print_json, say, say_table

COLUMNS = ("name", "weights", "activations", "kv", "needs", "paper")


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this recipe in full")] = None,
    json: Json = False,
) -> None:
    """List the recipes, or show one.

    With --json: a list of recipes, or the one object.
    """
    from anybit.recipe import list_recipes, show_recipe

    if name is not None:
        recipe = show_recipe(name)
        if json:
            print_json(recipe)
        else:
            say(*outline(plain(recipe)))
        return
    known = list_recipes()
    if json:
        print_json(known)
    else:
        say_table(COLUMNS, ([_cell(recipe.get(key)) for key in COLUMNS] for recipe in known))


def _cell(value: Any) -> Any:
    return (", ".join(map(str, value)) or "nothing") if isinstance(value, list | tuple) else value


def outline(value: Any, indent: int = 0) -> list[str]:
    """Nested JSON data as indented `key: value` lines."""
    pad = "  " * indent
    lines = []
    for key, item in value.items() if isinstance(value, dict) else (("-", item) for item in value):
        label = f"{pad}{key}:" if isinstance(value, dict) else f"{pad}-"
        if isinstance(item, dict | list) and item:
            lines += [label, *outline(item, indent + 1)]
        else:
            lines.append(f"{label} {'-' if item is None or item in ([], {}) else item}")
    return lines
