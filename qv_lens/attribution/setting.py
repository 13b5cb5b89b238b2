"""Setting: one attribution problem - what was traced, what is asked for, how it is read out - and
Eq. 9 on it.

    I(v) = log p(w | x + v) - log p(w | x)

1. Base x of a layer: `mid` (h + A, the stream after attention; default), `pre` (h), or `loo_final`
   (the final vector with the component taken away: log p(h^L) - log p(h^L - v)). Attention's base
   is always h.
2. Target w: `wanted`. Of one token against another I = delta_1 - delta_2, closed form, the log-sum
   cancels. The answer's tokens (teacher forced, a row each) are added up: `grouping`.
3. Numerics: `log_sums`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qv_lens.attribution.grouping import Grouping
from qv_lens.attribution.log_sums import Problems, bounds, log_sums, tile_rows
from qv_lens.attribution.moments import HeadAndTail, log_sums_by_moments
from qv_lens.attribution.projection import NORM_MODES, NormMode, Readout
from qv_lens.attribution.wanted import Target, Wanted, wanted_at, where_read
from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.spans import Positions
from qv_lens.models.lens import Facts, Lens
from qv_lens.models.norms import at_least_float32
from qv_lens.trace import Trace

Base = Literal["mid", "pre", "loo_final"]
BASES: tuple[Base, ...] = ("mid", "pre", "loo_final")
Kind = Literal["ffn", "attn", "head"]
Method = Literal["exact", "topk", "moments", "first_order"]
METHODS: tuple[Method, ...] = ("exact", "topk", "moments", "first_order")
#: neurons whose weights are upcast at a time
CHUNK = 2048
#: how far the divisor of a base may shrink, norm recomputed, before the closed form is left
CANCELS = 30.0
#: rows of layers that are read out in one product
READ_TOGETHER = 32


@dataclass(frozen=True)
class Bases:
    """What the vectors of one layer are added to, read out."""

    log_p: Float[Tensor, "row d_vocab"]
    """The distribution at every row."""
    mean: Float[Tensor, "row d_model"] | None = None
    """E_p[u], where bounds are asked."""


@dataclass(frozen=True)
class Setting:
    """One attribution problem. `token` is what is asked for at each row of the trace, `against`
    what it is compared to."""

    lens: Lens
    """The model."""
    trace: Trace
    """Its captured pass."""
    token: Int[Tensor, " row"]
    """The token asked for at each row."""
    norm: NormMode = "frozen"
    """How the final norm is taken."""
    base: Base = "mid"
    """What a vector is added to."""
    against: Int[Tensor, " row"] | None = None
    """The other token of a contrast."""
    sequence: bool = False
    """Whether a whole answer is asked for."""
    memory_budget: int | None = None
    """Bytes for the largest intermediate (None: half of what is free)."""
    final_bias: bool = True
    """Whether the final norm's bias counts (the released codes leave it out)."""

    @cached_property
    def readout(self) -> Readout:
        """How the stream is read out. Raises what `Lens.check_read_out` raises."""
        self.lens.check_read_out()
        return Readout.of(self.lens, self.trace, self.norm, self.final_bias)

    @property
    def wanted(self) -> Wanted:
        """What is asked for."""
        return Wanted(self.lens, self.trace, self.token, self.against, self.sequence)

    @property
    def grouping(self) -> Grouping:
        """How scores are added up and named."""
        return Grouping(self.lens, self.trace, self.sequence)

    @property
    def attrs(self) -> dict[str, Any]:
        """What every frame and set of this problem is labelled with."""
        attrs = self.wanted.attrs(self.trace.logits.argmax(-1))
        return {**attrs, "norm": self.norm, "base": self.base}

    def x(self, layer: int, kind: Kind = "ffn") -> Float[Tensor, "row d_model"]:
        """The base vector of a layer. Attention's is always the stream before it."""
        if self.base == "loo_final":
            return at_least_float32(self.trace.final)
        pre = at_least_float32(self.trace.resid[layer])
        return (
            pre + at_least_float32(self.trace.attn[layer])
            if kind == "ffn" and self.base == "mid"
            else pre
        )

    def bases(self, kind: Kind = "ffn", mean: bool = False) -> Iterator[Bases]:
        """The bases of every layer in turn, a few layers read out together: one product with the
        unembedding costs hardly more than one row of it."""
        layers = list(range(self.lens.n_layers))
        rows = len(self.trace.prompt)
        together = max(1, READ_TOGETHER // rows)
        for begin in range(0, len(layers), together):
            some = layers[begin : begin + together]
            x = torch.cat([self.x(layer, kind) for layer in some])
            of = torch.arange(rows, device=x.device).repeat(len(some))
            log_p = self.readout.logits(x, of).log_softmax(-1)
            means = log_p.exp() @ self.readout.U.T if mean else None
            for place in range(len(some)):
                part = slice(place * rows, (place + 1) * rows)
                yield Bases(log_p[part], None if means is None else means[part])

    def gain(
        self, y: Float[Tensor, "row d_model"], rows: Tensor | slice = slice(None)
    ) -> Float[Tensor, " row"]:
        """log p(token | y), or the difference of two tokens' logits."""
        logits = self.readout.logits(y, rows)
        wanted = logits.gather(-1, self.token[rows][:, None])[:, 0]
        if self.against is not None:
            return wanted - logits.gather(-1, self.against[rows][:, None])[:, 0]
        return wanted - logits.logsumexp(-1)

    @property
    def sign(self) -> float:
        """-1 where a vector is taken away from the base (`loo_final`)."""
        return -1.0 if self.base == "loo_final" else 1.0

    def importance(
        self,
        x: Float[Tensor, "row d_model"],
        v: Float[Tensor, "row d_model"],
        rows: Tensor | slice = slice(None),
    ) -> Float[Tensor, " row"]:
        """Eq. 9 (ACE): I(v) = log p(w | x + v) - log p(w | x), by `loo_final`
        -(log p(w | x - v) - log p(w | x))."""
        return self.sign * (self.gain(x + self.sign * v, rows) - self.gain(x, rows))

    def increase_of_vectors(
        self, layer: int, kind: Kind, v: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, " row"]:
        """I of one vector per row."""
        return self.importance(self.x(layer, kind), at_least_float32(v))

    def increase_of_many(
        self, layer: int, kind: Kind, v: Float[Tensor, "row n d_model"]
    ) -> Float[Tensor, "row n"]:
        """I of several vectors per row, row by row: nothing larger than one row's logits is held,
        and log p(w | x) is read once."""
        x, out = self.x(layer, kind), []
        tile = tile_rows(self.readout.U, self.memory_budget)
        for row in range(len(v)):
            start, rows = x[row : row + 1], torch.full((len(v[row]),), row, device=v.device)
            parts = [
                self.gain(
                    start + self.sign * at_least_float32(v[row, i : i + tile]), rows[i : i + tile]
                )
                for i in range(0, len(rows), tile)
            ]
            out.append(self.sign * (torch.cat(parts) - self.gain(start, rows[:1])))
        return torch.stack(out)

    def increase_of_units(
        self,
        layer: int,
        kind: Kind,
        m: Float[Tensor, "problem unit"],
        vectors: Float[Tensor, "unit d_model"],
        of: Int[Tensor, " problem"] | None = None,
        method: Method = "exact",
        wanted: Bool[Tensor, "problem unit"] | None = None,
        bases: Bases | None = None,
    ) -> tuple[Float[Tensor, "problem unit"], int]:
        """I of every v_k = m_k vectors_k (J for `first_order`), and how many `moments` had to do
        exactly.

        `of` says which row a problem belongs to (all rows in order by default). Entries that are
        not `wanted` do not hold I. `bases`: the layer's, where they were read out already.
        Raises `ConfigError` for a bound with base `loo_final`, whose sign turns it round.
        """
        if method == "first_order" and self.base == "loo_final":
            raise ConfigError(
                "The bound J holds for base 'mid' and 'pre'; base 'loo_final' needs method='exact'."
            )
        if method != "exact" and self.readout.cap is not None:
            raise ConfigError(
                f"method={method!r} rests on logits that move linearly, and this model caps them "
                "softly: use method='exact'."
            )
        of = torch.arange(len(m), device=m.device) if of is None else of.to(m.device)
        x = self.x(layer, kind)
        x_c, sigma_0 = self.readout.centre(x), self.readout.scale(x)
        if bases is None:
            bases = Bases(self.readout.logits(x).log_softmax(-1))
        out, fallback = torch.empty(m.shape, dtype=x.dtype, device=x.device), 0
        split = None
        if method == "moments":
            split = HeadAndTail.of(self.readout.U, bases.log_p, len(vectors), self.readout.lengths)
        for i in range(0, len(vectors), CHUNK):
            chunk = slice(i, i + CHUNK)
            V = self.readout.centre(at_least_float32(vectors[chunk]))
            task = self._problems(
                V, x_c, sigma_0, bases, of, self.sign * at_least_float32(m[:, chunk])
            )
            delta = task.delta(V, self.token)
            if self.against is not None:
                out[:, chunk] = self.sign * (delta - task.delta(V, self.against))
                self._rescore_cancelling(
                    out[:, chunk], layer, kind, m[:, chunk], vectors[chunk], of, task
                )
                continue
            if method == "first_order":
                sums = bounds(V, task)
            elif method == "moments":
                moments = log_sums_by_moments(V, task, split, self.memory_budget)
                sums, fallback = moments.value, fallback + int(moments.fallback.sum())
            else:
                sums = log_sums(
                    V, task, self.memory_budget, None if wanted is None else wanted[:, chunk]
                )
            out[:, chunk] = self.sign * (delta - sums)
            if method == "first_order":
                out[:, chunk].masked_fill_(_cancels(task), torch.inf)
            else:
                self._rescore_cancelling(
                    out[:, chunk], layer, kind, m[:, chunk], vectors[chunk], of, task
                )
        return out, fallback

    def _rescore_cancelling(
        self,
        out: Tensor,
        layer: int,
        kind: Kind,
        m: Tensor,
        vectors: Tensor,
        of: Tensor,
        task: Problems,
    ) -> None:
        """Score again the pairs that nearly cancel the stream: there the closed form subtracts
        nearly equal numbers."""
        x = self.x(layer, kind)
        for q, k in _cancels(task).nonzero().tolist():
            row = of[q : q + 1]
            v = at_least_float32(m[q, k]) * at_least_float32(vectors[k : k + 1])
            out[q, k] = self.importance(x[row], v, row)[0]

    def _problems(
        self, V: Tensor, x_c: Tensor, sigma_0: Tensor, bases: Bases, of: Tensor, m: Tensor
    ) -> Problems:
        out = self.readout
        cap, z = out.cap, None if out.cap is None else x_c @ out.U / sigma_0 + out.c
        if out.mode != "full":
            alpha = m / sigma_0[of]
            return Problems(
                out.U, bases.log_p, of, alpha, cap=cap, z=z, lengths=out.lengths, mean=bases.mean
            )
        # sigma of x + m_k v_k, without forming the sums
        wide, base, c = (V.double(), x_c.double(), m.double())
        cross = 2 * c * (wide @ base.T).T[of] / V.shape[1]
        square = base.square().mean(1)[of][:, None] + cross + c.square() * wide.square().mean(1)
        sigma = (square.clamp_min(0) + out.norm.eps).sqrt().type_as(m)
        return Problems(
            out.U,
            bases.log_p,
            of,
            alpha=m / sigma,
            beta=1 / sigma - 1 / sigma_0[of],
            b=x_c @ out.U,
            sigma_0=sigma_0[of],
            cap=cap,
            z=z,
            lengths=out.lengths,
            mean=bases.mean,
        )


def _cancels(task: Problems) -> Bool[Tensor, "problem neuron"]:
    """Pairs whose divisor falls far below the base's own: 1/sigma - 1/sigma_0 outgrows 1/sigma_0
    thirtyfold."""
    if task.beta is None or task.sigma_0 is None:
        return torch.zeros_like(task.alpha, dtype=torch.bool)
    return task.beta * task.sigma_0 > CANCELS


def check_moments(method: str, norm: str) -> None:
    """Raise `ConfigError` for moments with a norm that depends on each vector."""
    if method == "moments" and norm == "full":
        raise ConfigError(
            "method='moments' expands in the coefficient alone: it needs norm='frozen' or 'none'."
        )


def setting(
    lens: Lens,
    facts: Facts | Trace,
    *,
    norm: NormMode = "frozen",
    base: Base = "mid",
    target: Target = "answer",
    positions: Positions = "last",
    attention: bool = False,
    memory_budget: int | None = None,
) -> Setting:
    """Trace the facts (unless that is done) and fix what is asked for.

    `target`: 'answer' (its first token; a bare prompt has none and takes the model's own),
    'predicted' (the model's own most likely token), 'sequence' (the whole answer, teacher forced),
    a token id, or a pair for a contrast."""
    if base not in BASES:
        raise unknown("Base", base, BASES)
    if norm not in NORM_MODES:
        raise unknown("Norm mode", norm, NORM_MODES)
    where = where_read(target, positions)
    trace = lens.traced(facts, where, attention=attention)
    _check_positions(trace, where)
    wanted = wanted_at(lens, trace, target)
    return Setting(
        lens, trace, wanted.token, norm, base, wanted.against, wanted.sequence, memory_budget
    )


def _check_positions(trace: Trace, where: Positions) -> None:
    """Raise `ConfigError` for a trace of other positions than those asked for, or of an answer's
    positions that were not asked for."""
    where_of = [trace.positions[trace.prompt == i].tolist() for i in range(len(trace.prompts))]
    if where not in ("last", "answer") and any(
        list(p.positions(where)) != positions
        for p, positions in zip(trace.prompts, where_of, strict=True)
    ):
        raise ConfigError(
            f"This trace holds positions {where_of}, not {where!r}: trace with positions={where!r}."
        )
    if where != "answer" and any(
        max(positions) > p.last for p, positions in zip(trace.prompts, where_of, strict=True)
    ):
        raise ConfigError("This trace holds an answer's positions: use it with target='sequence'.")
