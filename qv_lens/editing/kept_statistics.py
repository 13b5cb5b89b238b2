"""C0 that was computed once is kept in the user's cache, layer by layer, and read from there the
next time.

1. The folder is named after all that C0 depends on: the model's fingerprint, the text's hash, and a
   hash of the settings (length of the texts, BOS, backend) and of the current weights (the
   fingerprint is that of the weights as first seen). In it each layer and module has a folder of
   its own, as `Statistics.save` writes it.
2. Layers that are missing from the folder are computed in one pass, written under another name, and
   renamed, so that each is whole or absent.
3. Layers that cannot be kept (no room, no permission) are computed all the same, with a warning.

The cache is `$QV_LENS_CACHE`, if that is set (to nothing: keep nothing), else the platform's own
folder for caches. It may be deleted at any time."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from qv_lens.cache import VARIABLE, cache_folder
from qv_lens.editing.statistics import (
    Module,
    Statistics,
    checked_layers,
    covariance,
    enough,
    hashed,
    text_length,
)
from qv_lens.errors import EditError
from qv_lens.facts.corpora import corpus
from qv_lens.models.lens import Lens, check_lens
from qv_lens.models.zoo import BUNDLED

logger = logging.getLogger(__name__)

#: changes when C0 is computed differently
FORMAT = 1
PARTIAL = ".partial-"
Key = tuple[int, Module]
DAY = 86_400
WORLD_DOCUMENTS = 2_000


def kept_covariance(
    lens: Lens,
    texts: Sequence[str],
    layers: Iterable[int],
    *,
    max_tokens: int | None = None,
    modules: tuple[Module, ...] = ("ffn",),
) -> Statistics:
    """`covariance`, from the cache where it is there, and kept there. Raises what `covariance`
    raises."""
    wanted = sorted(set(checked_layers(layers)))
    folder = cache_folder()
    state = None if folder is None else lens.bare_state
    if folder is None or state is None:
        return covariance(lens, texts, wanted, max_tokens=max_tokens, modules=modules)
    folder = folder / "statistics" / _name(lens, state, texts, max_tokens)
    keys: list[Key] = [(layer, module) for layer in wanted for module in modules]
    parts_kept: dict[Key, Statistics] = {}
    for key in keys:
        part = _read(folder, key, lens)
        if part is not None:
            parts_kept[key] = part
    missing = [key for key in keys if key not in parts_kept]
    logger.info("C0: %d matrices from %s, %d to compute", len(parts_kept), folder, len(missing))
    if missing:
        needed_modules: tuple[Module, ...] = tuple(
            module for module in modules if module in {of for _, of in missing}
        )
        made = covariance(
            lens,
            texts,
            {layer for layer, _ in missing},
            max_tokens=max_tokens,
            modules=needed_modules,
        )
        parts = {key: _part(made, key) for key in missing}
        _keep(folder, parts)
        parts_kept.update(parts)
    C0 = {layer: parts_kept[layer, "ffn"].C0[layer] for layer in wanted if "ffn" in modules}
    attention = {
        layer: parts_kept[layer, "attn"].attention[layer] for layer in wanted if "attn" in modules
    }
    return replace(next(iter(parts_kept.values())), C0=C0, attention=attention)


def default_text(lens: Lens) -> str:
    """The text for C0 where none is named: the bundled world's for its own models, the reference
    that comes with Python for all others."""
    return "world" if lens.name in BUNDLED else "python"


def default_texts(
    lens: Lens, text: str = "", tokens: int | None = None, max_tokens: int | None = None
) -> list[str]:
    """The texts that C0 is taken over: the given number of tokens of a named source
    (`facts.corpora.corpus`; "": `default_text`). None takes as many as C0 needs
    (`statistics.enough`); the bundled world always gives 2,000 documents."""
    source = text or default_text(lens)
    if source == "world" and tokens is None:
        return list(itertools.islice(corpus(source), WORLD_DOCUMENTS))
    return enough(lens, corpus(source), tokens, max_tokens)


def corpus_statistics(
    lens: Lens,
    text: str = "",
    layers: Iterable[int] | None = None,
    *,
    modules: tuple[Module, ...] = ("ffn", "attn"),
    max_tokens: int | None = None,
) -> Statistics:
    """C0 over the `default_texts` of a source by name, of all layers unless some are named, from
    the cache where it is there.

    `modules`: whose inputs, 'ffn' (W_out's) and 'attn' (W_O's). `max_tokens`: length to which each
    text is cut (None: the model's context).
    Raises `ConfigError` for a text that cannot be read, and what `covariance` raises.
    """
    check_lens(lens)
    texts = default_texts(lens, text, max_tokens=max_tokens)
    wanted = range(lens.n_layers) if layers is None else layers
    return kept_covariance(lens, texts, wanted, max_tokens=max_tokens, modules=modules)


def _name(lens: Lens, state: str, texts: Sequence[str], max_tokens: int | None) -> str:
    length = text_length(lens, max_tokens)
    settings = repr((FORMAT, length, bool(lens.prepend_bos), lens.backend, state))
    of_settings = hashlib.blake2b(settings.encode(), digest_size=8)
    return f"{lens.fingerprint}-{hashed(texts).hexdigest()}-{of_settings.hexdigest()}"


def _part(statistics: Statistics, key: Key) -> Statistics:
    """One layer and module of them."""
    layer, module = key
    C0 = {layer: statistics.C0[layer]} if module == "ffn" else {}
    attention = {layer: statistics.attention[layer]} if module == "attn" else {}
    return replace(statistics, C0=C0, attention=attention)


def _place(folder: Path, key: Key) -> Path:
    return folder / f"{key[0]}.{key[1]}"


def _read(folder: Path, key: Key, lens: Lens) -> Statistics | None:
    """The C0 kept for a layer and module; a damaged one is removed."""
    place = _place(folder, key)
    if not (place / "statistics.json").exists():
        return None
    try:
        part = Statistics.load(place)
        part.of(lens, *key)
    except EditError:
        shutil.rmtree(place, ignore_errors=True)
        return None
    return part


def _keep(folder: Path, parts: dict[Key, Statistics]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        size = sum(
            C.nbytes
            for part in parts.values()
            for C in (*part.C0.values(), *part.attention.values())
        )
        free = shutil.disk_usage(folder).free
        if 2 * size > free:
            raise OSError(f"{size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        for key, part in parts.items():
            _put(folder, _place(folder, key), part)
    except (OSError, EditError) as error:
        warnings.warn(
            f"C0 was computed, but cannot be kept in {folder}: {error}. It will be computed again "
            f"next time: name another folder in {VARIABLE}, or pass the folder that qv-lens stats "
            "writes.",
            stacklevel=3,
        )


def _put(folder: Path, place: Path, part: Statistics) -> None:
    """Write under another name, then rename; if another process was first, its files stay."""
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
    try:
        part.save(partial)
        if not place.exists():
            os.rename(partial, place)
    except OSError:
        if not place.exists():  # else another process has just kept the same
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what a killed process left half-written, a day ago or earlier."""
    for partial in folder.glob(f"{PARTIAL}*"):
        if time.time() - partial.stat().st_mtime > DAY:
            shutil.rmtree(partial, ignore_errors=True)
