"""GGUF files, compared with the model that transformers makes of one.

transformers takes some settings of a GGUF file's header and some of its tensors, and leaves out the
rest without a word. The model that comes out is then another one, and agrees with itself.

1. Every setting of the header that changes what is computed is compared with the config, and what
   stands in front of a text with the tokenizer (`left_out`).
2. Where the file holds more numbers than the model, the tensors that were not taken are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isclose
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qv_lens.facts.spans import puts_bos
from qv_lens.models.agreement import rotary_bases, rotary_kinds

#: numbers of a header by key: what they are called, and how configs call them
NUMBERS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType({
    "attention.layer_norm_rms_epsilon": ("epsilon of its norms", ("rms_norm_eps",)),
    "attention.layer_norm_epsilon": ("epsilon of its norms", ("layer_norm_eps", "layer_norm_epsilon")),
    "attn_logit_softcapping": ("cap of its attention scores", ("attn_logit_softcapping",)),
    "final_logit_softcapping": ("cap of its logits", ("final_logit_softcapping",)),
})  # fmt: skip
#: tokenizers (`tokenizer.ggml.pre`) that put a BOS where the file does not say, as sentencepiece's do
#: (llama.cpp, llama_vocab::impl::load)
BOS_WITHOUT_A_WORD = frozenset({"llama3", "llama-v3", "llama-bpe", "tekken"})


def left_out(file: Path, hf: Any, tokenizer: Any, prepend_bos: bool = False) -> list[str]:
    """What a GGUF file says that the model and the tokenizer made of it do not hold, in words; empty
    where they hold all. `prepend_bos`: whether a BOS is put in front without the tokenizer."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    family = reader.fields["general.architecture"].contents()
    fields = _under(f"{family}.", reader)
    return [
        *_rotary(fields, hf.config),
        *_others(fields, hf.config),
        *_in_front(_under("tokenizer.ggml.", reader), tokenizer, prepend_bos),
        *_tensors(reader, family, hf),
    ]


def _under(prefix: str, reader: Any) -> dict[str, Any]:
    """The settings whose names begin so, by the rest of their names."""
    fields = {name: field for name, field in reader.fields.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): field.contents() for name, field in fields.items()}


def _rotary(fields: Mapping[str, Any], config: Any) -> list[str]:
    """What of its rotary positions is left out: the scaling, the base, how many dimensions turn."""
    reasons = []
    kind = str(fields.get("rope.scaling.type", "none"))
    if "rope.scale_linear" in fields and fields["rope.scale_linear"] != 1:  # of older files
        kind = "linear"
    if kind != "none" and kind not in rotary_kinds(config):
        reasons.append(f"the {kind} scaling of its rotary positions")
    base, bases = fields.get("rope.freq_base"), rotary_bases(config)
    if (
        base is not None
        and bases
        and not any(isclose(base, known_base, rel_tol=1e-5) for known_base in bases)
    ):
        reasons.append(f"the base {base:g} of its rotary positions")
    turned, wanted = fields.get("rope.dimension_count"), _turned(config)
    if turned is not None and wanted is not None and turned != wanted:
        reasons.append(f"that {turned} dimensions of a head are turned ({wanted} would be)")
    return reasons


def _turned(config: Any) -> int | None:
    """How many dimensions of a head the rotary positions turn; None where there are none."""
    table = getattr(config, "rope_parameters", None)
    if not table:
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = table.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return int(head * (share or 1))


def _others(fields: Mapping[str, Any], config: Any) -> list[str]:
    """Other settings that are left out."""
    reasons = []
    window, context = fields.get("attention.sliding_window"), fields.get("context_length", inf)
    if window and window < context and window != getattr(config, "sliding_window", None):
        reasons.append(f"a sliding window of {window} tokens")
    for key, (what, names) in NUMBERS.items():
        held = next((getattr(config, name) for name in names if hasattr(config, name)), None)
        if key in fields and (held is None or not isclose(fields[key], held, rel_tol=1e-5)):
            reasons.append(f"{fields[key]:g} as the {what}")
    return reasons


def _in_front(fields: Mapping[str, Any], tokenizer: Any, prepend_bos: bool) -> list[str]:
    """What the tokenizer puts in front of a text against the file, or leaves out there."""
    bos, reasons = puts_bos(tokenizer), []
    without_a_word = (
        bos or fields.get("model") == "llama" or fields.get("pre") in BOS_WITHOUT_A_WORD
    )
    wanted = fields.get("add_bos_token", without_a_word)
    if bos and not wanted:
        reasons.append("that a BOS stands nowhere")
    if wanted and not (bos or prepend_bos):
        reasons.append("that a BOS stands in front of every text (prepend_bos=True puts it there)")
    first = str(tokenizer.convert_ids_to_tokens(tokenizer("The")["input_ids"])[int(bos)])
    if fields.get("add_space_prefix") is False and first.startswith("\N{LOWER ONE EIGHTH BLOCK}"):
        reasons.append("that no blank stands in front of a text")
    return reasons


def _tensors(reader: Any, family: str, hf: Any) -> list[str]:
    """The tensors that were not taken."""
    held = {weight.data_ptr(): weight.numel() for weight in hf.state_dict().values()}
    if sum(int(tensor.n_elements) for tensor in reader.tensors) <= sum(held.values()):
        return []
    taken = _names(family, hf)
    odd = [tensor.name for tensor in reader.tensors if tensor.name not in taken]
    return [f"{len(odd)} of its tensors, first {odd[0]!r}"] if odd else ["some of its tensors"]


def _names(family: str, hf: Any) -> set[str]:
    """What GGUF calls the model's tensors."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family)
    table = get_tensor_name_map(kind, hf.config.num_hidden_layers)
    split = (name.rpartition(".") for name in hf.state_dict())
    return {f"{table.get_name(base)}.{suffix}" for base, _, suffix in split}
