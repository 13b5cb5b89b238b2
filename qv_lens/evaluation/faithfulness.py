"""Faithfulness of a ranking: what the answer loses when its best k units are taken out, or keeps
when nothing else is left, for growing k.

1. For each fact, ranking and k, in a real forward pass: the k best units are set to a baseline
   (zero, a mean, another prompt's values), all of them together; or, with `keep`, all units of the
   model's but these k.
2. Measured: log p of the answer's first token (natural log), and whether it is still what the model
   says.
3. Beside the rankings, `seeds` random orders of all units of the model. A ranking that finds what
   the model uses loses the answer with few units; a random order needs very many.
4. Areas under these curves. Of what is kept, f(k) = (y(k) - y(0)) / (y(all) - y(0)); CPR is the
   area under f over the share of units kept, CMD that between f and 1. Source: MIB
   (arXiv 2504.13151), section 4."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qv_lens.errors import ConfigError, check_count, check_counts, check_seed
from qv_lens.evaluation.intervals import UNBOUNDED, interval
from qv_lens.facts.records import Fact
from qv_lens.facts.spans import Positions, Prompt
from qv_lens.models.backend import Past
from qv_lens.models.baselines import Baseline, baseline_name, baseline_values
from qv_lens.models.hooks import Hook
from qv_lens.models.interventions import check_units
from qv_lens.models.lens import Facts, Lens, as_list, check_lens, log_probs
from qv_lens.models.units import (
    UnitWithValue,
    random_neurons,
    site,
    units_in_layer,
    values_in_layer,
    values_of,
)
from qv_lens.neurons import NeuronSet
from qv_lens.progress import progress_bar

SIZES = (1, 3, 10, 30, 100, 300)
RANDOM = "random"
#: copies of a prompt in one pass, each without another set of units
ROWS = 64
COLUMNS = (
    "ranking", "seed", "prompt", "kept", "k", "logprob", "clean", "emptied", "known", "right", "said",
)  # fmt: skip

Unit = tuple[int, int]


@dataclass(frozen=True)
class _Selection:
    """One set of units to take out of one prompt, or to keep in it."""

    ranking: str
    seed: int
    k: int
    units: tuple[Unit, ...]


@torch.no_grad()
def faithfulness(
    lens: Lens,
    facts: Facts,
    rankings: Mapping[str, NeuronSet],
    sizes: Sequence[int] = SIZES,
    *,
    keep: bool = False,
    baseline: Baseline = "zero",
    positions: Positions = "last",
    seeds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """What is left of each answer: `ranking, seed, prompt, kept, k, logprob, clean, emptied, known,
    right, said`, one row per set taken out (or kept).

    `rankings`: units of one kind by name (FFN neurons, attention channels or heads), best first;
    rows of a prompt serve the fact with that number, rows of prompt -1 (`over="set"`, `union()`)
    every fact. A size beyond a ranking's length is left out.
    `keep`: all units of that kind but the k best are taken out, instead of the k best.
    `baseline`: what is taken out is set to it (see `neuron_effects`). `positions`: at one
    token of each prompt (a name, 'subject_last', or an index), or at 'all'.
    `logprob`, `clean` and `emptied`: log p of the answer's first token (nats) in this pass, with
    nothing taken out, and with all units taken out; `right`: whether that token is still the
    likeliest, `known`: whether it is with nothing taken out; `said`: the likeliest token.
    `seeds`: random orders, drawn by `seed`.

    Raises `ConfigError` for units that this model does not have, a size below 1, or a ranking
    without units for a fact, or of units at another token than they are taken out at.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> value = qv.value_neurons(lens, fact)
    >>> frame = qv.faithfulness(lens, fact, {"Eq. 9": value}, sizes=(1, 3), seeds=1)
    >>> frame.groupby("ranking")["right"].all().to_dict()  # neither loses the answer
    {'Eq. 9': True, 'random': True}
    """
    check_lens(lens)
    records, sizes, seed = as_list(facts), check_counts("sizes", sizes), check_seed(seed)
    unit = _check(lens, records, rankings, sizes, seeds, positions)
    places = lens.rows(records, positions)
    prompts = places.prompts
    if positions != "all":
        at = places.positions.tolist()
        for name, neurons in rankings.items():
            _check_origin(name, neurons, prompts, at)
    lens.warn_of_fragments([each.text for each in prompts], [each.answer[0] for each in prompts])
    outside = baseline_values(lens, places, baseline, positions, unit)
    rows = []
    for i, prompt in enumerate(progress_bar(prompts, of="removal", unit="prompt")):
        selections = list(
            _selections(lens, rankings, sorted(set(sizes)), seeds, seed, records[i], i, unit)
        )
        place = _Place(lens, unit, prompt, places.positions[places.prompt == i])
        values = outside[:, places.prompt == i]
        out = [place.out(selection.units, keep) for selection in selections]
        everything = torch.ones_like(place.out((), False))
        logp = place.logp([~everything, everything, *out], values)
        answer = prompt.answer[0]
        clean, emptied = (float(row[answer]) for row in logp[:2])
        known = int(logp[0].argmax()) == answer
        for selection, row in zip(selections, logp[2:], strict=True):
            best = int(row.argmax())
            measured = float(row[answer]), clean, emptied, known, best == answer
            which = selection.ranking, selection.seed, i, keep, selection.k
            rows.append((*which, *measured, lens.token_label(best)))
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.attrs.update(
        {
            **lens.label,
            "texts": [prompt.text for prompt in prompts],
            "seed": seed,
            "unit": unit,
            "units": lens.n_layers * units_in_layer(lens, unit),
            "baseline": baseline_name(baseline),
            "positions": positions if isinstance(positions, str) else int(positions),
        }
    )
    return frame


def lost_at(frame: pd.DataFrame) -> pd.DataFrame:
    """The least k at which the answer is no longer what the model says: `ranking, seed, prompt, k`
    (NaN: it always is, or was not to begin with)."""
    keys = ["ranking", "seed", "prompt"]
    lost = frame[frame["known"] & ~frame["right"]].groupby(keys, sort=False)["k"].min()
    every = frame.drop_duplicates(keys).set_index(keys).index
    return lost.reindex(every).reset_index()


def areas(frame: pd.DataFrame) -> pd.DataFrame:
    """The area under each curve of `faithfulness`: `ranking, kept, prompts, area, low, high` and,
    of what is kept, `cpr, cmd`; means over prompts (and seeds) with a 95% interval.

    `area`: log p beside the clean one (nats), averaged over log k between the smallest and the
    largest k: the lower, the more was lost. `cpr`, `cmd`: of f over the share of units kept, from
    none to all (1 and 0 are perfect), a straight line from the largest k on; warns where that is most
    of it. Raises `ConfigError` for a frame without its attrs, or of
    several calls.
    """
    _check_one_call(frame)
    _warn_of_lines(frame)
    records = []
    for (ranking, kept), part in frame.groupby(["ranking", "kept"], sort=False):
        of_prompt: dict[int, list[float]] = {}
        shares = []
        for (prompt, _), curve in part.groupby(["prompt", "seed"], sort=False):
            of_prompt.setdefault(int(prompt), []).append(_area(curve))
            if kept:
                shares.append(_shares(curve, frame.attrs["units"]))
        values = [float(np.mean(orders)) for orders in of_prompt.values()]
        low, high = interval(values, UNBOUNDED)
        cpr, cmd = np.mean(shares, axis=0) if shares else (np.nan, np.nan)
        row = {"ranking": ranking, "kept": kept, "prompts": len(values), "area": np.mean(values)}
        records.append({**row, "low": low, "high": high, "cpr": cpr, "cmd": cmd})
    table = pd.DataFrame(records)
    table.attrs.update(frame.attrs)
    return table


def _check_one_call(frame: pd.DataFrame) -> None:
    """Raise `ConfigError` for frames put together, whose prompts have the same numbers, and for one
    that has lost what `faithfulness` wrote on it."""
    curve = ["ranking", "kept", "prompt", "seed", "k"]
    without = frame["kept"].any() and "units" not in frame.attrs
    if without or frame.duplicated(curve).any():
        raise ConfigError(
            "areas takes the frame of one call of faithfulness, as it gave it (a join drops its "
            ".attrs and gives two prompts one number): ask for all facts in one call."
        )


def _warn_of_lines(frame: pd.DataFrame) -> None:
    """Warn of CPR and CMD that nobody measured."""
    largest = frame.loc[frame["kept"], "k"].max()
    if largest < frame.attrs.get("units", 0) / 2:
        units = frame.attrs["units"]
        warnings.warn(
            f"CPR and CMD are areas from no unit to all {units}, and the largest set kept has "
            f"{largest}: the rest is drawn as a straight line. Ask faithfulness for sizes up to {units}.",
            stacklevel=3,
        )


def _area(curve: pd.DataFrame) -> float:
    """log p beside the clean one, averaged over log k."""
    curve = curve.sort_values("k")
    change = (curve["logprob"] - curve["clean"]).to_numpy()
    place = np.log(curve["k"].to_numpy(float))
    if len(place) == 1:
        return float(change[0])
    return float(np.trapezoid(change, place) / (place[-1] - place[0]))


def _shares(curve: pd.DataFrame, units: int) -> tuple[float, float]:
    """CPR and CMD of one curve."""
    curve = curve.sort_values("k")
    share = np.concatenate([[0.0], curve["k"].to_numpy(float) / units, [1.0]])
    whole = (curve["clean"] - curve["emptied"]).to_numpy()
    f = np.concatenate([[0.0], (curve["logprob"] - curve["emptied"]).to_numpy() / whole, [1.0]])
    return float(np.trapezoid(f, share)), float(np.trapezoid(np.abs(1 - f), share))


def _check(
    lens: Lens,
    records: list,
    rankings: Mapping[str, NeuronSet],
    sizes: tuple[int, ...],
    seeds: int,
    positions: Positions,
) -> UnitWithValue:
    """The one kind of unit that is taken out."""
    for record in records:
        if not isinstance(record, Fact):
            raise ConfigError(
                "Faithfulness is measured on an answer: pass qv.Fact(prompt, subject, answer), got "
                f"the text {record!r:.80}."
            )
    check_count("seeds", seeds, 0)
    if positions == "answer":
        raise ConfigError(
            "Units are taken out of the prompt, in front of the answer: positions is a token of it, "
            "'last', 'subject_last', an index, or 'all'."
        )
    if not isinstance(rankings, Mapping):
        raise ConfigError(
            "rankings are neurons by name, {'Eq. 9': qv.value_neurons(lens, facts)}; got "
            f"{rankings!r:.80}."
        )
    if not sizes:
        raise ConfigError("sizes are how many neurons are taken out: name at least one.")
    if not rankings and not seeds:
        raise ConfigError("There is nothing to take out: pass rankings, or seeds.")
    for name, neurons in rankings.items():
        if name == RANDOM:
            raise ConfigError(
                f"The name {RANDOM!r} is that of the random orders: call your ranking something "
                "else."
            )
        check_units(lens, neurons)
        missing = [i for i, fact in enumerate(records) if neurons.about(fact, i).frame.empty]
        if missing:
            raise ConfigError(
                f"The ranking {name!r} holds no neurons for fact {missing[0]}, "
                f"{records[missing[0]].text!r:.200}: rank all of the facts, or pass a ranking that "
                "serves every fact (over='set', or .union())."
            )
    kinds = list(dict.fromkeys(neurons.unit for neurons in rankings.values())) or ["ffn"]
    if len(kinds) > 1:
        raise ConfigError(
            f"The rankings are of several kinds of unit ({', '.join(kinds)}): compare one kind at "
            "a time."
        )
    return cast("UnitWithValue", kinds[0])


def _check_origin(
    name: str, neurons: NeuronSet, prompts: Sequence[Prompt], at: Sequence[int]
) -> None:
    """Raise `ConfigError` for neurons of single prompts that were ranked at another token than they
    are taken `at`, or for other prompts."""
    own = neurons.frame["prompt"] >= 0
    if not own.any():
        return
    texts, positions = neurons.settings.get("texts"), neurons.settings.get("positions")
    wanted = [prompt.text for prompt in prompts]
    if texts is not None and list(texts)[: len(wanted)] != wanted:
        raise ConfigError(
            f"The ranking {name!r} was computed for {list(texts)[:2]!r}, asked are {wanted[:2]!r}: "
            "rank these facts, in this order, or pass a ranking that serves every fact "
            "(over='set', or .union())."
        )
    if "position" in neurons.frame:
        frame = neurons.frame[own]
        ranked = sorted({int(token) for token in frame["position"]})
        elsewhere = any(
            prompt < len(at) and token != at[prompt]
            for prompt, token in zip(frame["prompt"], frame["position"], strict=True)
        )
    else:
        one_each = positions is not None and len(positions) == len(texts or ())
        ranked = list(positions or ())
        elsewhere = one_each and ranked[: len(at)] != list(at)
    if elsewhere:
        raise ConfigError(
            f"The ranking {name!r} is of neurons at tokens {ranked}, and they are taken out at "
            f"{list(at)}: give both the same positions=, take them out at positions='all', or pass "
            "the ranking's .union()."
        )


def _selections(
    lens: Lens,
    rankings: Mapping[str, NeuronSet],
    sizes: Sequence[int],
    seeds: int,
    seed: int,
    fact: Fact | str,
    prompt: int,
    unit: UnitWithValue,
) -> Iterator[_Selection]:
    """Every set to take out of one prompt, or to keep in it."""
    for name, neurons in rankings.items():
        own = neurons.about(fact, prompt)
        units = replace(own, frame=own.best_first()).units
        for k in sizes:
            if k <= len(units):
                yield _Selection(name, 0, k, tuple(units[:k]))
    largest = min(max(sizes), lens.n_layers * units_in_layer(lens, unit))
    for draw in range(seeds):
        rng = random.Random(f"{RANDOM}:{seed}:{draw}:{prompt}")
        units = random_neurons(lens, largest, rng, unit).units
        for k in sizes:
            if k <= largest:
                yield _Selection(RANDOM, draw, k, tuple(units[:k]))


@dataclass(frozen=True)
class _Place:
    """Where units are taken out: their kind, the prompt, and the positions in it."""

    lens: Lens
    unit: UnitWithValue
    prompt: Prompt
    positions: Tensor

    def out(self, units: Sequence[Unit], keep: bool) -> Bool[Tensor, "layer value"]:
        """Which values are taken out: those of the units, or all others."""
        lens = self.lens
        shape = lens.n_layers, values_in_layer(lens, self.unit)
        chosen = torch.zeros(shape, dtype=torch.bool, device=lens.device)
        by_layer: dict[int, list[int]] = {}
        for layer, neuron in units:
            by_layer.setdefault(layer, []).append(neuron)
        for layer, neurons in by_layer.items():
            chosen[layer, values_of(lens, self.unit, neurons)] = True
        return ~chosen if keep else chosen

    def logp(
        self,
        out: Sequence[Bool[Tensor, "layer value"]],
        outside: Float[Tensor, "layer position value"],
    ) -> Float[Tensor, "set d_vocab"]:
        """log p of every token after the prompt, the values of each set at `outside`."""
        tail = self._tail()
        at = self.positions if tail is None else torch.zeros_like(self.positions)
        parts = []
        for begin in range(0, len(out), ROWS):
            masks = torch.stack(list(out[begin : begin + ROWS]))
            hooks = [
                (site(self.lens, self.unit, layer), _hook(masks[:, layer], outside[layer], at))
                for layer in range(self.lens.n_layers)
                if masks[:, layer].any()
            ]
            stream = self._stream(len(masks), hooks, tail)
            parts.append(log_probs(self.lens.read_out(stream)))
        return torch.cat(parts)

    def _tail(self) -> tuple[Tensor, Past] | None:
        """The last token's stream in front of layer 0, and what the tokens before it leave: where
        only the last token changes, the others run once. None where that is not possible."""
        last = self.prompt.last
        if last == 0 or self.positions.tolist() != [last]:
            return None
        stream = self.lens.stream([self.prompt.ids], 0)
        past = self.lens.past((0, stream), torch.tensor([last], device=stream.device))
        return None if past is None else (stream[:, last:], past)

    def _stream(
        self, rows: int, hooks: Sequence[Hook], tail: tuple[Tensor, Past] | None
    ) -> Float[Tensor, "set d_model"]:
        """The final stream at the last token, in `rows` copies of the prompt."""
        lens = self.lens
        if tail is None:
            ids = [self.prompt.ids] * rows
            return lens.stream(ids, lens.n_layers, hooks)[:, self.prompt.last]
        stream, past = tail
        copies = torch.zeros(rows, dtype=torch.long, device=stream.device)
        start = 0, stream[copies]
        ids = [self.prompt.ids[-1:]] * rows
        return lens.stream(ids, lens.n_layers, hooks, start, past.rows(copies))[:, 0]


def _hook(
    out: Bool[Tensor, "set value"],
    outside: Float[Tensor, "position value"],
    at: Int[Tensor, " position"],
) -> Callable[[Tensor], Tensor]:
    def hook(values: Tensor) -> Tensor:
        here = values[:, at].flatten(2)
        here = torch.where(out[:, None], outside.to(values.dtype), here)
        changed = values.clone()
        changed[:, at] = here.unflatten(2, values.shape[2:])
        return changed

    return hook
