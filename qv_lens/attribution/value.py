"""Value importance (ACE, Eq. 9): how much one component raises the log-probability of the answer.

    I(v) = log p(w | x + v) - log p(w | x)

1. Trace the prompts; take a base x in each layer: `mid` (h + A, the stream after attention; default), `pre` (h), or
   `loo_final` (the final vector with the component taken away: log p(h^L) - log p(h^L - v)).
2. FFN neuron k is v_k = m_k fc2_k; attention channel k is z_k times the k-th row of W_O, always on base `pre`.
3. In closed form (no pass per neuron): with G = centre(V) (U * gain) computed once for all prompts,
   logits of x + v_k are (b + m_k G_k) / sigma_k + c, and I = delta_t - log sum_j p_j exp(delta_j) with
   delta = logits(x + v_k) - logits(x), p = softmax(logits(x)). Neurons are taken in tiles: nothing of the size
   prompts x neurons x vocabulary is held.
4. Layers: `neuron_sum` adds up I over a layer's units (Table 1), `layer_vector` is I of the whole output (Figure 5),
   which telescopes over the layers when x is `mid` for FFN and `pre` for attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from qv_lens.attribution.projection import NormMode, Readout
from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.spans import FactToken
from qv_lens.models.lens import Facts, Lens, at_least_float32
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace

Base = Literal["mid", "pre", "loo_final"]
BASES: tuple[Base, ...] = ("mid", "pre", "loo_final")
Kind = Literal["ffn", "attn", "head"]
How = Literal["neuron_sum", "neuron_sum_positive", "layer_vector", "count"]
HOWS: tuple[How, ...] = ("neuron_sum", "neuron_sum_positive", "layer_vector", "count")
#: entries of the largest intermediate, [tile, vocabulary]
TILE_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Setting:
    """One attribution problem: what was traced, what is asked for, and how it is read out."""

    lens: Lens
    trace: Trace
    target: Int[Tensor, " prompt"]
    readout: Readout
    base: Base

    @property
    def attrs(self) -> dict[str, Any]:
        """What every frame and set of this problem is labelled with."""
        import transformer_lens

        versions = {"torch": torch.__version__, "transformer_lens": getattr(transformer_lens, "__version__", "")}
        return {
            "model": self.lens.name, "fingerprint": self.lens.fingerprint if not self.lens.patches else "patched",
            "backend": self.lens.backend, "norm": self.readout.mode, "base": self.base, "versions": versions,
            "targets": [self.lens.token_label(int(t)) for t in self.target],
            "target_is_argmax": (self.trace.logits.argmax(-1) == self.target).tolist(),
        }  # fmt: skip

    def x(self, layer: int, kind: Kind = "ffn") -> Float[Tensor, "prompt d_model"]:
        """The base vector of a layer. Attention's is always the stream before it."""
        if self.base == "loo_final":
            return at_least_float32(self.trace.final)
        pre = at_least_float32(self.trace.resid[layer])
        return pre + at_least_float32(self.trace.attn[layer]) if kind == "ffn" and self.base == "mid" else pre

    def increase_of_vectors(self, layer: int, kind: Kind, v: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " prompt"]:
        """I of one vector per prompt."""
        x, v = self.x(layer, kind), at_least_float32(v)
        low, high = (x - v, x) if self.base == "loo_final" else (x, x + v)
        return self.readout.log_prob(high, self.target) - self.readout.log_prob(low, self.target)

    def increase_of_units(
        self, layer: int, kind: Kind, m: Float[Tensor, "prompt unit"], rows: Float[Tensor, "unit d_model"]
    ) -> Float[Tensor, "prompt unit"]:
        """I of every v_k = m_k rows_k: step 3 of the module's algorithm."""
        x, m = self.x(layer, kind), at_least_float32(m)
        sign = -1.0 if self.base == "loo_final" else 1.0  # I = -(log p(x - v) - log p(x))
        log_p = self.readout.logits(x).log_softmax(-1)
        tile = max(1, TILE_ENTRIES // log_p.shape[1])
        parts = [
            sign * self._tile(x, log_p, sign * m[:, i : i + tile], at_least_float32(rows[i : i + tile]))
            for i in range(0, rows.shape[0], tile)
        ]
        return torch.cat(parts, dim=1)

    def _tile(self, x: Tensor, log_p: Tensor, m: Tensor, rows: Tensor) -> Float[Tensor, "prompt unit"]:
        out = self.readout
        v, x_c, sigma_0 = out.centre(rows), out.centre(x), out.scale(x)
        G = v @ out.U
        scores = torch.empty_like(m)
        for i in range(len(x)):
            if out.mode == "full":
                square = x_c[i].square().mean() + 2 * m[i] * (v @ x_c[i]) / v.shape[1] + m[i].square() * v.square().mean(1)
                sigma = (square + out.norm.eps).sqrt()
                b = x_c[i] @ out.U
                delta = G * (m[i] / sigma)[:, None] + b * (1 / sigma - 1 / sigma_0[i])[:, None]
            else:
                delta = G * (m[i] / sigma_0[i])[:, None]
            wanted = delta[:, self.target[i]].clone()
            scores[i] = wanted - torch.logsumexp(delta.add_(log_p[i]), dim=1)
        return scores


def setting(
    lens: Lens, facts: Facts | Trace, *, norm: NormMode = "frozen", base: Base = "mid", target: str | int = "answer",
    positions: FactToken = "last",
) -> Setting:  # fmt: skip
    """Trace the facts and fix what is asked for.

    `target`: 'answer' (first answer token; a bare prompt has none and takes the model's own), 'predicted' (the
    model's own most likely token), or a token id.
    """
    if base not in BASES:
        raise unknown("Base", base, BASES)
    trace = facts if isinstance(facts, Trace) else lens.trace(facts, positions)
    predicted = trace.logits.argmax(-1)
    if isinstance(target, int):
        if not 0 <= target < trace.logits.shape[1]:
            raise ConfigError(f"Token id {target} is outside the vocabulary of {trace.logits.shape[1]}.")
        wanted = torch.full_like(predicted, target)
    elif target == "predicted":
        wanted = predicted
    elif target == "answer":
        wanted = predicted.clone()
        for i, prompt in enumerate(trace.prompts):
            if prompt.answer:
                wanted[i] = prompt.answer[0]
    else:
        raise unknown("Target", target, ("answer", "predicted", "a token id"))
    return Setting(lens, trace, wanted, Readout.of(lens, trace, norm), base)


@torch.no_grad()
def value_neurons(
    lens: Lens,
    facts: Facts | Trace,
    top: int | None = 300,
    *,
    over: Literal["prompt", "set"] = "prompt",
    norm: NormMode = "frozen",
    base: Base = "mid",
    target: str | int = "answer",
    positions: FactToken = "last",
) -> NeuronSet:
    """The `top` FFN neurons by I (Eq. 9), of each prompt or summed `over` the set; `top=None` keeps all.

    Scores are in nats. `coefficient` is m_k (its mean over the prompts where `over="set"`).
    Raises `FactError` for prompts or answers that do not tokenise, `ConfigError` for unknown options.
    """
    if over not in ("prompt", "set"):
        raise unknown("over", over, ("prompt", "set"))
    task = setting(lens, facts, norm=norm, base=base, target=target, positions=positions)
    scores = torch.stack(list(ffn_scores(task)))
    m = at_least_float32(task.trace.m)
    if over == "set":
        scores, m = scores.sum(1, keepdim=True), m.mean(1, keepdim=True)
    settings = {**task.attrs, "over": over, "method": "exact"}
    return ranked(scores, m, top, settings, prompt=-1 if over == "set" else None)


def ffn_scores(task: Setting) -> Iterator[Float[Tensor, "prompt d_mlp"]]:
    """I of every FFN neuron, layer by layer."""
    for layer in tqdm(range(task.lens.n_layers), desc="value neurons", unit="layer", delay=2, leave=False):
        yield task.increase_of_units(layer, "ffn", task.trace.m[layer], task.lens.w_out(layer))


def ranked(
    scores: Float[Tensor, "layer prompt unit"],
    m: Float[Tensor, "layer prompt unit"],
    top: int | None,
    settings: dict[str, Any],
    prompt: int | None = None,
) -> NeuronSet:
    """The highest-scored FFN neurons of each prompt as a NeuronSet; `prompt` overrides the prompt's index."""
    width, rows = scores.shape[2], []
    flat, coefficients = rearrange(scores, "l p n -> p (l n)"), rearrange(m, "l p n -> p (l n)")
    k = flat.shape[1] if top is None else min(top, flat.shape[1])
    values, index = flat.sort(dim=1, descending=True, stable=True)
    for i in range(len(flat)):
        chosen = index[i, :k]
        rows.append(
            pd.DataFrame(
                {
                    "prompt": i if prompt is None else prompt,
                    "unit": "ffn",
                    "layer": (chosen // width).cpu().numpy(),
                    "neuron": (chosen % width).cpu().numpy(),
                    "coefficient": coefficients[i, chosen].cpu().numpy(),
                    "score": values[i, :k].cpu().numpy(),
                }  # fmt: skip
            )
        )
    return NeuronSet(pd.concat(rows, ignore_index=True), settings)


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
