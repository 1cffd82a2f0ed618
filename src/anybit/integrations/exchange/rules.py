"""What only some formats can say of a layer besides its weight."""

from __future__ import annotations

from anybit.formats.decoder import Form
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.checkpoint import Checkpoint


def check_layer(name: str, form: Form, account: Account, activations: bool = False) -> None:
    """Refuse what no format has: more than one code term, transforms of the input at run time. Quantized activations are a
    loss unless the format has `activations`."""
    kinds = {part["term"] for part in form["terms"]}
    if "columns" in kinds:
        raise account.refuse("outlier columns in 16 bits", name)
    if "low_rank" in kinds:
        raise account.refuse("a low-rank term", name)
    if len(form["terms"]) > 1:
        raise account.refuse("several widths in one layer", name)
    for op in form.get("inputs", []):
        raise account.refuse(f"a {op['op'].capitalize()} transform of the input at run time", name)
    if "activations" in form and not activations:
        account.lose("quantized activations; the weights alone are written", name)
    if any("sparsity" in part for part in form["terms"]):
        account.note("2:4 sparsity is written as ordinary codes: the zeros are there, the word is not")


def lose_cache(source: Checkpoint, account: Account) -> None:
    """For formats that do not say how keys and values are cached."""
    if source.kv:
        account.lose("how keys and values are cached; the reading engine decides", "quantization_config.kv")


def uniform_linears(source: Checkpoint, account: Account) -> tuple[int, int]:
    """(bits, group size) that all linears but the head share, for formats with one setting for the whole model; the group
    size is 0 where every row has one scale.

    Raises:
        InputError: they differ, or some stay in float.
    """
    found: dict[tuple[int, int], str] = {}
    for name in source.linears():
        if name not in source.forms:
            raise account.refuse("a model in which some linears stay in float", name)
        form = source.forms[name]
        (part, columns) = (form["terms"][0], form["shape"][1])
        size = part.get("group_size", columns)
        found.setdefault((source.width(name), 0 if size >= columns else size), name)
    if len(found) > 1:
        words = ", ".join(f"{bits} bits in groups of {size or 'a row'}" for bits, size in found)
        raise account.refuse(f"more than one width and group size ({words})", list(found.values())[1])
    return next(iter(found))
