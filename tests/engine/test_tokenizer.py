"""Tokenizers read without transformers: the same ids, the same text and the same chat as transformers' own."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from anybit.engine.tokenizer import Tokenizer, open_tokenizer
from anybit.errors import FormatError, InputError
from anybit.models.source import open_model

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog, 12345 times",
    "il était une fois; né à l'œuvre",
    "日本語 🙂",
] * 3
TEXTS = [
    *CORPUS[:3],
    "",
    " leading, and  double   spaces\n\n\ttabs ",
    "cafe\u0301 \u1e9b\u0323 IT'S we'll",
    "<s>raw<|im_end|> <|im_start|>user\nspecials</s> in text <new> <|extra|>",
    "\x00\ufffd🙃🙂 0x1F 3.14",
]
CHAT = [
    {"role": "system", "content": 'be <brief> & "kind"'},
    {"role": "user", "content": " hello é\n"},
    {"role": "assistant", "content": "<|im_end|> no"},
    {"role": "user", "content": "12 + 34?"},
]
TEMPLATE = """
{%- if messages[0].role == 'system' %}
    {%- set ns = namespace(first=messages[0].content) %}
    {{- bos_token + ns.first | tojson }}
{%- endif %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}
    {%- set inner = 'x' %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
    {% endgeneration %}
    {{ inner is defined }}{{ dict(a=loop.index) | tojson(indent=1) }}
{% endfor %}
{% if tools is none and documents is none and add_generation_prompt %}
<|im_start|>assistant {{ eos_token }}{{ strftime_now('%Y') }}
{% endif %}"""


def bpe(*, byte_level: bool) -> tokenizers.Tokenizer:
    """A trained tokenizer whose every part differs from what any class would build."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    if byte_level:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = [f"<0x{byte:02X}>" for byte in range(0)]
    more = [] if byte_level else [AddedToken(f"<0x{b:02X}>", normalized=False) for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*SPECIALS, *more], initial_alphabet=alphabet)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[bool, Path]:
    """tokenizer.json by `byte_level`; the bytes of a byte fallback are words of the vocabulary, not added tokens."""
    found = {}
    for byte_level in (True, False):
        path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.json"
        data = json.loads(bpe(byte_level=byte_level).to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIALS]
        path.write_text(json.dumps(data))
        found[byte_level] = path
    return found


def save(directory: Path, file: Path, model_type: str = "llama", **config) -> Path:
    """A directory with what tokenizers need."""
    shutil.copy(file, directory / "tokenizer.json")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": TEMPLATE, **config}))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "5.23.0"}))
    return directory


def compare(directory: Path) -> None:
    ours, theirs = open_tokenizer(directory), AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert isinstance(ours, Tokenizer)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids
        for skip in (True, False):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
            assert ours.decode(ids, **options) == theirs.decode(ids, **options)
    assert ours.eos_token_id == theirs.eos_token_id
    for turns in (CHAT, CHAT[1:2]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
            assert ours.chat_text(turns, add_generation_prompt=prompt) == expected
            ids = theirs.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=True)["input_ids"]
            assert ours.apply_chat_template(turns, add_generation_prompt=prompt)["input_ids"] == ids


EXTRA = {"content": "<new>", "lstrip": True, "normalized": False, "rstrip": True, "single_word": False, "special": True}
CASES = {
    "as written": ("llama", True, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "as written, metaspace": ("qwen3", False, {"tokenizer_class": "TokenizersBackend"}),
    "llama": ("llama", False, {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False}),
    "llama, legacy": ("llama", False, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    "llama, no prefix": ("llama", False, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}),
    "llama, bytes": ("llama", True, {"tokenizer_class": "LlamaTokenizer"}),
    "gemma": ("gemma2", False, {"tokenizer_class": "GemmaTokenizer"}),
    "qwen2": ("qwen2", True, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "qwen3": ("qwen3", True, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<s>"}),
    "gpt2": ("llama", True, {"tokenizer_class": "GPT2Tokenizer"}),
    "phi3": ("phi3", False, {"tokenizer_class": "LlamaTokenizer"}),
    "mistral": ("mistral", False, {"tokenizer_class": "LlamaTokenizer"}),
    "more tokens": (
        "llama",
        True,
        {
            "tokenizer_class": "TokenizersBackend",
            "added_tokens_decoder": {"2000": EXTRA},
            "extra_special_tokens": ["<|extra|>"],
            "mask_token": "<mask>",
            "image_token": "<image>",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, files, tmp_path):
    model_type, byte_level, config = CASES[case]
    compare(save(tmp_path, files[byte_level], model_type, **config))


def test_equals_transformers_with_older_files(files, tmp_path):
    directory = save(tmp_path, files[True], tokenizer_class="PreTrainedTokenizerFast", chat_template=None)
    named = {"eos_token": {**EXTRA, "content": "<|im_end|>"}, "bos_token": "<|im_start|>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(named))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    compare(directory)


def test_equals_transformers_on_the_demo_model(tmp_path):
    directory = shutil.copytree(
        open_model("demo").path, tmp_path / "demo", ignore=shutil.ignore_patterns("*.safetensors")
    )
    compare(Path(directory))


def test_truncation_and_padding_of_the_file_do_not_apply(files, tmp_path):
    data = json.loads(files[True].read_text())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    data["padding"] |= {"pad_id": 5, "pad_type_id": 0, "pad_token": "<pad>"}
    (tmp_path / "odd.json").write_text(json.dumps(data))
    compare(save(tmp_path, tmp_path / "odd.json", tokenizer_class="PreTrainedTokenizerFast"))


def test_unknown_classes_are_left_to_transformers_and_it_says_so(files, tmp_path, caplog):
    directory = save(tmp_path, files[True], tokenizer_class="CodeGenTokenizer")
    with caplog.at_level(logging.WARNING, "anybit"):
        found = open_tokenizer(directory)
    assert not isinstance(found, Tokenizer)
    assert "needs transformers, which starts more slowly: it is a CodeGenTokenizer" in caplog.text


def test_refusals(files, tmp_path):
    directory = save(tmp_path, files[True], tokenizer_class="TokenizersBackend")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match="refuses this conversation: no system role"):
        open_tokenizer(directory).chat_text(CHAT, add_generation_prompt=True)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match=r"tokenizer\.json is damaged"):
        open_tokenizer(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="no readable tokenizer"):
        open_tokenizer(directory)
