"""Text to calibrate and evaluate on: a source name or path becomes a list of documents.

| source | documents |
|---|---|
| `wiki`, `wiki-test` | English Wikipedia articles, cleaned; disjoint by article (data file of the `gensim` wheel) |
| `lee` | 300 short news texts, one per document (same wheel) |
| `topics` | the topics of Python's own `help()`; always there |
| `FILE.txt` / `FILE.jsonl` / `FILE.parquet` | the whole file / one per line / one per row |
| a directory | a dataset written by `datasets.Dataset.save_to_disk` |
| `hf:NAME[:CONFIG[:SPLIT]]` | a dataset of the Hugging Face hub, split `train` unless said |
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from anybit.calibration import wiki
from anybit.errors import CalibrationError, nearest

_WIKI_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def read_documents(source: str, *, field: str = "text") -> list[str]:
    """The non-empty documents of `source`, in their own order.

    Args:
        source: a builtin name, a path, or `hf:NAME[:CONFIG[:SPLIT]]`; see the table at the top of this module.
        field: key or column that holds the text in `.jsonl`, `.parquet` and dataset sources.

    Raises:
        CalibrationError: unknown name, missing file or package, undecodable content, missing field, no text at all.
    """
    if source in BUILTINS:
        documents = BUILTINS[source]()
    elif source.startswith("hf:"):
        documents = _read_hub(source, field)
    else:
        documents = _read_path(Path(source), field)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise CalibrationError(f"text source '{source}' holds no text; give a file with prose in it or use 'topics'")
    return documents


def _read_path(path: Path, field: str) -> list[str]:
    if path.is_dir():
        return _read_saved_dataset(path, field)
    if not path.is_file():
        raise CalibrationError(f"text source '{path}' is neither a file nor a builtin{nearest(str(path), BUILTINS)}")
    if path.suffix == ".jsonl":
        return _read_jsonl(path, field)
    if path.suffix == ".parquet":
        return _read_parquet(path, field)
    if path.suffix in {".txt", ".md", ""}:
        return [_read_utf8(path)]
    raise CalibrationError(f"text file '{path}' is of no known kind; known: .txt .md .jsonl .parquet")


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"'{path}' is not UTF-8 text (byte {error.start}); convert it to UTF-8 first") from error


def _read_jsonl(path: Path, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of '{path}'"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(
                f"{where} is not JSON ({error.msg}); a .jsonl file has one object per line"
            ) from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{where} is a {type(row).__name__}, not an object with a '{field}' key")
        _require_field(field, row, where)
        documents.append(_require_text(row[field], field, where))
    return documents


def _read_parquet(path: Path, field: str) -> list[str]:
    parquet = _import("pyarrow.parquet", "reading .parquet", "pyarrow")
    arrow = importlib.import_module("pyarrow")
    try:
        file = parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise CalibrationError(f"'{path}' is not a parquet file; write it with pyarrow or pandas first") from error
    with file:
        _require_field(field, file.schema_arrow.names, f"'{path}'")
        return _column(file.read(columns=[field])[field].to_pylist(), field, f"'{path}'")


def _read_saved_dataset(path: Path, field: str) -> list[str]:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise CalibrationError(f"directory '{path}' is not a saved dataset; make one with Dataset.save_to_disk")
    data = _import("datasets", "reading a saved dataset", "datasets").load_from_disk(str(path))
    if isinstance(data, dict):  # a DatasetDict: splits by name
        if "train" not in data:
            raise CalibrationError(
                f"dataset '{path}' has splits {', '.join(sorted(data))}; give one, as '{path}/SPLIT'"
            )
        data = data["train"]
    _require_field(field, data.column_names, f"'{path}'")
    return _column(data[field], field, f"'{path}'")


def _read_hub(source: str, field: str) -> list[str]:
    name, config, split = [*source.removeprefix("hf:").split(":"), "", ""][:3]
    datasets = _import("datasets", f"'{source}'", "datasets")
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError) as error:  # offline, not found, unknown config or split
        first_line = str(error).strip().split("\n")[0]
        raise CalibrationError(
            f"cannot load '{source}' ({first_line}); check the name and the network, or use 'topics'"
        ) from error
    _require_field(field, data.column_names, f"'{source}'")
    return _column(data[field], field, f"'{source}'")


def _wiki(*, test: bool) -> list[str]:
    return wiki.split([text for _, text in wiki.read_dump(_gensim_file(_WIKI_DUMP))], test=test)


def _lee() -> list[str]:
    return _read_utf8(_gensim_file("lee_background.cor")).split("\n")


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


BUILTINS: dict[str, Callable[[], list[str]]] = {
    "wiki": lambda: _wiki(test=False),
    "wiki-test": lambda: _wiki(test=True),
    "topics": _topics,
    "lee": _lee,
}
"""Names that need no path; `wiki` and `wiki-test` never share an article."""


def _gensim_file(name: str) -> Path:
    """A data file inside the gensim wheel, found without importing gensim (whose dependencies are not needed)."""
    spec = importlib.util.find_spec("gensim")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "test" / "test_data" / name
        if path.is_file():
            return path
    raise CalibrationError(
        "text sources 'wiki', 'wiki-test' and 'lee' are data files of the gensim wheel, which is not here: "
        "run `pip install --no-deps gensim`, or use 'topics'"
    )


def _import(module: str, purpose: str, package: str) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        raise CalibrationError(
            f"{purpose} needs {package}: run `pip install anybit[data]` (or `pip install {package}`)"
        )
    return importlib.import_module(module)


def _require_field(field: str, names: Iterable[str], where: str) -> None:
    names = list(names)
    if field not in names:
        raise CalibrationError(f"{where} has no field '{field}'; found: {', '.join(names)} (choose with --field)")


def _require_text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise CalibrationError(f"field '{field}' of {where} is a {type(value).__name__}, not a string")
    return value


def _column(values: Iterable[object], field: str, where: str) -> list[str]:
    return [_require_text(value, field, f"row {row} of {where}") for row, value in enumerate(values)]
