"""The rivals by name."""

from __future__ import annotations

from collections.abc import Callable

from anybit.errors import InputError, nearest
from anybit.evaluate.rivals.contract import Rival, RivalFailed
from anybit.evaluate.rivals.llama_cpp import LlamaCpp
from anybit.evaluate.rivals.openvino import OpenVino
from anybit.evaluate.rivals.torch_bf16 import TorchBf16
from anybit.evaluate.rivals.torchao import TorchAo

RIVALS: dict[str, Callable[..., Rival]] = {
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "torch": TorchBf16,
    "torchao": TorchAo,
}


def parse_rivals(text: str) -> list[Rival]:
    """`"llama.cpp:Q4_1+imatrix,openvino"` as rivals; what follows the colon is the variant, explained by each class.

    Raises:
        InputError: unknown name or variant.
    """
    found = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, _, variant = word.partition(":")
        if name not in RIVALS:
            raise InputError(f"--rivals: unknown rival '{name}'{nearest(name, RIVALS)}")
        try:
            found.append(RIVALS[name](variant) if variant else RIVALS[name]())
        except RivalFailed as error:
            raise InputError(f"--rivals: {error}") from None
    return found
