"""Query importance (ACE, Eq. 10): which lower neurons activate the value neurons.

1. Take the top K value FFN neurons j of each prompt, with importance I_j and coefficient m_j.
2. A query neuron q of a lower layer writes v_q = m_q fc2_q into the stream that j reads. Its score adds up, over j,
   what v_q does to m_j, weighted by I_j. Three readings:
   `grad`           sum_j (I_j / m_j) v_q . grad m_j(h): first order through the norm and the gate (default),
   `share`          sum_j I_j (v_q . key_j) / (h . key_j), key_j = gain * subkey_j (Yu & Ananiadou 2024); the subkey of a
                    gated FFN is its linearisation s'(z_g) z_u g_j + s(z_g) u_j,
   `inner_product`  sum_j v_q . subkey_j: Eq. 10 literally (a gated FFN's subkey is its gate column).
   All are linear in v_q, so one vector per layer, summed over the layers above, scores every neuron of that layer.
3. h is what the FFN of j reads: the stream after attention, in GPT-J the stream before it.
4. Layers: the same functional on whole outputs A^l and F^l (`query_layers`), the embedding apart (layer -1).
"""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.attribution.value import ranked
from qv_lens.errors import ConfigError, unknown
from qv_lens.interventions import check_ffn, ffn_coefficients
from qv_lens.models.lens import Facts, Lens, at_least_float32
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace

Method = Literal["grad", "share", "inner_product"]
METHODS: tuple[Method, ...] = ("grad", "share", "inner_product")
#: a value neuron whose coefficient, or whose share's denominator, is smaller than this has no defined weight
SMALL = 1e-6


def query_neurons(
    lens: Lens,
    facts: Facts | Trace,
    value: NeuronSet,
    top: int | None = 300,
    *,
    over: Literal["prompt", "set"] = "prompt",
    method: Method = "grad",
    targets: int = 30,
) -> NeuronSet:
    """The `top` query FFN neurons for the `targets` best value neurons of each prompt; `top=None` keeps all.

    `value` is what `value_neurons` gave for the same facts (rows of prompt -1 count for every prompt). `over="set"`
    ranks by the sum over the prompts. Scores are in nats for `grad` and `share`.
    Raises `ConfigError` if a prompt has no value neurons, or for an unknown option.
    """
    if over not in ("prompt", "set"):
        raise unknown("over", over, ("prompt", "set"))
    trace = _trace(lens, facts)
    below = _below(target_keys(lens, trace, value, method, targets))
    m = at_least_float32(trace.m)
    scores = torch.stack([m[layer] * (d @ at_least_float32(lens.w_out(layer)).T) for layer, d in enumerate(below)])
    if over == "set":
        scores, m = scores.sum(1, keepdim=True), m.mean(1, keepdim=True)
    settings = {**_settings(lens, method, targets), "over": over}
    return ranked(scores, m, top, settings, prompt=-1 if over == "set" else None)


def query_layers(
    lens: Lens, facts: Facts | Trace, value: NeuronSet, *, method: Method = "grad", targets: int = 30
) -> pd.DataFrame:
    """Query scores of whole outputs: `prompt, kind ('ffn', 'attn', 'embed'), layer, score`; the embedding is layer -1."""
    trace = _trace(lens, facts)
    own = target_keys(lens, trace, value, method, targets)
    below = _below(own)
    readers = below if lens.backend_adapter.parallel else below + own  # GPT-J's attention cannot feed its own layer's FFN
    rows = []
    for layer in range(lens.n_layers):
        for kind, output, reader in (("ffn", trace.ffn, below), ("attn", trace.attn, readers)):
            scores = (at_least_float32(output[layer]) * reader[layer]).sum(1).tolist()
            rows += [(p, kind, layer, s) for p, s in enumerate(scores)]
    embedding = (at_least_float32(trace.resid[0]) * own.sum(0)).sum(1).tolist()
    rows += [(p, "embed", -1, s) for p, s in enumerate(embedding)]
    frame = pd.DataFrame(rows, columns=["prompt", "kind", "layer", "score"])
    frame.attrs.update(_settings(lens, method, targets))
    return frame


def target_keys(
    lens: Lens, trace: Trace, value: NeuronSet, method: Method, targets: int
) -> Float[Tensor, "layer prompt d_model"]:
    """For each layer, the weighted keys of the target value neurons that lie in it: what a vector in the stream that
    they read is scored by. Raises `ConfigError` for an unknown method or a prompt without value neurons."""
    if method not in METHODS:
        raise unknown("Query method", method, METHODS)
    check_ffn(lens, value)
    return torch.stack([_keys_of_layer(lens, trace, value, layer, method, targets) for layer in range(lens.n_layers)])


def _below(own: Float[Tensor, "layer prompt d_model"]) -> Float[Tensor, "layer prompt d_model"]:
    """For each layer, the sum over all layers above it: what its FFN's output is scored by."""
    return own.flip(0).cumsum(0).flip(0) - own


def _keys_of_layer(
    lens: Lens, trace: Trace, value: NeuronSet, layer: int, method: Method, targets: int
) -> Float[Tensor, "prompt d_model"]:
    """Sum over the targets j in one layer of their weight times their key, per prompt."""
    stream = trace.resid[layer] if lens.backend_adapter.parallel else trace.mid[layer]
    h = at_least_float32(stream)
    out = torch.zeros_like(h)
    for prompt in range(len(trace.prompts)):
        rows = _targets_of(value, prompt, targets)
        chosen = rows[rows["layer"] == layer]
        if len(chosen):
            j = torch.tensor(chosen["neuron"].to_numpy(), device=h.device)
            I = torch.tensor(chosen["score"].to_numpy(), dtype=h.dtype, device=h.device)
            out[prompt] = _key_sum(lens, layer, h[prompt], j, I, at_least_float32(trace.m[layer, prompt, j]), method)
    return out


def _key_sum(lens: Lens, layer: int, h: Tensor, j: Tensor, I: Tensor, m: Tensor, method: Method) -> Float[Tensor, " d"]:
    if method == "inner_product":
        return _subkeys(lens, layer, j).to(h.dtype).sum(1)
    if method == "grad":
        weight = torch.where(m.abs() < SMALL, 0.0, I / m.where(m.abs() >= SMALL, torch.ones_like(m)))
        with torch.enable_grad():
            leaf = h.detach().requires_grad_(True)
            total = (weight * ffn_coefficients(lens, layer, leaf, j)).sum()
        return torch.autograd.grad(total, leaf)[0]
    keys = _linear_keys(lens, layer, h, j)
    reach = h @ keys
    weight = torch.where(reach.abs() < SMALL, 0.0, I / reach.where(reach.abs() >= SMALL, torch.ones_like(reach)))
    return keys @ weight


def _subkeys(lens: Lens, layer: int, j: Tensor) -> Float[Tensor, "d_model target"]:
    gate = lens.backend_adapter.w_gate(layer)
    return (lens.backend_adapter.w_in(layer) if gate is None else gate)[:, j]


def _linear_keys(lens: Lens, layer: int, h: Tensor, j: Tensor) -> Float[Tensor, "d_model target"]:
    """gain * subkey; for a gated FFN the subkey of its linearisation at h, norm frozen."""
    backend = lens.backend_adapter
    norm, up = backend.norm(layer), backend.w_in(layer)[:, j].to(h.dtype)
    gate = backend.w_gate(layer)
    if gate is None:
        return norm.gain.to(h.dtype)[:, None] * up
    n, g = norm(h), gate[:, j].to(h.dtype)
    with torch.enable_grad():
        z = (n @ g).detach().requires_grad_(True)
        s = backend.activation(z)
    slope = torch.autograd.grad(s.sum(), z)[0]
    return norm.gain.to(h.dtype)[:, None] * (slope * (n @ up) * g + s.detach() * up)


def _targets_of(value: NeuronSet, prompt: int, targets: int) -> pd.DataFrame:
    rows = value.frame[value.frame["prompt"].isin((prompt, -1))]
    if rows.empty:
        raise ConfigError(f"The value neurons hold no row for prompt {prompt}: compute them for the same facts.")
    return rows.nlargest(targets, "score")


def _trace(lens: Lens, facts: Facts | Trace) -> Trace:
    return facts if isinstance(facts, Trace) else lens.trace(facts)


def _settings(lens: Lens, method: str, targets: int) -> dict[str, Any]:
    return {"model": lens.name, "backend": lens.backend, "method": method, "targets": targets}
