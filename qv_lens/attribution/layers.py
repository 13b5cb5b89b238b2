"""Layers and heads by importance: Eq. 9 summed, or of whole outputs.

neuron_sum            sum of I over a layer's FFN neurons, or over attention's channels (Eq. 9's right half; Table 1)
neuron_sum_positive   its positive terms
layer_vector          I of the whole output (Figures 5 and 6); telescopes over the layers with base `mid` for the FFN
                      and `pre` for attention
count                 how many of the model's best FFN neurons lie in the layer (Figure 3)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from qv_lens.attribution.projection import NormMode
from qv_lens.attribution.value import Base, Kind, Setting, ffn_scores, ranked, setting
from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.spans import FactToken
from qv_lens.models.lens import Facts, Lens, at_least_float32
from qv_lens.trace import Trace

How = Literal["neuron_sum", "neuron_sum_positive", "layer_vector", "count"]
HOWS: tuple[How, ...] = ("neuron_sum", "neuron_sum_positive", "layer_vector", "count")


@torch.no_grad()
def layer_scores(
    lens: Lens,
    facts: Facts | Trace,
    kind: Kind = "ffn",
    how: How = "neuron_sum",
    *,
    norm: NormMode = "frozen",
    base: Base = "mid",
    target: str | int = "answer",
    positions: FactToken = "last",
    count_top: int = 300,
) -> pd.DataFrame:
    """Scores of layers (or heads), one row per prompt and layer: `prompt, kind, layer, score` (and `head`), in nats.

    `neuron_sum` (Eq. 9 summed; Table 1), `neuron_sum_positive` (its positive terms), `layer_vector` (Figure 5; the
    only one for heads, Figure 6), `count` (how many of the model's `count_top` best FFN neurons lie there; Figure 3).
    """
    if how not in HOWS:
        raise unknown("how", how, HOWS)
    if kind not in ("ffn", "attn", "head"):
        raise unknown("kind", kind, ("ffn", "attn", "head"))
    task = setting(lens, facts, norm=norm, base=base, target=target, positions=positions)
    if kind == "head":
        if how != "layer_vector":
            raise ConfigError(f"Heads are scored as whole vectors: kind='head' needs how='layer_vector', not {how!r}.")
        return _head_frame(task)
    if how == "layer_vector":
        outputs = task.trace.ffn if kind == "ffn" else task.trace.attn
        scores = torch.stack([task.increase_of_vectors(layer, kind, v) for layer, v in enumerate(outputs)])
    elif how == "count":
        if kind != "ffn":
            raise ConfigError("how='count' counts FFN neurons: use it with kind='ffn'.")
        return _counts(task, count_top)
    else:
        units = ffn_scores(task) if kind == "ffn" else _channel_scores(task)
        scores = torch.stack([(I if how == "neuron_sum" else I.clamp_min(0)).sum(1) for I in units])
    return _layer_frame(task, kind, how, scores)


def _channel_scores(task: Setting) -> Iterator[Tensor]:
    for layer in range(task.lens.n_layers):
        yield task.increase_of_units(layer, "attn", task.trace.z[layer], task.lens.backend_adapter.w_o(layer))


def _layer_frame(task: Setting, kind: str, how: str, scores: Float[Tensor, "layer prompt"]) -> pd.DataFrame:
    layers, prompts = scores.shape
    frame = pd.DataFrame(
        {
            "prompt": [p for p in range(prompts) for _ in range(layers)],
            "kind": kind,
            "layer": list(range(layers)) * prompts,
            "score": scores.T.flatten().cpu().numpy(),
        }  # fmt: skip
    )
    frame.attrs.update({**task.attrs, "how": how, "kind": kind})
    return frame


def _counts(task: Setting, top: int) -> pd.DataFrame:
    best = ranked(torch.stack(list(ffn_scores(task))), at_least_float32(task.trace.m), top, {}).frame
    counts = torch.zeros(task.lens.n_layers, len(task.trace.prompts))
    for (prompt, layer), rows in best.groupby(["prompt", "layer"]):
        counts[int(layer), int(prompt)] = len(rows)
    return _layer_frame(task, "ffn", "count", counts)


def _head_frame(task: Setting) -> pd.DataFrame:
    heads, rows = task.lens.backend_adapter.cfg.n_heads, []
    for layer in range(task.lens.n_layers):
        z = rearrange(at_least_float32(task.trace.z[layer]), "p (h c) -> p h c", h=heads)
        w_o = rearrange(at_least_float32(task.lens.backend_adapter.w_o(layer)), "(h c) d -> h c d", h=heads)
        for head, v in enumerate(einsum(z, w_o, "p h c, h c d -> h p d")):
            scores = task.increase_of_vectors(layer, "head", v).tolist()
            rows += [(p, "head", layer, head, score) for p, score in enumerate(scores)]
    frame = pd.DataFrame(rows, columns=["prompt", "kind", "layer", "head", "score"])
    frame.attrs.update({**task.attrs, "how": "layer_vector", "kind": "head"})
    return frame
