"""Value importance (ACE, Eq. 9): how much one component raises the log-probability of the answer.

    I(v) = log p(w | x + v) - log p(w | x)

1. Trace the prompts; take a base x in each layer: `mid` (h + A, the stream after attention; default), `pre` (h), or
   `loo_final` (the final vector with the component taken away: log p(h^L) - log p(h^L - v)).
2. FFN neuron k is v_k = m_k fc2_k; attention channel k is z_k times the k-th row of W_O, always on base `pre`.
3. In closed form (no pass per neuron): with G = centre(V) (U * gain) computed once for all prompts,
   logits of x + v_k are (b + m_k G_k) / sigma_k + c, and I = delta_t - log sum_j p_j exp(delta_j) with
   delta = logits(x + v_k) - logits(x), p = softmax(logits(x)). Neurons are taken in tiles: nothing of the size
   prompts x neurons x vocabulary is held.
4. `topk` finds the same k best neurons from far fewer exact scores: by Jensen's inequality I <= J = delta_t - E_p[delta].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from einops import rearrange
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
Method = Literal["exact", "topk", "first_order"]
METHODS: tuple[Method, ...] = ("exact", "topk", "first_order")
#: what a bound must fall short by before it ends the search: covers rounding in float32
SLACK = 1e-5
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
                sigma = self._sigma(x_c[i], m[i], v)
                b = x_c[i] @ out.U
                delta = G * (m[i] / sigma)[:, None] + b * (1 / sigma - 1 / sigma_0[i])[:, None]
            else:
                delta = G * (m[i] / sigma_0[i])[:, None]
            wanted = delta[:, self.target[i]].clone()
            scores[i] = wanted - torch.logsumexp(delta.add_(log_p[i]), dim=1)
        return scores

    def _sigma(self, x_c: Float[Tensor, " d_model"], m: Float[Tensor, " unit"], v: Float[Tensor, "unit d_model"]) -> Tensor:
        """sigma of x + m_k v_k for every unit, without forming the sums."""
        square = x_c.square().mean() + 2 * m * (v @ x_c) / v.shape[1] + m.square() * v.square().mean(1)
        return (square + self.readout.norm.eps).sqrt()

    def bound_of_units(
        self, layer: int, m: Float[Tensor, "prompt unit"], rows: Float[Tensor, "unit d_model"]
    ) -> Float[Tensor, "prompt unit"]:
        """J = delta_t - E_p[delta] >= I for every FFN unit (Jensen), from two matrix-vector products per prompt.

        In `frozen` mode J is the gradient of I times the vector. Raises `ConfigError` for base `loo_final`, whose sign
        turns the bound round.
        """
        if self.base == "loo_final":
            raise ConfigError("The bound J holds for base 'mid' and 'pre'; base 'loo_final' needs method='exact'.")
        out, x, m, rows = self.readout, self.x(layer), at_least_float32(m), at_least_float32(rows)
        p = out.logits(x).softmax(-1)
        v, x_c, sigma_0 = out.centre(rows), out.centre(x), out.scale(x)
        reach = (out.U[:, self.target].T - p @ out.U.T) @ v.T
        if out.mode != "full":
            return m * reach / sigma_0
        b = x_c @ out.U
        pull = b.gather(1, self.target[:, None]) - (p * b).sum(1, keepdim=True)
        sigma = torch.stack([self._sigma(x_c[i], m[i], v) for i in range(len(x))])
        return m / sigma * reach + (1 / sigma - 1 / sigma_0) * pull

    def only(self, prompts: list[int]) -> Setting:
        """The same problem for some of its prompts."""
        t = self.trace
        some = replace(
            t, facts=tuple(t.facts[i] for i in prompts), prompts=tuple(t.prompts[i] for i in prompts),
            positions=t.positions[prompts], m=t.m[:, prompts], z=t.z[:, prompts], attn=t.attn[:, prompts],
            ffn=t.ffn[:, prompts], resid=t.resid[:, prompts], logits=t.logits[prompts],
        )  # fmt: skip
        return replace(
            self, trace=some, target=self.target[prompts], readout=replace(self.readout, sigma=self.readout.sigma[prompts])
        )


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
    method: Method = "exact",
    target: str | int = "answer",
    positions: FactToken = "last",
) -> NeuronSet:
    """The `top` FFN neurons by I (Eq. 9), of each prompt or summed `over` the set; `top=None` keeps all.

    `method`: 'exact' scores every neuron; 'topk' scores, exactly, only as many as a certificate needs
    (`certified_top`; the same result); 'first_order' gives the upper bound J instead of I: a ranking, not the score.
    Scores are in nats. `coefficient` is m_k (its mean over the prompts where `over="set"`).
    Raises `FactError` for prompts or answers that do not tokenise, `ConfigError` for unknown options, or for base
    'loo_final' or `top=None` where the method does not allow them.
    """
    if over not in ("prompt", "set"):
        raise unknown("over", over, ("prompt", "set"))
    if method not in METHODS:
        raise unknown("Value method", method, METHODS)
    task = setting(lens, facts, norm=norm, base=base, target=target, positions=positions)
    m = at_least_float32(task.trace.m)
    settings = {**task.attrs, "over": over, "method": method}
    if method == "topk":
        if top is None:
            raise ConfigError("method='topk' finds the best k: give top=, or use method='exact' for all neurons.")
        scores, scored = certified_top(task, top, over)
        settings["scored"] = scored
    else:
        scores = torch.stack(list(ffn_scores(task) if method == "exact" else ffn_bounds(task)))
        scores = scores.sum(1, keepdim=True) if over == "set" else scores
    if over == "set":
        m = m.mean(1, keepdim=True)
    return ranked(scores, m, top, settings, prompt=-1 if over == "set" else None)


def certified_top(
    task: Setting, k: int, over: Literal["prompt", "set"]
) -> tuple[Float[Tensor, "layer prompt_or_set unit"], list[int]]:
    """Exact scores of the k best neurons of each prompt (or of the set), -inf for all others, and how many were scored.

    1. J >= I for every neuron, summed over the prompts for a set.
    2. Neurons are scored exactly in order of decreasing J, until no J left reaches the k-th best exact score.
    """
    bounds = torch.stack(list(ffn_bounds(task)))
    bounds = bounds.sum(1, keepdim=True) if over == "set" else bounds
    scores, scored = torch.full_like(bounds, -torch.inf), []
    every = list(range(len(task.trace.prompts)))
    for column in range(bounds.shape[1]):
        part = task.only(every if over == "set" else [column])
        order = bounds[:, column].flatten().argsort(descending=True)
        J, done = bounds[:, column].flatten()[order], 0
        found = torch.full_like(J, -torch.inf)
        while done < len(order):
            chunk = order[done : done + max(k, 32)]
            found[chunk] = _exact_of(part, chunk)
            done += len(chunk)
            kth = found.topk(min(k, len(found))).values[-1]
            if done < len(order) and J[done] + SLACK * max(1.0, float(J[done].abs())) < kth:
                break
        scores[:, column] = found.view(bounds.shape[0], -1)
        scored.append(done)
    return scores, scored


def _exact_of(task: Setting, flat: Int[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """I of some neurons, given by their index over all layers, summed over the prompts of the task."""
    width, out = task.lens.d_mlp, torch.empty(len(flat), dtype=task.readout.U.dtype, device=flat.device)
    for layer in (flat // width).unique().tolist():
        here = flat // width == layer
        neurons = flat[here] % width
        I = task.increase_of_units(layer, "ffn", task.trace.m[layer][:, neurons], task.lens.w_out(layer)[neurons])
        out[here] = I.sum(0)
    return out


def ffn_bounds(task: Setting) -> Iterator[Float[Tensor, "prompt d_mlp"]]:
    """J of every FFN neuron, layer by layer."""
    for layer in range(task.lens.n_layers):
        yield task.bound_of_units(layer, task.trace.m[layer], task.lens.w_out(layer))


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
