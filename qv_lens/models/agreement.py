"""Whether a hooked model computes what its Hugging Face model computes, asked once, when it is
wrapped.

1. `unread`: settings of a checkpoint's config that TransformerLens's config reader passes over.
   Some of them show only on prompts longer than a probe can be (a rotary scaling for 32,768
   tokens), so they are read from the config.
2. `probe`: logits of one row of tokens spread over the vocabulary, as long as the model's size
   allows; None for a model too big for two passes, for which 1 alone decides.
3. `distance`: how far two such logits lie apart, relative to their spread; `TOLERANCE` by dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

#: parameters x tokens that a probe may cost: 300 tokens of a model of 135 million parameters, about
#: two seconds a pass
BUDGET = 4e10
LONGEST = 512
SHORTEST = 16
#: largest relative distance of two ways to compute the same logits: far above rounding, far below
#: another model
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}


def unread(config: Any, context: int, switches: Sequence[str]) -> list[str]:
    """What HookedTransformer would leave out of this model within `context` tokens, in words; empty
    where it leaves out nothing.
    `switches`: the settings of this architecture's config that it never reads."""
    reasons = [f"{kind} scaling of its rotary positions" for kind in _rotary_kinds(config)]
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding and window is not None and window < context:
        reasons.append(f"a sliding window of {window} tokens")
    reasons += [f"{name} = True" for name in switches if getattr(config, name, False)]
    return reasons


def _rotary_kinds(config: Any) -> list[str]:
    """The kinds of rotary scaling but for the plain one, also where each kind of layer has its
    own."""
    settings = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    tables = [settings, *(value for value in settings.values() if isinstance(value, Mapping))]
    kinds = {str(table.get("rope_type") or table.get("type") or "default") for table in tables}
    return sorted(kinds - {"default"})


@torch.no_grad()
def probe(hf: Any, context: int) -> Float[Tensor, "1 seq d_vocab"] | None:
    """The Hugging Face model's logits on `row`, on the CPU; None for a model too big to be
    asked."""
    ids = row(hf, context)
    return None if ids is None else hf(ids).logits.float().cpu()


def row(hf: Any, context: int) -> Tensor | None:
    """One row of token ids for a probe; None for a model too big to be asked."""
    parameters = sum(weight.numel() for weight in hf.parameters())
    length = min(context, LONGEST, int(BUDGET / parameters))
    if length < min(context, SHORTEST):
        return None
    d_vocab = hf.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, length + 1, device=next(hf.parameters()).device) * 7919 % d_vocab
    return ids[None]


def distance(theirs: Tensor, ours: Tensor) -> float:
    """||ours - theirs|| / ||theirs - mean||, the mean over the vocabulary."""
    spread = theirs - theirs.mean(-1, keepdim=True)
    return float((ours.float().cpu() - theirs).norm() / spread.norm().clamp_min(1e-12))
