"""What a model loses without a unit: an FFN neuron, an attention channel or a head.

1. y is the log-probability of what is asked for at the prompt's end (natural log; a contrast: the
   difference of two). m is a unit's activation at the rows' positions, m' what it is set to when
   it is taken out (`baselines`: zero, a mean, another prompt's).
2. gradient: s = (m - m') dy/dm, from one forward and one backward pass for all layers at once: to
   first order what y loses when the unit alone goes from m to m', everything after it free to
   react. A head's s is the sum over its channels.
3. relp: the same in a pass whose gradient follows the rules of RelP (`relp`).
4. integrated: s = (m - m') mean_i dy/dm at m' + (i - 1/2)/steps (m - m'), i = 1..steps, each layer
   moved alone with all its units: the path instead of its end.
5. In rounds: the best units are set to m' in the pass (masked, so that no gradient goes through
   them either) and all others asked again without them, until enough are found. The loss without a
   set is not the sum of the losses without each unit, so a ranking in rounds says more about sets.
6. Candidates: the best so many of a round are really taken out, one at a time beside those of the
   earlier rounds, and the round keeps those whose measured loss is largest.

Unlike Eq. 9, which reads a vector out where it is written, s counts what later layers make of it.
Source: attribution patching (Nanda 2023); Molchanov et al. (2017); RelP (arXiv 2508.21258);
integrated gradients (Sundararajan et al. 2017)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import pandas as pd
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qv_lens.attribution.grouping import Grouping, Over, check_over
from qv_lens.attribution.ranking import check_top, grouped, ranked
from qv_lens.attribution.relp import RULES, Rule, check_rules, read_out, relp_hooks
from qv_lens.attribution.wanted import Target, Wanted, wanted_at, where_read
from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.spans import Positions, Prompt
from qv_lens.models.architectures import Sublayer
from qv_lens.models.baselines import Baseline, baseline_name, baseline_values
from qv_lens.models.hooks import Hook
from qv_lens.models.interventions import check_not_suppressed
from qv_lens.models.lens import Facts, Lens, Start, check_lens, log_probs
from qv_lens.models.norms import at_least_float32, enlarged
from qv_lens.models.units import UNITS_WITH_VALUES, UnitWithValue, site, units_in_layer
from qv_lens.neurons import NeuronSet
from qv_lens.progress import progress_bar
from qv_lens.trace import Rows, Trace

EffectMethod = Literal["gradient", "relp", "integrated"]
EFFECT_METHODS: tuple[EffectMethod, ...] = ("gradient", "relp", "integrated")
#: prompts in one pass, which holds the activations of every layer for the gradient
TOGETHER = 8
#: prompts, at several places of their paths, in one pass of integrated gradients
PATH_ROWS = 64
#: steps of the path of `integrated`, where none are named
STEPS = 20


def neuron_effects(
    lens: Lens,
    facts: Facts | Trace,
    top: int | None = 300,
    *,
    method: EffectMethod = "gradient",
    unit: UnitWithValue = "ffn",
    over: Over = "prompt",
    target: Target = "answer",
    positions: Positions = "last",
    baseline: Baseline = "zero",
    rounds: int = 1,
    candidates: int | None = None,
    rules: Sequence[Rule] = RULES,
    steps: int = STEPS,
) -> NeuronSet:
    """Units by what the answer loses without them, in nats: a positive score supports the answer.

    `top`: how many per prompt (None: all). `method`: 'gradient' predicts the loss without one unit
    best; 'relp', with its `rules`, predicts that without a set better in one pass; 'integrated'
    shares out what the answer loses as all units of a layer go to the baseline together, which is
    not what it loses without one of them, in `steps` passes a layer (tens of times the others'
    time).
    `unit`: 'ffn' (neurons), 'attn_channel' (rows of W_O) or 'head'.
    `over='set'` adds the prompts up, `over='positions'` the positions of each prompt.
    `target`: as for `value_neurons`; it is read at the prompt's end (a whole answer: token by token
    from there).
    `positions`: where the units are taken out ('all': a ranking for each token). Of a Trace only
    its facts are used.
    `baseline`: what they are set to: 'zero', 'mean' (over the facts), `qv.MeanOver(other_facts)`,
    or a list of other prompts, one for each fact (patching; s is then what the answer loses when
    the unit is what it is there).
    `rounds`: in how many passes the `top` units are found, each pass without the units found
    before; the column `round` says in which one. The scores of a round are those of the model
    without the earlier rounds' units; sets keep the order of the rounds.
    `candidates`: so many of each round's best are really taken out, one at a time (a forward pass
    each), and their scores are what the answer then loses; the round keeps the best of them.
    Raises `ConfigError` for options that do not exist or do not go together, or a trace of other
    weights, `FactError` for prompts that do not tokenise.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> qv.neuron_effects(lens, fact, 3).units
    [(4, 148), (11, 414), (2, 297)]
    """
    check_lens(lens)
    check_top(top)
    check_over(over)
    _check(method, unit, rules, steps)
    if method == "relp":
        check_not_suppressed(lens, "RelP")
    if method == "integrated" and baseline == "zero":
        _warn_of_norm(lens, unit)
    records = lens.traced(facts).facts if isinstance(facts, Trace) else facts
    if positions == "answer" and target != "sequence":
        raise ConfigError(
            "positions='answer' takes neurons at every token of the answer: it goes with "
            "target='sequence'."
        )
    sizes = _sizes(top, rounds)
    read = where_read(target)
    wanted = wanted_at(lens, lens.rows(records, read), target)
    where = read if positions == "last" else positions
    rows = wanted.rows if where == read else lens.rows(wanted.rows.facts, where)
    problem = _Problem(
        wanted,
        rows,
        unit,
        method,
        baseline_values(lens, rows, baseline, where, unit),
        tuple(rules) if method == "relp" else (),
        steps,
    )
    settings = {
        "positions": rows.positions.tolist(),
        "method": method,
        "unit": unit,
        "over": over,
        "baseline": baseline_name(baseline),
        "rounds": rounds,
    }
    if method == "relp":
        settings["rules"] = list(rules)
    if method == "integrated":
        settings["steps"] = steps
    if candidates is not None:
        _check_candidates(candidates, sizes, over, rows)
        settings["candidates"] = candidates
    return _in_rounds(problem, over, sizes, candidates, settings)


def _check_candidates(candidates: int, sizes: Sequence[int | None], over: Over, rows: Rows) -> None:
    if sizes[0] is None or not isinstance(candidates, Integral) or candidates < sizes[0]:
        raise ConfigError(
            "candidates is how many units of a round are really taken out, at least as many as the "
            f"round keeps; got {candidates}, and a round keeps {sizes[0] or 'all'}."
        )
    if over == "prompt" and len(rows.prompt) > len(rows.prompts):
        raise ConfigError(
            "candidates are taken out at all positions asked: with several positions of a prompt "
            "use over='positions'."
        )


def _check(method: str, unit: str, rules: Sequence[str], steps: int) -> None:
    if method not in EFFECT_METHODS:
        raise unknown("Effect method", method, EFFECT_METHODS)
    if unit not in UNITS_WITH_VALUES:
        raise unknown("Unit with an effect", unit, UNITS_WITH_VALUES)
    check_rules(rules)
    if method != "relp" and tuple(rules) != RULES:
        raise ConfigError(f"rules are those of method='relp'; the method here is {method!r}.")
    if not isinstance(steps, Integral) or steps < 1:
        raise ConfigError(f"steps is in how many steps the path is taken, at least 1; got {steps}.")
    if method != "integrated" and steps != STEPS:
        raise ConfigError(f"steps are those of method='integrated'; the method here is {method!r}.")


def _warn_of_norm(lens: Lens, unit: str) -> None:
    """Warn where the path to zero runs behind a norm: all of it but its end has the same output."""
    sublayer: Sublayer = "ffn" if unit == "ffn" else "attn"
    if lens.backend_adapter.norm_after(0, sublayer) is not None:
        warnings.warn(
            f"A norm stands behind these units in {lens.name}: smaller together they write the same, so "
            "that method='integrated' gives the gradient's scores times a number that grows with "
            "steps. The order is right; for nats use method='gradient', or baseline='mean'.",
            stacklevel=3,
        )


def _sizes(top: int | None, rounds: int) -> list[int | None]:
    """How many units each round takes: as equal as can be, the earlier ones one more."""
    if not isinstance(rounds, Integral) or rounds < 1:
        raise ConfigError(
            f"rounds is in how many passes neurons are found, at least 1; got {rounds!r}."
        )
    if rounds == 1:
        return [top]
    if top is None or rounds > top:
        raise ConfigError(
            f"rounds={rounds} takes the best neurons out again and again: give top=, at least "
            f"{rounds}."
        )
    return [top // rounds + (number < top % rounds) for number in range(rounds)]


def _in_rounds(
    problem: _Problem,
    over: Over,
    sizes: Sequence[int | None],
    candidates: int | None,
    settings: dict[str, Any],
) -> NeuronSet:
    """The units of each round, one round after another."""
    lens = problem.wanted.lens
    grouping = Grouping(lens, problem.rows, problem.wanted.sequence)
    groups = grouping.groups(over).to(lens.device)
    count = torch.bincount(groups)[:, None]
    shape = (lens.n_layers, len(count), problem.width)
    taken = torch.zeros(shape, dtype=torch.bool, device=lens.device)
    rounds = []
    for number, size in enumerate(sizes):
        m, effect, predicted = problem.effects(~taken[:, groups])
        if number == 0:
            settings = {**problem.wanted.attrs(predicted), **settings}
        scores = torch.stack([grouped(layer, groups) for layer in effect])
        scores = scores.masked_fill(taken, -torch.inf)
        if candidates is not None:
            scores = problem.measured(taken, scores, candidates, groups)
        coefficients = torch.stack([grouped(layer, groups) / count for layer in m])
        rounds.append(ranked(grouping, problem.unit, scores, coefficients, size, settings, over))
        if len(sizes) > 1:
            rounds[-1] = replace(rounds[-1], frame=rounds[-1].frame.assign(round=number))
            taken |= _best(scores, size)
    return rounds[0] if len(rounds) == 1 else _joined(rounds)


def _best(scores: Float[Tensor, "layer group unit"], size: int | None) -> Bool[Tensor, ...]:
    """A mask of the `size` best units of each group, as `ranked` takes them."""
    return _mask(_order(scores)[:, :size], scores)


def _order(scores: Float[Tensor, "layer group unit"]) -> Int[Tensor, "group layer_unit"]:
    """Each group's units, best first, by their place on the axis of layers and units."""
    flat = rearrange(scores, "l g u -> g (l u)")
    return flat.sort(dim=1, descending=True, stable=True).indices


def _mask(
    places: Int[Tensor, "group some"], like: Float[Tensor, "layer group unit"]
) -> Bool[Tensor, "layer group unit"]:
    """Which units these are."""
    flat = torch.zeros_like(rearrange(like, "l g u -> g (l u)"), dtype=torch.bool)
    return rearrange(flat.scatter_(1, places, True), "g (l u) -> l g u", l=len(like))


def _joined(rounds: Sequence[NeuronSet]) -> NeuronSet:
    """The rounds one after another, prompt by prompt."""
    frame = pd.concat([each.frame for each in rounds], ignore_index=True)
    frame = frame.sort_values(["prompt", "round"], kind="stable").reset_index(drop=True)
    return replace(rounds[0], frame=frame)


#: the values, dy/dm, and the most likely token at each row that is read
_Gradients = tuple[
    Float[Tensor, "layer row value"], Float[Tensor, "layer row value"], Int[Tensor, " row"]
]


@dataclass(frozen=True)
class _Problem:
    """Whose effect is asked, on what, and how. The values of a layer at a row are the FFN's
    activations, or attention's channels; a unit is one of them, or a head's channels together."""

    wanted: Wanted
    rows: Rows
    unit: UnitWithValue
    method: EffectMethod
    baseline: Float[Tensor, "layer row value"]
    rules: tuple[Rule, ...]
    steps: int

    @property
    def width(self) -> int:
        """Units of a layer."""
        return units_in_layer(self.wanted.lens, self.unit)

    @property
    def batches(self) -> list[_Batch]:
        """The prompts, so many together as one pass takes."""
        return [_Batch(self, begin) for begin in range(0, len(self.rows.prompts), TOGETHER)]

    def site(self, layer: int) -> str:
        """The hook point of the values."""
        return site(self.wanted.lens, self.unit, layer)

    def values(self, units: Bool[Tensor, "layer row unit"]) -> Bool[Tensor, "layer row value"]:
        """The units' values: of a head, all its channels."""
        return repeat(units, "l r u -> l r (u c)", c=self.baseline.shape[2] // self.width)

    def measured(
        self,
        taken: Bool[Tensor, "layer group unit"],
        scores: Float[Tensor, "layer group unit"],
        candidates: int,
        groups: Int[Tensor, " row"],
    ) -> Float[Tensor, "layer group unit"]:
        """What y really loses without each group's best candidates, one at a time beside those
        `taken`; -inf for all other units."""
        order = _order(scores)[:, :candidates]
        out = [taken]
        for place in range(order.shape[1]):
            out.append(taken | _mask(order[:, [place]], scores))
        kept = [self.values(~each[:, groups]) for each in out]
        y = torch.cat([batch.y_without(kept) for batch in self.batches], dim=1)
        owner = torch.zeros(len(self.rows.prompts), dtype=torch.long, device=y.device)
        owner[self.rows.prompt] = groups
        by_group = y.new_zeros(len(out), len(order)).index_add_(
            1, owner[self.wanted.rows.prompt], y
        )
        losses = by_group[0] - by_group[1:]
        flat = torch.full_like(rearrange(scores, "l g u -> g (l u)"), -torch.inf)
        flat.scatter_(1, order, losses.T.to(flat))
        return rearrange(flat, "g (l u) -> l g u", l=len(scores))

    def effects(
        self, kept: Bool[Tensor, "layer row unit"]
    ) -> tuple[
        Float[Tensor, "layer row unit"], Float[Tensor, "layer row unit"], Int[Tensor, " row"]
    ]:
        """Every unit's activation (none for a head) and its effect, without the units that are not
        `kept`; and the token that the model then finds most likely at each row that is read."""
        kept = self.values(kept)
        parts = [
            batch.along_paths(kept) if self.method == "integrated" else batch.at_once(kept)
            for batch in self.batches
        ]
        values, gradients = (torch.cat([part[i] for part in parts], dim=1) for i in (0, 1))
        predicted = torch.cat([part[2] for part in parts])
        effects = (values - self.baseline.to(values)) * gradients
        if self.unit != "head":
            return values, effects, predicted
        effects = reduce(effects, "l r (h c) -> l r h", "sum", h=self.width)
        return torch.full_like(effects, torch.nan), effects, predicted


@dataclass(frozen=True)
class _Batch:
    """`TOGETHER` prompts of a problem from `begin` on."""

    problem: _Problem
    begin: int

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.problem.rows.prompts[self.begin : self.begin + TOGETHER]

    def places(self, of: Rows) -> tuple[tuple[Tensor, Tensor], Int[Tensor, " row"]]:
        """Where the batch's rows stand in its pass (prompt, position), and which rows they are."""
        inside = (self.begin <= of.prompt) & (of.prompt < self.begin + TOGETHER)
        rows = inside.nonzero()[:, 0]
        return (of.prompt[rows] - self.begin, of.positions[rows]), rows

    def at_once(self, kept: Bool[Tensor, "layer row value"]) -> _Gradients:
        """In one pass for all layers."""
        problem, lens = self.problem, self.problem.wanted.lens
        at, rows = self.places(problem.rows)
        shape = (len(rows), problem.baseline.shape[2])
        dtype = problem.wanted.dtype
        leaves, seen, hooks = [], [], []
        for layer in range(lens.n_layers):
            leaf = torch.zeros(shape, dtype=dtype, device=lens.device, requires_grad=True)
            leaves.append(leaf)
            outside = problem.baseline[layer, rows]
            hooks.append((problem.site(layer), _masked(leaf, at, kept[layer, rows], outside, seen)))
        with torch.enable_grad():
            logp = self._log_p(hooks)
            y = self._gain(logp)
            scale = self._enlarged(y)
            gradients = torch.autograd.grad((scale[self._read()] * y).sum(), leaves)
        return torch.stack(seen), torch.stack(gradients) / scale[at[0], None], logp.argmax(-1)

    def along_paths(self, kept: Bool[Tensor, "layer row value"]) -> _Gradients:
        """dy/dm averaged along each layer's path from the baseline to the values."""
        problem = self.problem
        layers = range(problem.wanted.lens.n_layers)
        start: Start | None = None
        values, gradients = [], []
        for layer in progress_bar(layers, of="integrated", unit="layer"):
            start, value = self._value(layer, kept, start)
            values.append(value)
            gradients.append(self._path(layer, kept, start, value))
        with torch.no_grad():
            predicted = self._log_p(list(self._masks([kept]))).argmax(-1)
        return torch.stack(values), torch.stack(gradients), predicted

    @torch.no_grad()
    def _value(
        self, layer: int, kept: Bool[Tensor, "layer row value"], start: Start | None
    ) -> tuple[Start, Float[Tensor, "row value"]]:
        """The stream in front of a layer, and the layer's values."""
        lens = self.problem.wanted.lens
        ids, ends = self._ids(), [prompt.last for prompt in self.prompts]
        masks = list(self._masks([kept]))
        stream = lens.stream(ids, layer, masks, start, last=ends)
        at, _ = self.places(self.problem.rows)
        seen: list[Tensor] = []

        def keep(m: Tensor) -> None:
            seen.append(at_least_float32(m[at].flatten(1)))

        start = layer, stream
        hooks = [*masks, (self.problem.site(layer), keep)]
        lens.stream(ids, layer + 1, hooks, start, last=ends)
        return start, seen[0]

    def _path(
        self,
        layer: int,
        kept: Bool[Tensor, "layer row value"],
        start: Start,
        value: Float[Tensor, "row value"],
    ) -> Float[Tensor, "row value"]:
        """dy/dm of a layer, averaged over the steps of its path."""
        problem, steps = self.problem, self.problem.steps
        at, rows = self.places(problem.rows)
        low = problem.baseline[layer, rows].to(value)
        total = torch.zeros_like(value)
        together = max(1, PATH_ROWS // len(self.prompts))
        shares = (torch.arange(steps, device=value.device, dtype=value.dtype) + 0.5) / steps
        for some in shares.split(together):
            points = low + some[:, None, None] * (value - low)
            leaf = points.flatten(0, 1).requires_grad_()
            copies = len(some)
            own = problem.site(layer)
            hooks = [(name, hook) for name, hook in self._masks([kept] * copies) if name != own]
            hooks.append((own, _placed(leaf, self._copied(at, copies))))
            begin = start[0], start[1].repeat(copies, 1, 1)
            with torch.enable_grad():
                y = self._gain(self._log_p(hooks, begin, copies), copies)
                scale = self._enlarged(y, copies)
                (gradient,) = torch.autograd.grad((scale[self._read(copies)] * y).sum(), leaf)
            gradient = gradient / scale[self._copied(at, copies)[0], None]
            total += gradient.unflatten(0, (copies, len(value))).sum(0)
        return total / steps

    @torch.no_grad()
    def y_without(
        self, kept: Sequence[Bool[Tensor, "layer row value"]]
    ) -> Float[Tensor, "set row"]:
        """y at every row that is read, without what each set does not keep."""
        together = max(1, PATH_ROWS // len(self.prompts))
        parts = []
        for begin in range(0, len(kept), together):
            sets = kept[begin : begin + together]
            y = self._gain(self._log_p(list(self._masks(sets)), None, len(sets)), len(sets))
            parts.append(y.unflatten(0, (len(sets), -1)))
        return torch.cat(parts)

    def _masks(self, kept: Sequence[Bool[Tensor, "layer row value"]]) -> Iterator[Hook]:
        """What is taken out, by layer, in a pass of several copies of the batch: of each copy what
        its set does not keep."""
        at, rows = self.places(self.problem.rows)
        places = self._copied(at, len(kept))
        for layer in range(len(kept[0])):
            here = torch.cat([each[layer, rows] for each in kept])
            if not here.all():
                outside = self.problem.baseline[layer, rows].repeat(len(kept), 1)
                yield self.problem.site(layer), _masked(None, places, here, outside, [])

    def _log_p(
        self, hooks: Sequence[Hook], start: Start | None = None, copies: int = 1
    ) -> Float[Tensor, "row d_vocab"]:
        """The distribution at every row that is read."""
        wanted, rules = self.problem.wanted, self.problem.rules
        at, _ = self.places(wanted.rows)
        stream = wanted.lens.stream(
            self._ids() * copies,
            wanted.lens.n_layers,
            hooks,
            start,
            last=[prompt.last for prompt in self.prompts] * copies,
            under=relp_hooks(wanted.lens, rules),
        )
        return log_probs(read_out(wanted.lens, stream[self._copied(at, copies)], rules))

    def _gain(self, logp: Float[Tensor, "row d_vocab"], copies: int = 1) -> Float[Tensor, " row"]:
        """y at every row that is read."""
        wanted = self.problem.wanted
        _, rows = self.places(wanted.rows)
        y = logp.gather(1, wanted.token[rows].repeat(copies)[:, None])
        if wanted.against is not None:
            y = y - logp.gather(1, wanted.against[rows].repeat(copies)[:, None])
        return y[:, 0]

    def _enlarged(self, y: Float[Tensor, " row"], copies: int = 1) -> Float[Tensor, " prompt"]:
        """By how much y of each prompt is enlarged to be differentiated: by as much as the least
        sure of its rows allows."""
        scale = y.new_full((copies * len(self.prompts),), 2.0**15)
        each = torch.ones_like(y) if self.problem.wanted.against is not None else enlarged(y)
        return scale.scatter_reduce(0, self._read(copies), each, "amin")

    def _read(self, copies: int = 1) -> Int[Tensor, " row"]:
        """Of which prompt each row is that is read."""
        at, _ = self.places(self.problem.wanted.rows)
        return self._copied(at, copies)[0]

    def _ids(self) -> list[tuple[int, ...]]:
        where = "answer" if self.problem.wanted.sequence else "last"
        return [prompt.row(where) for prompt in self.prompts]

    def _copied(self, at: tuple[Tensor, Tensor], copies: int) -> tuple[Tensor, Tensor]:
        """Places in a pass of several copies of the batch."""
        prompt, position = at
        shift = torch.arange(copies, device=prompt.device) * len(self.prompts)
        return (shift[:, None] + prompt).flatten(), position.repeat(copies)


def _masked(
    leaf: Float[Tensor, "row value"] | None,
    at: tuple[Tensor, Tensor],
    kept: Bool[Tensor, "row value"],
    outside: Float[Tensor, "row value"],
    seen: list[Tensor],
) -> Callable[[Tensor], Tensor]:
    """A hook that adds the rows of `leaf` at their places, sets what is not `kept` there to the
    values `outside`, and appends what is there to `seen`."""

    def hook(m: Tensor) -> Tensor:
        here = m[at].flatten(1)
        if leaf is not None:
            here = here + leaf.to(m.dtype)
        here = torch.where(kept, here, outside.to(m.dtype))
        seen.append(at_least_float32(here.detach()))
        return m.index_put(at, here.unflatten(1, m.shape[2:]))

    return hook


def _placed(
    values: Float[Tensor, "row value"], at: tuple[Tensor, Tensor]
) -> Callable[[Tensor], Tensor]:
    """A hook that puts the values at their places."""

    def hook(m: Tensor) -> Tensor:
        return m.index_put(at, values.to(m.dtype).unflatten(1, m.shape[2:]))

    return hook
