"""Whether a hooked model computes what its Hugging Face model computes, asked once, when it is
wrapped.

1. `unread`: settings of a checkpoint's config that TransformerLens's config reader passes over.
   Some of them show only on prompts longer than a probe can be (a rotary scaling for 32,768
   tokens), so they are read from the config.
2. `probe`: logits of one row of tokens of ordinary text, as long as the model's size allows; None
   for a model too big for two passes, for which 1 alone decides. (Of tokens that no text would bring
   together a model in bfloat16 makes noise: on such a row Qwen2.5-Coder-0.5B's logits with
   transformers' own two ways to compute attention lie 50% of their spread apart, on text 2%.)
3. `distance`: how far two such logits lie apart, relative to their spread; `TOLERANCE` by dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.facts.corpora import python_reference

#: parameters x tokens that a probe may cost: 300 tokens of a model of 135 million parameters, about
#: two seconds a pass
BUDGET = 4e10
LONGEST = 512
SHORTEST = 16
#: distinct tokens of a probe's text, as a share of its length, below which the tokenizer cannot read it
VARIED = 0.2
#: largest relative distance of two ways to compute the same logits: far above rounding, far below
#: another model
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}


def unread(config: Any, context: int, switches: Sequence[str]) -> list[str]:
    """What HookedTransformer would leave out of this model within `context` tokens, in words; empty
    where it leaves out nothing.
    `switches`: the settings of this architecture's config that it never reads."""
    reasons = [f"{kind} scaling of its rotary positions" for kind in rotary_kinds(config)]
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding and window is not None and window < context:
        reasons.append(f"a sliding window of {window} tokens")
    reasons += [f"{name} = True" for name in switches if getattr(config, name, False)]
    return reasons


def rotary_base(config: Any) -> float | None:
    """The base of a model's rotary positions, where its config names a single one."""
    table = getattr(config, "rope_parameters", None)
    named = table.get("rope_theta") if isinstance(table, Mapping) else None
    base = getattr(config, "rope_theta", None) if named is None else named
    return None if base is None else float(base)


def rotary_bases(config: Any) -> set[float]:
    """The bases of a model's rotary positions, also where each kind of layer has its own."""
    base = rotary_base(config)
    tables = [table for table in _tables(config) if "rope_theta" in table]
    return {float(table["rope_theta"]) for table in tables} if base is None else {base}


def short_context(config: Any) -> int | None:
    """Up to which length of a pass the rotary positions are those of short texts (longrope); None
    where they do not depend on it."""
    if "longrope" not in rotary_kinds(config):
        return None
    held = getattr(config, "original_max_position_embeddings", None)
    return held or config.rope_parameters.get("original_max_position_embeddings")


def rotary_kinds(config: Any) -> list[str]:
    """The kinds of rotary scaling but for the plain one, also where each kind of layer has its
    own."""
    tables = _tables(config)
    kinds = {str(table.get("rope_type") or table.get("type") or "default") for table in tables}
    return sorted(kinds - {"default"})


def _tables(config: Any) -> list[Mapping[str, Any]]:
    """The settings of rotary positions: of all layers, and of each kind of layer."""
    settings = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    return [settings, *(value for value in settings.values() if isinstance(value, Mapping))]


@torch.no_grad()
def probe(hf: Any, ids: Tensor | None) -> Float[Tensor, "1 seq d_vocab"] | None:
    """The Hugging Face model's logits on a `row`, on the CPU; None for a model too big to be
    asked."""
    return None if ids is None else hf(ids).logits.float().cpu()


def row(hf: Any, tokenizer: Any, context: int) -> Tensor | None:
    """One row of token ids for a probe; None for a model too big to be asked."""
    parameters = sum(weight.numel() for weight in hf.parameters())
    length = min(context, LONGEST, int(BUDGET / parameters))
    if length < min(context, SHORTEST):
        return None
    d_vocab = hf.get_input_embeddings().weight.shape[0]
    ids = _text(tokenizer, length)
    if len(set(ids)) < VARIED * length or max(ids) >= d_vocab:  # words that a toy does not know
        ids = [(i * 7919) % d_vocab for i in range(1, length + 1)]
    return torch.tensor([ids], device=next(hf.parameters()).device)


def _text(tokenizer: Any, length: int) -> list[int]:
    """So many tokens of ordinary text, or all there are."""
    ids: list[int] = []
    for paragraph in python_reference():
        ids += tokenizer(paragraph, add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            break
    return ids[:length]


def distance(theirs: Tensor, ours: Tensor) -> float:
    """||ours - theirs|| / ||theirs - mean||, the mean over the vocabulary."""
    spread = theirs - theirs.mean(-1, keepdim=True)
    return float((ours.float().cpu() - theirs).norm() / spread.norm().clamp_min(1e-12))
