"""Patch: what an edit adds to the weights, by (layer, parameter); saved as patch.safetensors + patch.json."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.errors import PatchError

if TYPE_CHECKING:
    from qv_lens.models.lens import Lens

FORMAT = 1


@dataclass(frozen=True)
class Delta:
    """left @ right in float64, TransformerLens layout: for W_out [d_mlp, n] and [n, d_model], n facts."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """An upper bound of the rank: the number of factors."""
        return self.left.shape[1]

    def dense(self) -> Float[Tensor, "rows columns"]:
        return self.left @ self.right

    def norm(self) -> float:
        """Frobenius norm, without forming the product."""
        gram = (self.left.T @ self.left) * (self.right @ self.right.T)
        return float(gram.sum().clamp_min(0).sqrt())


@dataclass(frozen=True)
class Patch:
    """Deltas for one model. `info` tells how they came about: method, hyperparameters, facts, seed, norms, losses."""

    deltas: dict[tuple[int, str], Delta]
    fingerprint: str
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        where = ", ".join(f"{name}[{layer}]" for layer, name in self.deltas)
        return f"Patch({self.info.get('method', 'by hand')}: {where})"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers written, ascending."""
        return tuple(sorted({layer for layer, _ in self.deltas}))

    def check(self, lens: Lens) -> None:
        """Raise `PatchError` unless this patch was made for the lens's own base weights."""
        if self.fingerprint != lens.fingerprint:
            raise PatchError(
                f"This patch was made for a model with fingerprint {self.fingerprint}, not for {lens.name} "
                f"({lens.fingerprint}). Load the model it names ({self.info.get('model', 'unknown')}), weights unprocessed."
            )
        for (layer, name), delta in self.deltas.items():
            weight = lens.parameter(layer, name)
            if tuple(weight.shape) != delta.shape:
                raise PatchError(f"The delta of {name}[{layer}] is {delta.shape}, the weight {tuple(weight.shape)}.")
            if not (torch.isfinite(delta.left).all() and torch.isfinite(delta.right).all()):
                raise PatchError(f"The delta of {name}[{layer}] is not finite; nothing was written.")

    def save(self, folder: str | Path) -> Path:
        """Write patch.safetensors and, last, patch.json. Raises `PatchError` if the folder cannot be written."""
        from safetensors.torch import save_file

        target = Path(folder)
        tensors = {}
        for (layer, name), delta in self.deltas.items():
            tensors[f"{layer}.{name}.left"] = delta.left.contiguous()
            tensors[f"{layer}.{name}.right"] = delta.right.contiguous()
        header = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "keys": [list(key) for key in self.deltas],
            "info": self.info,
        }
        try:
            target.mkdir(parents=True, exist_ok=True)
            save_file(tensors, target / "patch.safetensors.tmp")
            (target / "patch.json.tmp").write_text(json.dumps(header, indent=2) + "\n")
            os.replace(target / "patch.safetensors.tmp", target / "patch.safetensors")
            os.replace(target / "patch.json.tmp", target / "patch.json")
        except OSError as error:
            raise PatchError(f"Cannot write the patch to {target}: {error}.") from error
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Patch:
        """Read a patch written by `save`. Raises `PatchError` for files that are absent, damaged or of another format."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        source = Path(folder)
        try:
            header = json.loads((source / "patch.json").read_text())
            tensors = load_file(source / "patch.safetensors")
            if header["format"] != FORMAT:
                raise PatchError(f"{source} holds a patch of format {header['format']}; this version reads {FORMAT}.")
            deltas = {
                (int(layer), name): Delta(tensors[f"{layer}.{name}.left"], tensors[f"{layer}.{name}.right"])
                for layer, name in header["keys"]
            }
            return cls(deltas, header["fingerprint"], header["info"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise PatchError(f"{source} does not hold an intact patch: {type(error).__name__}: {error}.") from error

    def frame(self):
        """One row per written weight: layer, parameter, rank, norm of the delta, and relative norm where recorded."""
        import pandas as pd

        rows = []
        for (layer, name), delta in self.deltas.items():
            rows.append({"layer": layer, "parameter": name, "rank": delta.rank, "norm": delta.norm()})
        return pd.DataFrame(rows)
