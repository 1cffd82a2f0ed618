"""Tokenizers of checkpoints without transformers: a second less to start, and a fifth of the memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from anybit.engine import tokenizer_classes
from anybit.engine.chat_template import render
from anybit.errors import FormatError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer.json"
log = logging.getLogger("anybit")


class Tokenizer:
    """What generation needs of a transformers tokenizer, under the same names and with the same results.

    Attributes:
        chat_template: Jinja source, or None.
        eos_token_id: of the token that ends a text, or None.
    """

    def __init__(self, backend: tokenizers.Tokenizer, specials: Mapping[str, str], chat_template: str | None) -> None:
        """See `open_tokenizer`. `specials` are the tokens that have a name, such as `bos_token`."""
        self._backend, self._specials = backend, dict(specials)
        self.chat_template = chat_template
        self.eos_token_id: int | None = backend.token_to_id(specials["eos_token"]) if "eos_token" in specials else None

    def __call__(self, text: str) -> dict[str, list[int]]:
        """`input_ids` of a text, with the special tokens that the model wants around it; InputError: half a surrogate pair."""
        return {"input_ids": self._ids(text)}

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        return_dict: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Any:
        """`input_ids` of a conversation in the model's own words (the ids alone unless `return_dict`).

        Raises:
            InputError: the model has no template, or it refuses this conversation.
        """
        text = self.chat_text(conversation, add_generation_prompt=add_generation_prompt, tools=tools)
        ids = self._ids(text, add_special_tokens=False)
        return {"input_ids": ids} if return_dict else ids

    def chat_text(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text that `apply_chat_template` makes token ids of; same errors."""
        if self.chat_template is None:
            raise InputError("this model's tokenizer has no chat template; give a plain prompt instead")
        return render(self.chat_template, conversation, add_generation_prompt, self._specials, tools)

    def _ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                "the text holds half of a surrogate pair, which is no character; send whole ones"
            ) from None
        # unlike `encode`, the batch's lets other threads run: a long text takes seconds
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: object) -> str:
        """Text of token ids, spaces as they are."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))


def open_tokenizer(directory: Path) -> Tokenizer | PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint: this module's where it gives what transformers gives, else transformers', with a warning.

    Raises:
        FormatError: no tokenizer, or a damaged one.
    """
    config, model_type = _json(directory / "tokenizer_config.json"), _json(directory / "config.json").get("model_type")
    if reason := _refusal(directory, config, model_type):
        log.warning("the tokenizer needs transformers, which starts more slowly: %s", reason)
        return _of_transformers(directory)
    backend = _backend(directory / TOKENIZER)
    kind = tokenizer_classes.in_charge(config.get("tokenizer_class"), model_type, backend)
    if kind not in tokenizer_classes.REBUILT:
        if kind != tokenizer_classes.AS_WRITTEN:
            log.warning("the tokenizer needs transformers, which starts more slowly: it is a %s", kind)
            return _of_transformers(directory)
    elif not isinstance(backend.model, tokenizers.models.BPE):
        log.warning("the tokenizer needs transformers, which starts more slowly: it is no BPE")
        return _of_transformers(directory)
    specials = tokenizer_classes.rebuild(kind, backend, config) | _named(directory, config)
    known = {token: content for token, content in specials.items() if content is not None}
    _add_tokens(backend, config, list(known.values()))
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, known, _chat_template(directory, config))


def _refusal(directory: Path, config: Mapping[str, Any], model_type: str | None) -> str:
    """Why transformers might read other files than this module does; empty when it does not."""
    if not (directory / TOKENIZER).is_file():
        return f"there is no {TOKENIZER}"
    if config.get("auto_map"):
        return "it brings its own code"
    if model_type == "mistral" and (directory / "tekken.json").is_file():
        return "it is a tekken.json"
    return ""


def _of_transformers(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FormatError(f"{directory} has no readable tokenizer ({error}); restore its files") from None
    return found


def _backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise FormatError(f"{path} is damaged ({error}); restore it") from None


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{path} is damaged ({error}); restore it") from None


def _named(directory: Path, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Special tokens by name; None for those that are explicitly absent."""
    settings = dict(config)
    if "added_tokens_decoder" not in config:  # files of old
        settings |= _json(directory / "special_tokens_map.json")
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: value for name, value in contents.items() if value is None or isinstance(value, str)}


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], specials: Sequence[str]) -> None:
    """Tokens that only tokenizer_config.json knows."""
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    tokens = [tokenizers.AddedToken(**token) for _, token in listed]
    backend.add_tokens([token for token in tokens if repr(token) not in known])
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = extra.values() if isinstance(extra, dict) else extra
    wanted = [*specials, *(token["content"] if isinstance(token, dict) else token for token in more)]
    backend.add_tokens(
        [tokenizers.AddedToken(token, special=True) for token in dict.fromkeys(wanted) if token not in added]
    )


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own goes before tokenizer_config.json, where it may be one of several: then `default`."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found
