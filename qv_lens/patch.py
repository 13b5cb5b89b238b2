"""Patch: what an edit adds to the weights, by (layer, parameter); saved as patch.safetensors +
patch.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.errors import PatchError
from qv_lens.files import sha256, whole

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1


@dataclass(frozen=True)
class Delta:
    """left @ right in float64, TransformerLens layout: for W_out [d_mlp, n] and [n, d_model], n
    facts.

    Where an edit has no such factors (masked entries, fine-tuning) `right` is None and `left` the
    delta itself."""

    left: Float[Tensor, "rows rank"]
    """The left factor; the whole delta where there is no right one."""
    right: Float[Tensor, "rank columns"] | None = None
    """The right factor."""

    def __post_init__(self) -> None:
        """Row by row, as a file holds it: a product of factors that lie otherwise rounds otherwise.
        Raises `ValueError` for factors that do not fit."""
        if self.right is not None and self.left.shape[-1] != self.right.shape[0]:
            raise ValueError(
                f"factors of shapes {tuple(self.left.shape)} and {tuple(self.right.shape)} have no "
                "product"
            )
        object.__setattr__(self, "left", self.left.contiguous())
        if self.right is not None:
            object.__setattr__(self, "right", self.right.contiguous())

    @property
    def shape(self) -> tuple[int, ...]:
        return (
            tuple(self.left.shape)
            if self.right is None
            else (self.left.shape[0], self.right.shape[1])
        )

    @property
    def rank(self) -> int:
        """An upper bound of the rank: the number of factors, or the smaller side."""
        if self.right is not None:
            return self.left.shape[1]
        return min(self.left.shape) if self.left.ndim > 1 else 1

    def dense(self) -> Float[Tensor, "rows columns"]:
        return self.left if self.right is None else self.left @ self.right

    def factors(self) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]:
        """The factors; for a dense delta, factors from its singular values above rounding."""
        if self.right is not None:
            return self.left, self.right
        U, s, V = torch.linalg.svd(self.left, full_matrices=False)
        keep = s > 1e-10 * s.max().clamp_min(1e-300)
        return U[:, keep] * s[keep], V[keep]

    def to(self, device: torch.device) -> Delta:
        return Delta(self.left.to(device), None if self.right is None else self.right.to(device))

    def norm(self) -> float:
        """Frobenius norm, without forming the product."""
        if self.right is None:
            return float(self.left.norm())
        # by QR: the Gram matrices of factors that nearly cancel lose half of the digits
        _, left = torch.linalg.qr(self.left, mode="r")
        _, right = torch.linalg.qr(self.right.T, mode="r")
        return float((left @ right.T).norm())

    def add_to(self, weight: Float[Tensor, "rows columns"]) -> None:
        """Write weight + delta into the weight: added in float64, rounded once."""
        weight.copy_(weight.double() + self.dense().to(weight.device))

    def finite(self) -> bool:
        """Whether every entry is a number."""
        return all(
            bool(torch.isfinite(part).all()) for part in (self.left, self.right) if part is not None
        )

    @staticmethod
    def total(parts: list[Delta]) -> Delta:
        """The sum of several deltas: factors side by side where all have them."""
        if len(parts) == 1:
            return parts[0]
        factors = [(d.left, d.right) for d in parts if d.right is not None]
        if len(factors) == len(parts):
            return Delta(
                torch.cat([left for left, _ in factors], 1),
                torch.cat([right for _, right in factors], 0),
            )
        return Delta(torch.stack([d.dense() for d in parts]).sum(0))


def _balanced(
    left: Float[Tensor, "rows rank"], right: Float[Tensor, "rank columns"]
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]:
    """Factors of the same product, of equal size and without columns that cancel one another, so
    that they may be rounded: two facts with nearly one key give huge factors of a small delta."""
    Q, A = torch.linalg.qr(left)
    P, B = torch.linalg.qr(right.T)
    U, s, V = torch.linalg.svd(A @ B.T)
    root = s.sqrt()
    return Q @ U[:, : len(s)] * root, root[:, None] * V[: len(s)] @ P.T


def summed(parts: Iterable[Mapping[tuple[int, str], Delta]]) -> dict[tuple[int, str], Delta]:
    """The sums of several deltas, weight by weight."""
    of_weight: dict[tuple[int, str], list[Delta]] = {}
    for part in parts:
        for key, delta in part.items():
            of_weight.setdefault(key, []).append(delta)
    return {key: Delta.total(of_weight[key]) for key in sorted(of_weight)}


@dataclass(frozen=True)
class Patch:
    """Deltas for one model. `info` tells how they came about: method, hyperparameters, facts, seed,
    norms, losses.

    `kept`: what later edits by the same method read from this one while it is applied, by weight.
    For AlphaEdit this is K K^T of its keys, for PRUNE the delta before it was restrained."""

    deltas: dict[tuple[int, str], Delta]
    """What is added, by (layer, parameter)."""
    fingerprint: str
    """The model that it was made for."""
    info: dict[str, Any] = field(default_factory=dict)
    """How it came about: method, hyperparameters, facts, seed, norms, losses."""
    kept: dict[tuple[int, str], Delta] = field(default_factory=dict)
    """What later edits by the same method read of this one while it is applied, by weight."""

    def __repr__(self) -> str:
        where = ", ".join(f"{name}[{layer}]" for layer, name in self.deltas)
        return f"Patch({self.info.get('method', 'by hand')}: {where})"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers written, ascending."""
        return tuple(sorted({layer for layer, _ in self.deltas}))

    def to(self, device: torch.device) -> Patch:
        """The same patch, its tensors on a device."""
        deltas = {key: delta.to(device) for key, delta in self.deltas.items()}
        kept = {key: delta.to(device) for key, delta in self.kept.items()}
        return replace(self, deltas=deltas, kept=kept)

    def save(self, folder: str | Path) -> Path:
        """Write patch.safetensors and, last, patch.json. Raises `PatchError` if the folder cannot
        be written, or holds a patch."""
        from safetensors.torch import save_file

        target = Path(folder)
        if (target / "patch.json").exists():
            raise PatchError(
                f"{target} holds a patch already; nothing was written. Name another folder, or "
                "remove that one."
            )
        named = [(f"{layer}.{name}", delta) for (layer, name), delta in self.deltas.items()]
        named += [(f"kept.{layer}.{name}", delta) for (layer, name), delta in self.kept.items()]
        tensors = {}
        for name, delta in named:
            # a copy: two deltas may share a tensor, which safetensors refuses
            tensors[f"{name}.left"] = delta.left.clone(memory_format=torch.contiguous_format)
            if delta.right is not None:
                tensors[f"{name}.right"] = delta.right.clone(memory_format=torch.contiguous_format)
        header = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "keys": [list(key) for key in self.deltas],
            "kept": [list(key) for key in self.kept],
            "info": self.info,
        }
        try:
            with (
                whole(target / "patch.json") as described,
                whole(target / "patch.safetensors") as weights,
            ):
                save_file(tensors, weights)
                header["sha256"] = sha256(weights)
                described.write_text(json.dumps(header, indent=2) + "\n")
        except OSError as error:
            raise PatchError(f"Cannot write the patch to {target}: {error}.") from error
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Patch:
        """Read a patch written by `save`. Raises `PatchError` for files that are absent, damaged, of
        two patches, or of another format."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        source = Path(folder)
        try:
            header = json.loads((source / "patch.json").read_text())
            # the file's tensors begin anywhere in memory, and products would round otherwise
            stored_as = load_file(source / "patch.safetensors")
            tensors = {name: tensor.clone() for name, tensor in stored_as.items()}
            # patches of earlier versions have none
            if header.get("sha256") not in (None, sha256(source / "patch.safetensors")):
                raise ValueError("patch.safetensors is not what was saved with patch.json")
            if header["format"] != FORMAT:
                raise PatchError(
                    f"{source} holds a patch of format {header['format']}; this version reads "
                    f"{FORMAT}."
                )

            def stored(name: str) -> Delta:
                return Delta(tensors[f"{name}.left"], tensors.get(f"{name}.right"))

            deltas = {
                (int(layer), name): stored(f"{layer}.{name}") for layer, name in header["keys"]
            }
            kept = {
                (int(layer), name): stored(f"kept.{layer}.{name}")
                for layer, name in header.get("kept", ())
            }
            if not isinstance(header["info"], dict):
                raise TypeError(f"its info is {header['info']!r:.40}, no table")
            return cls(deltas, header["fingerprint"], header["info"], kept)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if (source / "config.json").exists() and not (source / "patch.json").exists():
                raise PatchError(
                    f"{source} is a model's checkpoint, not a patch: a patch is what qv-lens edit "
                    "--out or patch.save wrote."
                ) from error
            if not source.exists():
                raise PatchError(f"There is no folder {source}.") from error
            raise PatchError(
                f"{source} does not hold an intact patch: {type(error).__name__}: {error}."
            ) from error

    def to_lora(self, folder: str | Path, max_rank: int = 256) -> Path:
        """Write the patch as a PEFT LoRA adapter (adapter_model.safetensors, adapter_config.json):
        PEFT on the base model then gives the logits of the edited one.

        Raises `PatchError` for a bias, a delta of more than `max_rank`, or a patch that does not
        know its modules' names."""
        from safetensors.torch import save_file

        if not self.deltas:
            raise PatchError("This patch holds no weights: there is nothing to write.")
        modules, tensors, ranks = self.info.get("modules", {}), {}, {}
        for (layer, name), delta in self.deltas.items():
            module = modules.get(f"{layer}.{name}")
            if module is None or not name.startswith("W_"):
                why = (
                    "is not a weight matrix"
                    if module
                    else "has no module name (patches made by qv.edit have)"
                )
                raise PatchError(
                    f"A LoRA adapter cannot hold {name}[{layer}]: it {why}. Use lens.save (--save) instead."
                )
            if "[" in module:
                raise PatchError(
                    f"A LoRA adapter cannot hold {name}[{layer}]: the checkpoint keeps it in one "
                    f"matrix with others ({module}). Use lens.save (--save) instead."
                )
            left, right = _balanced(*delta.factors())
            if left.shape[1] > max_rank:
                raise PatchError(
                    f"The delta of {name}[{layer}] has rank {left.shape[1]}, more than {max_rank}. "
                    "Use lens.save (--save) instead."
                )
            tensors[f"base_model.model.{module}.lora_A.weight"] = left.T.float().contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = right.T.float().contiguous()
            ranks[module] = left.shape[1]
        first = max(ranks.values())
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.info.get("model"),
            "bias": "none",
            "r": first,
            "lora_alpha": first,
            "lora_dropout": 0.0,
            "target_modules": sorted(ranks),
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "inference_mode": True,
            "fan_in_fan_out": bool(self.info.get("conv1d", False)),
        }
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
            with whole(target / "adapter_model.safetensors") as partial:
                save_file(tensors, partial)
            with whole(target / "adapter_config.json") as partial:
                partial.write_text(json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise PatchError(f"Cannot write the adapter to {target}: {error}.") from error
        return target

    def frame(self) -> pd.DataFrame:
        """One row per written weight: layer, parameter, rank, norm of the delta, its share of the
        weight's norm."""
        import pandas as pd

        relative = self.info.get("relative_norm", {})
        rows = []
        for (layer, name), delta in self.deltas.items():
            share = relative.get(f"{layer}.{name}", float("nan"))
            rows.append(
                {
                    "layer": layer,
                    "parameter": name,
                    "rank": delta.rank,
                    "norm": delta.norm(),
                    "relative_norm": share,
                }
            )
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        """The edit card: method, facts, what was written where, how far, and the search's last
        losses."""
        facts = self.info.get("facts", [])
        shown = [
            f"<li>{escape(f['prompt'].replace('{}', f['subject']))} <s>{escape(f['old'])}</s> "
            f"{escape(f['new'])}</li>"
            for f in facts[:20]
        ]
        more = f"<li>and {len(facts) - 20} more</li>" if len(facts) > 20 else ""
        settings = ", ".join(f"{k}={v}" for k, v in self.info.get("hyperparameters", {}).items())
        last = [steps[-1][0] for steps in self.info.get("losses", []) if steps]
        loss = (
            f"<p>final loss of the search: {min(last):.3f} to {max(last):.3f}</p>" if last else ""
        )
        return (
            f"<b>{escape(self.info.get('method', 'Patch'))}</b> on {escape(self.info.get('model', self.fingerprint))}"
            f"<ul>{''.join(shown)}{more}</ul>{self.frame().to_html(index=False)}{loss}<small>{escape(settings)}</small>"
        )
