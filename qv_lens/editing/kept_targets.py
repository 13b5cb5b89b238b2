"""z* that was searched once is kept in a folder, a file per request, and read from there the next
time.

A file is named after all that z* depends on: the weights and interventions as they are now, the
kind of device, the contexts, the kind of search (`SearchKind`) and the request. The seconds in the
file are those of the search that found z*, alone or with others. The file is written under another
name and renamed, so that it is whole or absent; if it is damaged, z* is searched again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qv_lens.editing.targets import SearchKind, Targets
from qv_lens.errors import ConfigError
from qv_lens.facts.records import EditRequest
from qv_lens.files import whole
from qv_lens.models.lens import Lens

#: changes when z* is searched differently
FORMAT = 1


@dataclass(frozen=True)
class KeptTargets:
    """z* of one request, and the seconds that its search took."""

    targets: Targets
    """z*."""
    seconds: float
    """What the search took."""


@dataclass(frozen=True)
class TargetShelf:
    """The files of one kind of search on one state of a model."""

    folder: Path
    """Where they are kept."""
    name: str
    """What they were searched for."""
    device: torch.device
    """Where they are read to."""

    @classmethod
    def of(
        cls, lens: Lens, kind: SearchKind, templates: Sequence[str], folder: Path
    ) -> TargetShelf:
        return cls(
            folder,
            repr((FORMAT, lens.state(), lens.backend, lens.device.type, kind, tuple(templates))),
            lens.device,
        )

    def read(self, requests: Sequence[EditRequest]) -> dict[EditRequest, KeptTargets]:
        """The z* found in the folder, intact."""
        targets = {}
        for request in requests:
            kept = _read(self._file(request), self.device)
            if kept is not None:
                targets[request] = kept
        return targets

    def write(self, targets: Mapping[EditRequest, KeptTargets]) -> None:
        """Raises `ConfigError` where the folder cannot be written."""
        for request, kept in targets.items():
            _write(self._file(request), kept)

    def _file(self, request: EditRequest) -> Path:
        digest = hashlib.blake2b(f"{self.name}{request!r}".encode(), digest_size=16).hexdigest()
        return self.folder / f"{digest}.safetensors"


def _read(file: Path, device: torch.device) -> KeptTargets | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stored:
            header = json.loads(stored.metadata()["targets"])
            z_of = tuple(stored.get_tensor(f"z{i}").to(device) for i in range(header["sites"]))
        losses = tuple(tuple(tuple(fact) for fact in step) for step in header["losses"])
        return KeptTargets(Targets(z_of, losses), header["seconds"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _write(file: Path, kept: KeptTargets) -> None:
    tensors = {f"z{i}": z.contiguous().cpu() for i, z in enumerate(kept.targets.z_of)}
    header = {"sites": len(tensors), "losses": kept.targets.losses, "seconds": kept.seconds}
    try:
        with whole(file) as partial:
            save_file(tensors, partial, metadata={"targets": json.dumps(header)})
    except OSError as error:
        raise ConfigError(f"Cannot keep the target vectors in {file.parent}: {error}.") from error
