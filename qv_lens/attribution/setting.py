"""Setting: one attribution problem - what was traced, what is asked for, how it is read out - and
Eq. 9 on it.

    I(v) = log p(w | x + v) - log p(w | x)

1. Base x of a layer: `mid` (h + A, the stream after attention; default), `pre` (h), or `loo_final`
   (the final vector with the component taken away: log p(h^L) - log p(h^L - v)). Attention's base
   is always h.
2. Target w: the answer's first token, the model's own prediction, a token id, the whole answer
   (teacher forced, one row per answer token, added up), or one token against another: I = delta_1 -
   delta_2, closed form, the log-sum cancels.
3. Numerics: `engine`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qv_lens.attribution.engine import Problems, bounds, log_sums, tile_rows
from qv_lens.attribution.moments import HeadAndTail, log_sums_by_moments
from qv_lens.attribution.projection import NORM_MODES, NormMode, Readout
from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.records import Fact
from qv_lens.facts.spans import Positions
from qv_lens.models.lens import Facts, Lens
from qv_lens.models.norms import at_least_float32, dtype_name
from qv_lens.trace import Rows, Trace

Base = Literal["mid", "pre", "loo_final"]
BASES: tuple[Base, ...] = ("mid", "pre", "loo_final")
Kind = Literal["ffn", "attn", "head"]
Over = Literal["prompt", "positions", "set", "category"]
OVERS: tuple[Over, ...] = ("prompt", "positions", "set", "category")
Method = Literal["exact", "topk", "moments", "first_order"]
METHODS: tuple[Method, ...] = ("exact", "topk", "moments", "first_order")
#: 'answer', 'predicted', 'sequence', a token id, or a pair (for, against) of answers, ids, 'answer'
#: or 'predicted'
Target = str | int | tuple[str | int, str | int]
TARGETS = (
    "answer",
    "predicted",
    "sequence",
    "a token id",
    "a pair of answers",
    "another answer as that of a fact, qv.Fact(prompt, subject, 'Rome')",
)
#: neurons whose weights are upcast at a time
CHUNK = 2048
#: how far the divisor of a base may shrink, norm recomputed, before the closed form is left
CANCELS = 30.0
#: rows of layers that are read out in one product
READ_TOGETHER = 32


@dataclass(frozen=True)
class Grouping:
    """How rows (positions of prompts) are added up and named. `sequence`: a prompt's rows belong
    together."""

    lens: Lens
    """The model."""
    rows: Rows
    """The rows."""
    sequence: bool = False
    """Whether a prompt's rows belong together."""

    def groups(self, over: Over) -> Int[Tensor, " row"]:
        """Which group each row is added up in: its prompt and position, its prompt (all positions
        of it), the set, or its fact's category.

        The rows of a whole answer belong to one prompt. Raises `ConfigError` for categories that
        facts do not have."""
        if over == "set":
            return torch.zeros_like(self.rows.prompt)
        if over == "category":
            names = self.categories()
            return torch.tensor(
                [names.index(_category(self.rows.facts[p])) for p in self.rows.prompt.tolist()]
            )
        if self.sequence or over == "positions":
            return self.rows.prompt
        return torch.arange(len(self.rows.prompt))

    def categories(self) -> list[str]:
        """The categories of the facts, in order of first appearance. Raises `ConfigError` if one
        has none."""
        return list(dict.fromkeys(_category(fact) for fact in self.rows.facts))

    def labels(self, over: Over) -> list[dict[str, Any]]:
        """One record per group: `prompt` (-1 for sums), `position` and `token` where a prompt has
        several rows, `category`."""
        if over == "set":
            return [{"prompt": -1}]
        if over == "category":
            return [{"prompt": -1, "category": name} for name in self.categories()]
        rows = self.rows
        whole = self.sequence or over == "positions"
        if whole or len(rows.prompt) == len(rows.prompts):
            return [{"prompt": i} for i in range(len(rows.prompts))]
        where = list(zip(rows.prompt.tolist(), rows.positions.tolist(), strict=True))
        ids = [prompt.row("answer") for prompt in rows.prompts]
        return [
            {"prompt": i, "position": p, "token": self.lens.token_label(ids[i][p])}
            for i, p in where
        ]


@dataclass(frozen=True)
class Wanted:
    """What is asked for at each row: a token, or how much likelier it is than another."""

    lens: Lens
    """The model."""
    rows: Rows
    """Where it is read."""
    token: Int[Tensor, " row"]
    """The token asked for at each row."""
    against: Int[Tensor, " row"] | None = None
    """The other token of a contrast."""
    sequence: bool = False
    """Whether a whole answer is asked for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of scores: the weights', in float32 or better."""
        return torch.promote_types(self.lens.dtype, torch.float32)

    def attrs(self, predicted: Int[Tensor, " row"]) -> dict[str, Any]:
        """What frames and sets are labelled with; `predicted`: the model's own most likely token at
        each row. `positions` are where units lie, `read_at` where the target is read."""
        label = self.lens.token_label
        attrs = {
            **self.lens.label,
            "texts": [p.text for p in self.rows.prompts],
            "dtype": dtype_name(self.dtype),
            "targets": [label(int(t)) for t in self.token],
            "target_ids": self.token.tolist(),
            "positions": self.rows.positions.tolist(),
            "read_at": self.rows.positions.tolist(),
            "target_is_argmax": (predicted == self.token).tolist(),
        }
        if self.against is None:
            return attrs
        return {
            **attrs,
            "against": [label(int(t)) for t in self.against],
            "against_ids": self.against.tolist(),
        }


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
        """How the stream is read out."""
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

    def increase_of_vectors(
        self, layer: int, kind: Kind, v: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, " row"]:
        """I of one vector per row."""
        x, v = self.x(layer, kind), at_least_float32(v)
        low, high = (x - v, x) if self.base == "loo_final" else (x, x + v)
        return self.gain(high) - self.gain(low)

    def increase_of_many(
        self, layer: int, kind: Kind, v: Float[Tensor, "row n d_model"]
    ) -> Float[Tensor, "row n"]:
        """I of several vectors per row, row by row: nothing larger than one row's logits is
        held."""
        x, out = self.x(layer, kind), []
        sign = -1.0 if self.base == "loo_final" else 1.0
        tile = tile_rows(self.readout.U, self.memory_budget)
        for row in range(len(v)):
            start, rows = x[row : row + 1], torch.full((len(v[row]),), row, device=v.device)
            parts = [
                self.gain(start + sign * at_least_float32(v[row, i : i + tile]), rows[i : i + tile])
                for i in range(0, len(rows), tile)
            ]
            out.append(sign * (torch.cat(parts) - self.gain(start, rows[:1])))
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
        sign = -1.0 if self.base == "loo_final" else 1.0  # I = -(log p(x - v) - log p(x))
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
            task = self._problems(V, x_c, sigma_0, bases, of, sign * at_least_float32(m[:, chunk]))
            delta = task.delta(V, self.token)
            if self.against is not None:
                out[:, chunk] = sign * (delta - task.delta(V, self.against))
                self._by_hand(out[:, chunk], layer, kind, m[:, chunk], vectors[chunk], of, task)
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
            out[:, chunk] = sign * (delta - sums)
            if method == "first_order":
                out[:, chunk].masked_fill_(_cancels(task), torch.inf)
            else:
                self._by_hand(out[:, chunk], layer, kind, m[:, chunk], vectors[chunk], of, task)
        return out, fallback

    def _by_hand(
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
        x, sign = self.x(layer, kind), -1.0 if self.base == "loo_final" else 1.0
        for q, k in _cancels(task).nonzero().tolist():
            row = of[q : q + 1]
            v = sign * at_least_float32(m[q, k]) * at_least_float32(vectors[k : k + 1])
            out[q, k] = (sign * (self.gain(x[row] + v, row) - self.gain(x[row], row)))[0]

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
            m / sigma,
            1 / sigma - 1 / sigma_0[of],
            x_c @ out.U,
            sigma_0[of],
            cap,
            z,
            out.lengths,
            bases.mean,
        )


def _cancels(task: Problems) -> Bool[Tensor, "problem neuron"]:
    """Pairs whose divisor falls far below the base's own: 1/sigma - 1/sigma_0 outgrows 1/sigma_0
    thirtyfold."""
    if task.beta is None or task.sigma_0 is None:
        return torch.zeros_like(task.alpha, dtype=torch.bool)
    return task.beta * task.sigma_0 > CANCELS


def check_over(over: str) -> None:
    """Raise `ConfigError` for an unknown way to add up prompts."""
    if over not in OVERS:
        raise unknown("over", over, OVERS)


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


def where_read(target: Target, positions: Positions = "last") -> Positions:
    """The positions at which a target is read. Raises `ConfigError` for an unknown target, or for
    positions that do not go with it."""
    target = _plain_target(target)
    if isinstance(target, str) and target not in ("answer", "predicted", "sequence"):
        raise unknown("Target", target, TARGETS)
    sequence = target == "sequence"
    if positions == "answer" and not sequence:
        raise ConfigError(
            "positions='answer' reads every token of the answer: it goes with target='sequence'."
        )
    if sequence and positions not in ("last", "answer"):
        raise ConfigError(
            "target='sequence' has its own positions, those that predict the answer; got "
            f"{positions!r}."
        )
    return "answer" if sequence else positions


def wanted_at(lens: Lens, rows: Rows, target: Target) -> Wanted:
    """What is asked for at rows: those of a trace, or the prompts' ends, where the model is asked
    what it predicts itself if that is wanted.

    Raises `ConfigError` for a token that does not exist, or a contrast of one token with itself."""
    target = _plain_target(target)
    pair = target if isinstance(target, tuple) else (target, None)
    token = _tokens(lens, rows, pair[0])
    against = None if pair[1] is None else _tokens(lens, rows, pair[1])
    if against is not None and bool((same := against == token).any()):
        text = rows.prompts[int(rows.prompt[same][0])].text
        raise ConfigError(
            f"A contrast compares two first tokens; both of {target} begin with "
            f"{lens.token_label(int(token[same][0]))!r} after {text!r:.200}."
        )
    for part, tokens in zip(pair, (token, against), strict=True):
        if isinstance(part, str) and part not in ("predicted", "sequence") and tokens is not None:
            answer_of = dict(zip(rows.prompt.tolist(), tokens.tolist(), strict=True))
            lens.warn_of_fragments(
                [rows.prompts[i].text for i in answer_of], list(answer_of.values())
            )
    return Wanted(lens, rows, token, against, target == "sequence")


def _plain_target(target: Any) -> Target:
    """The target, any integer in it as an int. Raises `ConfigError` for what is not a target."""
    if isinstance(target, tuple) and len(target) == 2:
        return _plain_target(target[0]), _plain_target(target[1])  # type: ignore[return-value]
    if isinstance(target, str):
        return target
    number: Any = target
    try:
        return operator.index(number)
    except TypeError:
        raise unknown("Target", target, TARGETS) from None


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


def _tokens(lens: Lens, rows: Rows, target: str | int) -> Int[Tensor, " row"]:
    """The token asked for at each row."""
    if isinstance(target, int):
        if not 0 <= target < lens.d_vocab:
            raise ConfigError(f"Token id {target} is outside the vocabulary of {lens.d_vocab}.")
        return torch.full_like(rows.prompt, target)
    if target == "predicted":
        return _predicted(lens, rows)
    named = list(_named(lens, rows, target))
    own = _predicted(lens, rows).tolist() if None in named else named
    token = [other if name is None else name for name, other in zip(named, own, strict=True)]
    return torch.tensor(token, device=rows.prompt.device)


def _predicted(lens: Lens, rows: Rows) -> Int[Tensor, " row"]:
    """The model's own most likely token at each row; rows that are no trace lie at the prompts'
    ends."""
    trace = rows if isinstance(rows, Trace) else lens.trace(rows.facts)
    return trace.logits.argmax(-1)


def _named(lens: Lens, rows: Rows, target: str) -> Iterator[int | None]:
    """The token that each row's prompt names; None where a bare prompt has no answer."""
    for index, position in zip(rows.prompt.tolist(), rows.positions.tolist(), strict=True):
        prompt = rows.prompts[index]
        if target == "answer":
            yield prompt.answer[0] if prompt.answer else None
        elif target == "sequence":
            positions = rows.positions[rows.prompt == index].tolist()
            if tuple(positions) != prompt.positions("answer"):
                raise ConfigError(
                    "target='sequence' reads every token of the answer: trace with "
                    "positions='answer'."
                )
            yield prompt.answer[position - prompt.last]
        else:
            yield lens.answer_ids(rows.facts[index], target)[0]


def _category(fact: Fact | str) -> str:
    name = None if isinstance(fact, str) else fact.category
    if not name:
        text = fact if isinstance(fact, str) else fact.text
        raise ConfigError(
            f"over='category' needs a category of every fact; {text!r:.200} has none: Fact(..., "
            "category=...)."
        )
    return name
