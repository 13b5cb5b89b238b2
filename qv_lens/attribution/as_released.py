"""The preset `ace_official`: what ACE's released notebooks compute, bugs included, for comparison
only.

Common to all parts: norm frozen with ln_f.bias left out, base mid, target the model's own argmax,
last position, float32; value layers by whole outputs; counts of the top 300; 30 targets for
queries. What follows is as released; it is neither the paper's reading nor our default:

1. GPT-J: heads and attention neurons from out_proj.weight cut into heads without transposing it
   (outputs, not heads).
2. GPT-J: query FFN neurons for the 30 best such attention neurons, at their position p, by shares
   whose key is a column of k_proj (where the value projection's row is meant) times the gain of
   ln_1. No query layers.
3. Qwen3: query layers for the 30 best value FFN neurons, by shares whose key is a column of
   down_proj (a value vector where the subkey is meant) times the gain of post_attention_layernorm.
   No query neurons.
4. Neurons' tokens from raw columns, whatever the coefficient's sign, the unembedding's bias added.

Source: yjywdzh/ACE c1a425b, read; nothing of it is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from einops import einsum, rearrange
from torch import Tensor

from qv_lens.attribution.layers import scores_by_layer
from qv_lens.attribution.projection import projected, token_labels, written
from qv_lens.attribution.query import layers_of, queries_of
from qv_lens.attribution.ranking import ranked
from qv_lens.attribution.readers import QueryOptions, targets_of
from qv_lens.attribution.setting import Setting
from qv_lens.attribution.units import values_by_head
from qv_lens.attribution.value import best_units
from qv_lens.errors import ConfigError
from qv_lens.models.lens import Facts, Lens, check_lens
from qv_lens.models.norms import at_least_float32
from qv_lens.neurons import NeuronSet

COUNTED, TARGETS, SHOWN = 300, 30, 10
NOTEBOOKS = ("GPTJForCausalLM", "Qwen3ForCausalLM")
LABEL = "ace_official, as released"
ASKED = QueryOptions("share", TARGETS)


@dataclass(frozen=True)
class ReleasedResults:
    """The notebooks' results. `query_neurons` exist for GPT-J alone, `query_layers` for Qwen3
    alone."""

    value_layers: pd.DataFrame
    """Whole layers by Eq. 9."""
    counts: pd.DataFrame
    """How many of the 300 best neurons lie in each layer."""
    value_neurons: NeuronSet
    """The 300 best neurons."""
    tokens: pd.DataFrame
    """What the ten best promote."""
    heads: pd.DataFrame
    """Attention heads."""
    query_neurons: NeuronSet | None
    """GPT-J alone."""
    query_layers: pd.DataFrame | None
    """Qwen3 alone."""


@torch.no_grad()
def ace_official(lens: Lens, facts: Facts) -> ReleasedResults:
    """Everything the released notebooks compute, for several prompts at once, labelled 'as
    released'.

    Raises `ConfigError` for a model that is neither GPT-J nor Qwen3: there are no other notebooks.
    """
    check_lens(lens)
    record = lens.backend_adapter.record
    if record is None or record.model not in NOTEBOOKS:
        raise ConfigError(
            f"ACE's released notebooks are for GPT-J and Qwen3, and {lens.name} is neither: use "
            "qv.value_neurons and qv.query_neurons."
        )
    trace = lens.trace(facts, attention=True)
    task = Setting(lens, trace, trace.logits.argmax(-1), final_bias=False)
    value = best_units(task, COUNTED)
    gptj = record.model == NOTEBOOKS[0]
    layers = [scores_by_layer(task, kind, "layer_vector") for kind in ("ffn", "attn")]
    heads = _heads(task) if gptj else scores_by_layer(task, "head", "layer_vector")
    return ReleasedResults(
        _labelled(pd.concat(layers, ignore_index=True), task),
        _labelled(scores_by_layer(task, "ffn", "count", count_top=COUNTED), task),
        NeuronSet(value.frame, {**value.settings, "preset": LABEL}),
        _labelled(_tokens(lens, value.top(SHOWN)), task),
        _labelled(heads, task),
        _query_neurons(task) if gptj else None,
        None if gptj else _labelled(_query_layers(task, value), task),
    )


def _labelled(frame: pd.DataFrame, task: Setting) -> pd.DataFrame:
    frame.attrs.update({**task.attrs, "preset": LABEL})
    return frame


def _untransposed(task: Setting, layer: int) -> Tensor:
    """out_proj.weight taken as if its rows were W_O's channels."""
    return at_least_float32(task.lens.backend_adapter.w_o(layer)).T


def _heads(task: Setting) -> pd.DataFrame:
    heads, rows = task.lens.backend_adapter.cfg.n_heads, []
    for layer in range(task.lens.n_layers):
        z = rearrange(at_least_float32(task.trace.z[layer]), "r (h c) -> r h c", h=heads)
        w = rearrange(_untransposed(task, layer), "(h c) d -> h c d", h=heads)
        scores = task.increase_of_many(
            layer, "head", einsum(z, w, "r h c, h c d -> r h d")
        ).tolist()
        rows += [
            (p, "head", layer, h, s) for p, row in enumerate(scores) for h, s in enumerate(row)
        ]
    return pd.DataFrame(rows, columns=["prompt", "kind", "layer", "head", "score"])


def _query_neurons(task: Setting) -> NeuronSet:
    lens, trace = task.lens, task.trace
    scores, m = [], []
    for layer in range(lens.n_layers):
        z = rearrange(values_by_head(lens, trace, layer)[1], "r h c k -> r k (h c)")
        of = torch.arange(len(z), device=z.device).repeat_interleave(z.shape[1])
        increases, _ = task.increase_of_units(
            layer, "attn", rearrange(z, "r k u -> (r k) u"), _untransposed(task, layer), of
        )
        scores.append(rearrange(increases, "(r k) u -> r (k u)", r=len(z)))
        m.append(rearrange(z, "r k u -> r (k u)"))
    value = ranked(
        task.grouping,
        "attn_neuron",
        torch.stack(scores),
        torch.stack(m),
        TARGETS,
        {},
        last=trace.positions.tolist(),
    )
    reader = targets_of(
        lens,
        list(trace.facts),
        value,
        ASKED,
        key_of=lambda layer, j: lens.backend_adapter.w_qkv(layer, "K")[j],
    )
    return queries_of(
        lens,
        reader,
        "ffn",
        COUNTED,
        "prompt",
        {**task.attrs, "preset": LABEL, "method": "share", "targets": TARGETS},
    )


def _query_layers(task: Setting, value: NeuronSet) -> pd.DataFrame:
    reader = targets_of(
        task.lens,
        task.trace,
        value,
        ASKED,
        key_of=lambda layer, j: task.lens.w_out(layer)[j],
    )
    return layers_of(task.lens, reader)


def _tokens(lens: Lens, neurons: NeuronSet) -> pd.DataFrame:
    high, low = projected(lens, written(lens, neurons), SHOWN, True, torch.ones(len(neurons), 1))
    return neurons.to_frame().assign(top=token_labels(lens, high), bottom=token_labels(lens, low))
