"""C0 = (1/T) sum k k^T over all tokens of a text: the uncentred second moment of keys, all layers
in one pass.

1. Texts are read as a stream, each as the lens's own tokens (with a BOS where it puts one) and cut
   to `max_tokens`; documents of like length share a batch within a chunk.
2. Keys in float32 or better (FFN: what W_out reads; attention: what W_O reads), sums in float64.
3. With a `folder` the sums so far are kept there after every `every` documents, whole or not at
   all. After a kill, the same call with the same text resumes from them.

Statistics belong to the weights (fingerprint) and the text (hash) they were computed from, and are
refused for others."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qv_lens.errors import EditError, check_count, several
from qv_lens.facts.spans import encode
from qv_lens.files import whole
from qv_lens.models.lens import Lens, check_lens
from qv_lens.models.norms import at_least_float32
from qv_lens.progress import progress_bar

Module = Literal["ffn", "attn"]
KeyMoments = dict[tuple[int, str], Tensor]
#: tokens that C0 is taken over unless more are asked for, as a multiple of d_mlp
#: (`benchmarks/c0.py`)
ENOUGH = 10
#: padded tokens in one pass, whatever the length of the texts
TOKENS = 32_768
#: tokens from which on a pass runs as fast as it can, and the padding that is then allowed
WORTH = 512
PADDING = 1.1
#: keys whose products are formed together
BLOCK = 512


@dataclass(frozen=True)
class Statistics:
    """C0 of the FFN's keys by layer (and of attention's, where collected), with the number of
    tokens, the hash of the text, the fingerprint of the model, the length to which texts were cut
    (0: not known), and whether a BOS was put in front of each."""

    C0: dict[int, Float[Tensor, "d_mlp d_mlp"]]
    """Mean second moment of the FFN's keys, by layer (float64)."""
    tokens: int
    """How many tokens it was taken over."""
    corpus: str
    """Hash of the text."""
    fingerprint: str
    """The model's fingerprint."""
    attention: dict[int, Float[Tensor, "channel channel"]] = field(default_factory=dict)
    """The same of attention's keys, where they were collected."""
    max_tokens: int = 0
    """Length to which texts were cut (0: not known)."""
    prepend_bos: bool = False
    """Whether a BOS was put in front of each text."""

    @property
    def source(self) -> str:
        """What the moments were taken over: the text, how many of its tokens, and how it was cut."""
        return f"{self.corpus} {self.tokens} {self.max_tokens} {self.prepend_bos}"

    def of(self, lens: Lens, layer: int, module: Module = "ffn") -> Float[Tensor, "key key"]:
        """C0 of a layer. Raises `EditError` for another model's statistics or a layer that was not
        collected."""
        if self.fingerprint != lens.fingerprint:
            raise EditError(
                f"These statistics belong to the model {self.fingerprint}, not to {lens.name} "
                f"({lens.fingerprint}). Compute them again with "
                "qv_lens.editing.statistics.covariance."
            )
        if self.prepend_bos != lens.prepend_bos:
            raise EditError(
                f"These statistics were taken with prepend_bos={self.prepend_bos}, and {lens.name} "
                f"was loaded with prepend_bos={lens.prepend_bos}: its keys are others. Compute them "
                "again with this lens."
            )
        moments = self.C0 if module == "ffn" else self.attention
        if layer not in moments:
            what = "" if module == "ffn" else " of attention (modules=('ffn', 'attn'))"
            raise EditError(
                f"No statistics{what} for layer {layer}: collected were layers {sorted(moments)}."
            )
        return moments[layer]

    def save(self, folder: str | Path) -> Path:
        """Write statistics.safetensors and, last, statistics.json. Raises `EditError` if the folder
        cannot be written, or holds statistics."""
        if (Path(folder) / "statistics.json").exists():
            raise EditError(
                f"{folder} holds statistics already; nothing was written. Name another folder, or "
                "remove that one."
            )
        sums = {(layer, "ffn"): C for layer, C in self.C0.items()} | {
            (layer, "attn"): C for layer, C in self.attention.items()
        }
        header = {
            "tokens": self.tokens,
            "corpus": self.corpus,
            "fingerprint": self.fingerprint,
            "max_tokens": self.max_tokens,
            "prepend_bos": self.prepend_bos,
        }
        return _write(Path(folder), "statistics", sums, header)

    @classmethod
    def load(cls, folder: str | Path) -> Statistics:
        """Read statistics written by `save`. Raises `EditError` for files that are absent or
        damaged."""
        sums, header = _read(Path(folder), "statistics")
        try:
            by: dict[str, dict[int, Tensor]] = {"ffn": {}, "attn": {}}
            for (layer, module), C in sums.items():
                by[module][layer] = C
            return cls(
                by["ffn"],
                header["tokens"],
                header["corpus"],
                header["fingerprint"],
                by["attn"],
                header.get("max_tokens", 0),
                header.get("prepend_bos", False),
            )
        except KeyError as error:
            raise EditError(
                f"{folder} does not hold intact statistics: KeyError: {error}."
            ) from error


@dataclass
class _Progress:
    """The sums so far: over how many documents and tokens, and the hash of those documents."""

    sums: KeyMoments
    documents: int = 0
    tokens: int = 0
    digest: str = ""


def check_untouched(lens: Lens, taken: str) -> None:
    """Raise `EditError` for a lens that is not the bare model as it was wrapped; `taken`: what is
    taken of it, and how."""
    if not lens.bare:
        raise EditError(
            f"{taken} on the bare model: revert the patches, leave the interventions and take off "
            "the hooks first."
        )
    if lens.written_to():
        raise EditError(
            f"{taken} on the model as it was wrapped, and the weights of {lens.name} were written to "
            "since: wrap the model as it now is in a new Lens."
        )


@torch.no_grad()
def covariance(
    lens: Lens,
    texts: Iterable[str],
    layers: Iterable[int],
    batch_size: int = 128,
    max_tokens: int | None = None,
    *,
    modules: tuple[Module, ...] = ("ffn",),
    folder: str | Path | None = None,
    every: int = 2048,
    total: int | None = None,
) -> Statistics:
    """C0 of `layers` over `texts`; with `folder` resumable, and saved there at the end.
    `max_tokens`: length to which each text is cut (None: the model's context, as the releases do).
    `batch_size`: texts in a pass. `modules`: whose inputs, 'ffn' (W_out's) or 'attn' (W_O's).
    `every`: with a folder, after how many texts the sums so far are kept.
    `total`: how many texts there are, for the progress bar. If the folder already holds exactly
    these statistics, they are returned. Raises `EditError` for a lens with patches, interventions or
    hooks, or whose weights were written to, no text, or a folder of other statistics, which is left
    as it is."""
    check_lens(lens)
    layers = checked_layers(layers)
    _check_request(texts, {"batch_size": batch_size, "max_tokens": max_tokens, "every": every})
    check_untouched(lens, "Statistics are taken")
    if isinstance(modules, str) or not modules or set(modules) - {"ffn", "attn"}:
        raise EditError(f"modules are ('ffn',), ('attn',) or both, got {modules!r}.")
    length = text_length(lens, max_tokens)
    wanted = [
        (lens.check_layer(layer), module) for layer in sorted(set(layers)) for module in modules
    ]
    stream = _checked(texts)
    if folder is not None and (Path(folder) / "statistics.json").exists():
        return _finished(lens, folder, wanted, stream, length)
    progress = _resume(lens, folder, wanted, length)
    digest = hashed(itertools.islice(stream, progress.documents))
    if progress.documents and digest.hexdigest() != progress.digest:
        raise EditError(
            f"{folder} holds statistics begun on another text. Give the same text, or another "
            "folder."
        )
    bar = progress_bar(
        of="statistics",
        unit="text",
        total=_count(texts, total),
        initial=progress.documents,
    )
    with bar:
        for chunk in _chunks(stream, every):
            for rows in _batches(lens, chunk, batch_size, length):
                progress.tokens += sum(map(len, rows))
                _accumulate(lens, rows, progress.sums)
            digest = hashed(chunk, digest)
            progress.documents += len(chunk)
            progress.digest = digest.hexdigest()
            if folder is not None:
                _keep_partial(lens, Path(folder), progress, length)
            bar.update(len(chunk))
    if not progress.tokens:
        raise EditError("The text for the statistics holds no tokens.")
    means = {key: _mirrored(C) / progress.tokens for key, C in progress.sums.items()}
    statistics = Statistics(
        C0={layer: C for (layer, module), C in means.items() if module == "ffn"},
        tokens=progress.tokens,
        corpus=progress.digest,
        fingerprint=lens.fingerprint,
        attention={layer: C for (layer, module), C in means.items() if module == "attn"},
        max_tokens=length,
        prepend_bos=lens.prepend_bos,
    )
    if folder is not None:
        statistics.save(folder)
        for name in ("partial.json", "partial.safetensors"):
            (Path(folder) / name).unlink(missing_ok=True)
    return statistics


def _count(texts: Iterable[str], total: int | None) -> int | None:
    """How many texts there are, where that is known."""
    if total is None and isinstance(texts, (list, tuple)):
        return len(texts)
    return total


def _keep_partial(lens: Lens, folder: Path, progress: _Progress, length: int) -> None:
    """Write what was added up so far, and what it was added up on."""
    header = {
        "documents": progress.documents,
        "tokens": progress.tokens,
        "digest": progress.digest,
        "fingerprint": lens.fingerprint,
        "max_tokens": length,
        "prepend_bos": lens.prepend_bos,
    }
    _write(folder, "partial", progress.sums, header)


def enough(
    lens: Lens, texts: Iterable[str], tokens: int | None = None, max_tokens: int | None = None
) -> list[str]:
    """The first texts that together hold the given number of tokens (None: `ENOUGH` times d_mlp),
    each cut as `covariance` cuts it. If there are too few, all of them, with a warning."""
    wanted = ENOUGH * lens.d_mlp if tokens is None else tokens
    length = text_length(lens, max_tokens)
    chosen = []
    count = 0
    for text in texts:
        if count >= wanted:
            break
        chosen.append(text)
        count += min(length, len(encode(lens.tokenizer, text, lens.prepend_bos)[0]))
    if count < wanted:
        why = (
            f" for C0 (edits get worse below {ENOUGH} for each of the {lens.d_mlp} neurons of a "
            "layer, and are ruined below 3)"
        )
        warnings.warn(
            f"The text holds {count} tokens, and {wanted} are wanted{why if tokens is None else ''}. "
            "Name a longer text.",
            stacklevel=2,
        )
    return chosen


def checked_layers(layers: object) -> list[int]:
    """The layers, read once. Raises `EditError` for one number, or none."""
    values = several(layers)
    if not values:
        raise EditError(
            "Statistics need at least one layer, layers=[3] or layers=range(lens.n_layers), got "
            f"{layers!r:.80}."
        )
    return list(values)


def _check_request(texts: object, sizes: dict[str, int | None]) -> None:
    """Raise `EditError` for an argument that holds no texts, or a size below 1."""
    if isinstance(texts, str):
        raise EditError(
            "Statistics are taken over many texts: pass a list of them, not one string."
        )
    if not isinstance(texts, Iterable):
        raise EditError(f"Statistics are taken over texts: pass a list of them, not {texts!r:.80}.")
    # a data frame gives the names of its columns
    if isinstance(texts, (bytes, Mapping)) or hasattr(texts, "columns"):
        kind = type(texts).__name__
        raise EditError(
            f"Statistics are taken over texts: pass a list of them, not a {kind} (of a data frame "
            "its column: frame['text'])."
        )
    for name, size in sizes.items():
        if size is not None:
            check_count(name, size, error=EditError)


def _checked(texts: Iterable[object]) -> Iterator[str]:
    """The texts as they come. Raises `EditError` at the first item that is not a text, with its
    number."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise EditError(
                f"Text {number} of the statistics is {text!r:.80}, not a text. Leave out what is "
                "missing."
            )
        yield text


def _finished(
    lens: Lens,
    folder: str | Path,
    wanted: Sequence[tuple[int, str]],
    texts: Iterator[str],
    max_tokens: int,
) -> Statistics:
    """Statistics that are there already. Raises `EditError` if they are of other weights, layers,
    text or length."""
    statistics = Statistics.load(folder)
    keys = [(layer, "ffn") for layer in statistics.C0] + [
        (layer, "attn") for layer in statistics.attention
    ]
    digest = hashed(texts).hexdigest()
    wanted_now = (lens.fingerprint, sorted(wanted), digest, max_tokens, lens.prepend_bos)
    if (
        statistics.fingerprint,
        sorted(keys),
        statistics.corpus,
        statistics.max_tokens,
        statistics.prepend_bos,
    ) != wanted_now:
        raise EditError(
            f"{folder} holds finished statistics of the model {statistics.fingerprint}, layers "
            f"{sorted(statistics.C0)}, over {statistics.tokens} tokens of the text {statistics.corpus}, cut to "
            f"{statistics.max_tokens}, prepend_bos={statistics.prepend_bos}; asked for are "
            f"{lens.fingerprint}, layers {sorted({layer for layer, _ in wanted})}, text {digest}, "
            f"cut to {max_tokens}, prepend_bos={lens.prepend_bos}. Nothing was written: name "
            "another folder, or remove that one."
        )
    return statistics


def _resume(
    lens: Lens, folder: str | Path | None, wanted: list[tuple[int, str]], max_tokens: int
) -> _Progress:
    fresh = _Progress({key: _zeros(lens, *key) for key in wanted})
    if folder is None or not (Path(folder) / "partial.json").exists():
        return fresh
    sums, header = _read(Path(folder), "partial")
    theirs = (
        header.get("fingerprint"),
        header.get("max_tokens"),
        header.get("prepend_bos", False),
        sorted(sums),
    )
    if theirs != (lens.fingerprint, max_tokens, lens.prepend_bos, sorted(wanted)):
        raise EditError(
            f"{folder} holds statistics begun for another model, length or layers, or with another "
            "BOS. Choose another folder."
        )
    sums = {key: C.to(lens.device) for key, C in sums.items()}
    return _Progress(sums, header["documents"], header["tokens"], header["digest"])


def _zeros(lens: Lens, layer: int, module: str) -> Tensor:
    size = lens.d_mlp if module == "ffn" else lens.backend_adapter.w_o(layer).shape[0]
    return torch.zeros(size, size, dtype=torch.float64, device=lens.device)


def text_length(lens: Lens, max_tokens: int | None) -> int:
    """To how many tokens a text is cut: so many, or as many as the model's context holds."""
    context = lens.backend_adapter.cfg.n_ctx
    return context if max_tokens is None else min(max_tokens, context)


def hashed(texts: Iterable[str], digest: hashlib.blake2b | None = None) -> hashlib.blake2b:
    """The hash that names a text, of its documents so far; goes on from `digest`."""
    digest = hashlib.blake2b(digest_size=8) if digest is None else digest
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest


def _chunks(stream: Iterator[str], size: int) -> Iterator[list[str]]:
    while chunk := list(itertools.islice(stream, size)):
        yield chunk


def _batches(
    lens: Lens, texts: list[str], batch_size: int, max_tokens: int
) -> Iterator[list[list[int]]]:
    """Token rows of like length together, as many as `batch_size` and `TOKENS` allow; a batch that
    is worth a pass ends before its padding grows."""
    rows = sorted(
        (encode(lens.tokenizer, text, lens.prepend_bos)[0][:max_tokens] for text in texts), key=len
    )
    batch: list[list[int]] = []
    real = 0
    for row in filter(None, rows):
        padded = len(row) * (len(batch) + 1)
        wasteful = real >= WORTH and padded > PADDING * (real + len(row))
        if batch and (len(batch) == batch_size or padded > TOKENS or wasteful):
            yield batch
            batch, real = [], 0
        batch.append(row)
        real += len(row)
    if batch:
        yield batch


def _accumulate(lens: Lens, rows: list[list[int]], sums: KeyMoments) -> None:
    real = (
        torch.arange(max(map(len, rows)))[None] < torch.tensor([len(row) for row in rows])[:, None]
    )
    real = real.to(lens.device)

    def add(key: tuple[int, str]):
        def hook(m: Tensor) -> None:
            _add_gram(sums[key], at_least_float32(m.flatten(2)[real]))

        return hook

    backend = lens.backend_adapter
    hooks = [
        (backend.coefficient(key[0]) if key[1] == "ffn" else backend.z(key[0]), add(key))
        for key in sums
    ]
    # nothing above the last layer is run
    lens.stream(rows, max(layer for layer, _ in sums) + 1, hooks)


def _add_gram(C: Float[Tensor, "k k"], keys: Float[Tensor, "token k"]) -> None:
    """C += K^T K on and above the diagonal, in blocks: what lies below is the same again
    (`_mirrored`)."""
    for start in range(0, keys.shape[1], BLOCK):
        rows = keys[:, start : start + BLOCK]
        C[start : start + BLOCK, start:].add_((rows.T @ keys[:, start:]).double())


def _mirrored(C: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """The symmetric matrix with this upper triangle."""
    return C.triu() + C.triu(1).T


def _write(folder: Path, name: str, sums: KeyMoments, header: dict) -> Path:
    """The tensors, stamped with the header, then the header: each whole or absent."""
    tensors = {f"{layer}.{module}": C.contiguous() for (layer, module), C in sums.items()}
    try:
        with (
            whole(folder / f"{name}.json") as described,
            whole(folder / f"{name}.safetensors") as sums_file,
        ):
            save_file(tensors, sums_file, metadata={"stamp": json.dumps(header)})
            described.write_text(json.dumps(header, indent=2) + "\n")
    except OSError as error:
        raise EditError(f"Cannot write the statistics to {folder}: {error}.") from error
    return folder


def _read(folder: Path, name: str) -> tuple[KeyMoments, dict]:
    from safetensors import safe_open

    try:
        (folder / f"{name}.json").read_text()
        # the header that belongs to these very tensors
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            header = json.loads((file.metadata() or {})["stamp"])
        tensors = load_file(folder / f"{name}.safetensors")
        keys = {key: key.split(".") for key in tensors}
        return {(int(layer), module): tensors[key] for key, (layer, module) in keys.items()}, header
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if not folder.exists():
            raise EditError(f"There is no folder {folder}.") from error
        raise EditError(
            f"{folder} does not hold intact statistics: {type(error).__name__}: {error}."
        ) from error
