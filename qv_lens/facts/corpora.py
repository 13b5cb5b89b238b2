"""Texts for statistics, by name: a file, a folder, a dataset, the bundled world's, or what every
Python installation has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qv_lens.errors import ConfigError
from qv_lens.facts.benchmarks import dataset
from qv_lens.facts.files import SUFFIXES, read_texts

#: 3,000 documents of the text that the bundled models were trained on, one a line
WORLD_TEXT = Path(__file__).parents[1] / "world" / "text.txt"


def corpus(source: str) -> Iterator[str]:
    """Texts by name: 'world' (the bundled world's), 'python' (Python's own reference,
    `pydoc_data.topics`), a file with a paragraph per line, a file of records with a field "text"
    (JSON list, JSON lines, parquet, a table), a folder of .txt files, or a dataset (name or
    name:config).

    Raises `ConfigError` for a source that cannot be read.
    """
    if source == "world":
        return read_texts(WORLD_TEXT, ConfigError)
    if source == "python":
        return python_reference()
    path = Path(source)
    if path.exists():
        return _from_files(path)
    if path.suffix.lower() in SUFFIXES:
        raise ConfigError(f"There is no file {source}.")
    return _from_dataset(source)


def python_reference() -> Iterator[str]:
    """The paragraphs of the language reference that comes with Python: about 100,000 tokens of
    English and some code, enough for C0 of layers of up to 10,000 neurons."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if text:
                yield text


def _from_files(path: Path) -> Iterator[str]:
    files = (
        sorted(file for file in path.rglob("*") if file.suffix.lower() == ".txt")
        if path.is_dir()
        else [path]
    )
    if not files:
        raise ConfigError(f"{path} holds no .txt file.")
    for file in files:
        yield from read_texts(file, ConfigError)


def _from_dataset(source: str) -> Iterator[str]:
    for row in dataset(source, ConfigError, streaming=True):
        text = row.get("text")
        if not isinstance(text, str):
            raise ConfigError(
                f"The dataset {source!r} has columns {sorted(row)}: texts are expected in 'text'."
            )
        if text.strip():
            yield text
