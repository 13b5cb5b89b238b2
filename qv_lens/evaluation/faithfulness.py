"""Faithfulness of a ranking: what the answer loses when its best k neurons are taken out, for
growing k.

1. For each fact, ranking and k: the k best neurons are set to zero at the prompt's last token, all
   of them together, in a real forward pass.
2. Measured: log p of the answer's first token (natural log), and whether it is still what the model
   says.
3. Beside the rankings, `seeds` random orders of all FFN neurons of the model. A ranking that finds
   what the model uses loses the answer with few neurons; a random order needs very many."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from qv_lens.errors import ConfigError
from qv_lens.facts.records import Fact
from qv_lens.facts.spans import Prompt
from qv_lens.models.backend import Hook
from qv_lens.models.interventions import check_ffn
from qv_lens.models.lens import Facts, Lens, as_list, log_probs
from qv_lens.models.units import random_neurons
from qv_lens.neurons import NeuronSet

SIZES = (1, 3, 10, 30, 100, 300)
RANDOM = "random"
#: copies of a prompt in one pass, each without another set of neurons
ROWS = 64
COLUMNS = ("ranking", "seed", "prompt", "k", "logprob", "clean", "known", "right", "said")

Unit = tuple[int, int]


@dataclass(frozen=True)
class _Removal:
    """One set of neurons to take out of one prompt."""

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
    seeds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """What is left of each answer: `ranking, seed, prompt, k, logprob, clean, known, right, said`,
    one row per set taken out.

    `rankings`: FFN neurons by name, best first; rows of a prompt serve the fact with that number,
    rows of prompt -1 (`over="set"`, `union()`) every fact. A size beyond a ranking's length is left
    out.
    `logprob` and `clean`: log p of the answer's first token without and with them (nats); `right`:
    whether that token is still the likeliest, `known`: whether it is with nothing taken out;
    `said`: the likeliest token.
    `seeds`: random orders, drawn by `seed`.

    Raises `ConfigError` for what is no FFN neuron of this model, a size below 1, or a ranking
    without neurons for a fact.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> value = qv.value_neurons(lens, fact)
    >>> frame = qv.faithfulness(lens, fact, {"Eq. 9": value}, sizes=(1, 3), seeds=1)
    >>> frame.groupby("ranking")["right"].all().to_dict()  # neither loses the answer
    {'Eq. 9': True, 'random': True}
    """
    records = as_list(facts)
    _check(lens, records, rankings, sizes, seeds)
    prompts = lens.tokenize(records)
    for name, neurons in rankings.items():
        _check_origin(name, neurons, prompts)
    rows = []
    for i, prompt in enumerate(tqdm(prompts, desc="removal", unit="prompt", delay=2, leave=False)):
        removals = list(_removals(lens, rankings, sorted(set(sizes)), seeds, seed, i))
        logp = _without(lens, prompt, [(), *(removal.units for removal in removals)])
        answer = prompt.answer[0]
        clean = float(logp[0, answer])
        known = int(logp[0].argmax()) == answer
        for removal, row in zip(removals, logp[1:], strict=True):
            best = int(row.argmax())
            measured = (float(row[answer]), clean, known, best == answer, lens.token_label(best))
            rows.append((removal.ranking, removal.seed, i, removal.k, *measured))
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.attrs.update({**lens.label, "texts": [prompt.text for prompt in prompts], "seed": seed})
    return frame


def lost_at(frame: pd.DataFrame) -> pd.DataFrame:
    """The least k at which the answer is no longer what the model says: `ranking, seed, prompt, k`
    (NaN: it always is, or was not to begin with)."""
    keys = ["ranking", "seed", "prompt"]
    lost = frame[frame["known"] & ~frame["right"]].groupby(keys, sort=False)["k"].min()
    every = frame.drop_duplicates(keys).set_index(keys).index
    return lost.reindex(every).reset_index()


def _check(
    lens: Lens, records: list, rankings: Mapping[str, NeuronSet], sizes: Sequence[int], seeds: int
) -> None:
    for record in records:
        if not isinstance(record, Fact):
            raise ConfigError(
                f"Faithfulness is measured on an answer: pass facts, got the text {record!r:.80}."
            )
    if not sizes or min(sizes) < 1 or seeds < 0:
        raise ConfigError(
            "sizes are numbers of neurons, each at least 1, and seeds at least 0; got "
            f"{list(sizes)} and {seeds}."
        )
    if not rankings and not seeds:
        raise ConfigError("There is nothing to take out: pass rankings, or seeds.")
    for name, neurons in rankings.items():
        if name == RANDOM:
            raise ConfigError(
                f"The name {RANDOM!r} is that of the random orders: call your ranking something "
                "else."
            )
        check_ffn(lens, neurons)
        prompts = set(neurons.frame["prompt"])
        missing = [i for i in range(len(records)) if i not in prompts and -1 not in prompts]
        if missing:
            raise ConfigError(
                f"The ranking {name!r} holds no neurons for fact {missing[0]}, "
                f"{records[missing[0]].text!r}: rank all of the facts, or pass a ranking that "
                "serves every fact (over='set', or .union())."
            )


def _check_origin(name: str, neurons: NeuronSet, prompts: Sequence[Prompt]) -> None:
    """Raise `ConfigError` for neurons of single prompts that were ranked elsewhere than at the last
    token, or for other prompts."""
    own = neurons.frame["prompt"] >= 0
    if not own.any():
        return
    texts, positions = neurons.settings.get("texts"), neurons.settings.get("positions")
    asked = [prompt.text for prompt in prompts]
    if texts is not None and list(texts)[: len(asked)] != asked:
        raise ConfigError(
            f"The ranking {name!r} was computed for {list(texts)[:2]!r}, asked are {asked[:2]!r}: "
            "rank these facts, in this order, or pass a ranking that serves every fact "
            "(over='set', or .union())."
        )
    last = [prompt.last for prompt in prompts]
    if (
        positions is not None
        and len(positions) == len(texts or ())
        and list(positions)[: len(last)] != last
    ):
        raise ConfigError(
            f"The ranking {name!r} is of neurons at tokens {list(positions)}, and they are taken "
            f"out at the last ones, {last}: rank with positions='last', or pass the ranking's "
            ".union()."
        )


def _removals(
    lens: Lens,
    rankings: Mapping[str, NeuronSet],
    sizes: Sequence[int],
    seeds: int,
    seed: int,
    prompt: int,
) -> Iterator[_Removal]:
    """Every set to take out of one prompt."""
    for name, neurons in rankings.items():
        own = neurons.where(lambda frame: frame["prompt"].isin([prompt, -1]))
        units = replace(own, frame=own.best_first()).units
        for k in sizes:
            if k <= len(units):
                yield _Removal(name, 0, k, tuple(units[:k]))
    largest = min(max(sizes), lens.n_layers * lens.d_mlp)
    for draw in range(seeds):
        units = random_neurons(
            lens, largest, random.Random(f"{RANDOM}:{seed}:{draw}:{prompt}")
        ).units
        for k in sizes:
            if k <= largest:
                yield _Removal(RANDOM, draw, k, tuple(units[:k]))


def _without(lens: Lens, prompt: Prompt, sets: Sequence[Sequence[Unit]]) -> Tensor:
    """log p of every token after the prompt, [set, d_vocab], each set of neurons zero at its last
    token."""
    parts = []
    for begin in range(0, len(sets), ROWS):
        chunk = sets[begin : begin + ROWS]
        hooks = list(_hooks(lens, prompt.last, chunk))
        stream = lens.stream([prompt.ids] * len(chunk), lens.n_layers, hooks)
        parts.append(log_probs(lens.read_out(stream[:, prompt.last])))
    return torch.cat(parts)


def _hooks(lens: Lens, last: int, sets: Sequence[Sequence[Unit]]) -> Iterator[Hook]:
    by_layer: dict[int, tuple[list[int], list[int]]] = {}
    for row, units in enumerate(sets):
        for layer, neuron in units:
            rows, neurons = by_layer.setdefault(layer, ([], []))
            rows.append(row)
            neurons.append(neuron)
    for layer, (rows, neurons) in sorted(by_layer.items()):
        yield lens.backend_adapter.coefficient(layer), _zeroing(rows, last, neurons)


def _zeroing(rows: list[int], last: int, neurons: list[int]) -> Callable[[Tensor], Tensor]:
    def zero(m: Tensor) -> Tensor:
        out = m.clone()
        out[rows, last, neurons] = 0
        return out

    return zero
