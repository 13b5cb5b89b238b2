"""C0 = (1/T) sum k k^T over all tokens of a text: the uncentred second moment of an FFN's keys, all layers in one pass.

Keys in float32 or better, sums in float64. Statistics belong to the weights (fingerprint) and the text (hash) they
were computed from, and are refused for others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from qv_lens.errors import EditError
from qv_lens.models.lens import Lens, at_least_float32


@dataclass(frozen=True)
class Statistics:
    """C0 by layer, with the number of tokens, the hash of the text and the fingerprint of the model."""

    C0: dict[int, Float[Tensor, "d_mlp d_mlp"]]
    tokens: int
    corpus: str
    fingerprint: str

    def of(self, lens: Lens, layer: int) -> Float[Tensor, "d_mlp d_mlp"]:
        """C0 of a layer. Raises `EditError` for another model's statistics or a layer that was not collected."""
        if self.fingerprint != lens.fingerprint:
            raise EditError(
                f"These statistics belong to the model {self.fingerprint}, not to {lens.name} ({lens.fingerprint}). "
                "Compute them anew with qv_lens.editing.statistics.covariance."
            )
        if layer not in self.C0:
            raise EditError(f"No statistics for layer {layer}: collected were layers {sorted(self.C0)}.")
        return self.C0[layer]

    def save(self, folder: str | Path) -> Path:
        """Write statistics.safetensors and statistics.json. Raises `EditError` if the folder cannot be written."""
        from safetensors.torch import save_file

        target = Path(folder)
        header = {"tokens": self.tokens, "corpus": self.corpus, "fingerprint": self.fingerprint}
        try:
            target.mkdir(parents=True, exist_ok=True)
            save_file({str(layer): C0.contiguous() for layer, C0 in self.C0.items()}, target / "statistics.safetensors")
            (target / "statistics.json").write_text(json.dumps(header, indent=2) + "\n")
        except OSError as error:
            raise EditError(f"Cannot write the statistics to {target}: {error}.") from error
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Statistics:
        """Read statistics written by `save`. Raises `EditError` for files that are absent or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        source = Path(folder)
        try:
            header = json.loads((source / "statistics.json").read_text())
            tensors = load_file(source / "statistics.safetensors")
            return cls({int(k): v for k, v in tensors.items()}, header["tokens"], header["corpus"], header["fingerprint"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise EditError(f"{source} does not hold intact statistics: {type(error).__name__}: {error}.") from error


@torch.no_grad()
def covariance(
    lens: Lens, texts: Iterable[str], layers: Iterable[int], batch_size: int = 128, max_tokens: int = 512
) -> Statistics:
    """C0 of `layers` over `texts`, each cut to `max_tokens`. Raises `EditError` for a patched lens or no text."""
    if lens.patches:
        raise EditError("Statistics are taken on the unpatched model: revert the patches first.")
    max_tokens = min(max_tokens, lens.backend_adapter.cfg.n_ctx)
    wanted = sorted({lens.check_layer(layer) for layer in layers})
    sums = {layer: torch.zeros(lens.d_mlp, lens.d_mlp, dtype=torch.float64, device=lens.device) for layer in wanted}
    digest, tokens, pool = hashlib.blake2b(digest_size=8), 0, list(texts)
    pool.sort(key=len)  # rows of like length share a batch
    for start in tqdm(range(0, len(pool), batch_size), desc="statistics", unit="batch", delay=2, leave=False):
        rows = []
        for text in pool[start : start + batch_size]:
            digest.update(text.encode() + b"\0")
            rows.append(lens.tokenizer(text)["input_ids"][:max_tokens])
        rows = [row for row in rows if row]
        if rows:
            tokens += sum(map(len, rows))
            _accumulate(lens, rows, sums)
    if not tokens:
        raise EditError("The text for the statistics holds no tokens.")
    return Statistics({layer: C / tokens for layer, C in sums.items()}, tokens, digest.hexdigest(), lens.fingerprint)


def _accumulate(lens: Lens, rows: list[list[int]], sums: dict[int, Tensor]) -> None:
    real = torch.arange(max(map(len, rows)))[None] < torch.tensor([len(row) for row in rows])[:, None]
    real = real.to(lens.device)

    def add(layer: int):
        def hook(m: Float[Tensor, "prompt seq d_mlp"]) -> None:
            k = at_least_float32(m[real])
            sums[layer].add_((k.T @ k).double())

        return hook

    lens.logits(rows, [(lens.backend_adapter.coefficient(layer), add(layer)) for layer in sums])
