"""KN's integrated gradients (Dai et al., Knowledge Neurons in Pretrained Transformers, 2022).

1. Scale the activations m of one layer at the last token by i/steps, i = 1..steps, all of them
   jointly, and take the gradient of the answer's probability.
2. A neuron's score is m times the mean gradient. EasyEdit's rule scales what the non-linearity
   reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.attribution.ranking import check_top
from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.records import Fact, Records, asked_facts
from qv_lens.models.lens import Lens, Start, check_lens, log_probs
from qv_lens.models.norms import at_least_float32, enlarged
from qv_lens.neurons import NeuronSet
from qv_lens.progress import progress_bar

#: token rows in one pass along a path of activations
ROWS = 64

#: KN's attribution as its paper has it, or as EasyEdit runs it
IGRule = Literal["paper", "easyedit"]


@torch.no_grad()
def greedy_tokens(lens: Lens, fact: Fact, count: int) -> list[int]:
    """The model's own `count` likeliest tokens after a fact's prompt, one by one."""
    ids = list(lens.tokenize(fact)[0].ids)
    start = len(ids)
    for _ in range(count):
        logits = lens.logits_at([ids], [(0, len(ids) - 1)], last=[start - 1])
        ids.append(int(logits.argmax()))
    return ids[start:]


def integrated_gradients(
    lens: Lens, records: Records, top: int | None = 300, *, steps: int = 20, rule: IGRule = "paper"
) -> NeuronSet:
    """KN's attribution of FFN neurons: m_k/steps sum_i dP(answer)/dm_k at (i/steps) m, at the token
    that predicts.

    Each layer is scaled alone, all its neurons jointly. An answer of several tokens is teacher
    forced, token by token, and added up. Scores are probabilities. The `top` best of each prompt are
    kept (None: all). `records`: a request counts with its new answer. `steps`: points of the path.

    `rule='easyedit'`: what EasyEdit runs. It scales what the non-linearity reads (not m), on a grid
    from 0 to 1 with both ends; later tokens of an answer follow what the model itself would say,
    and the scores of all tokens of an answer are averaged.

    Raises `ConfigError` for an unknown rule, too few steps, `top` below 1, or no facts."""
    check_lens(lens)
    if rule not in ("paper", "easyedit"):
        raise unknown("Rule", rule, ("paper", "easyedit"))
    least = 2 if rule == "easyedit" else 1
    if steps < least:
        raise ConfigError(f"steps must be at least {least}, got {steps}.")
    check_top(top)
    facts = asked_facts(records)
    answers = _answer_rows(lens, facts, rule)
    grid = _shares(steps, rule)
    backend = lens.backend_adapter
    site_of = backend.coefficient if rule == "paper" else backend.pre
    count = torch.bincount(answers.owner)[:, None]
    frames = []
    start: Start | None = None
    layers = range(lens.n_layers)
    for layer in progress_bar(layers, of="integrated gradients", unit="layer"):
        site = site_of(layer)
        with torch.no_grad():  # scaling a layer changes nothing in front of it
            stream = lens.stream(answers.rows, layer, start=start, last=answers.ends)
            start = layer, stream
            value = _value_at(lens, answers, layer, site, start)
        gradient = _path_gradient(lens, answers, site, value, start, grid)
        score = answers.by_fact(value * gradient / steps, len(facts))
        if rule == "easyedit":
            score /= count
        coefficient = answers.by_fact(value, len(facts)) / count
        frames.append(_neurons_of_layer(layer, coefficient, score))
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.sort_values(["prompt", "score"], ascending=[True, False], kind="stable")
    settings = {"method": "integrated gradients", "steps": steps, "rule": rule}
    neurons = NeuronSet(frame.reset_index(drop=True), {**lens.label, **settings})
    return neurons if top is None else neurons.top(top)


@dataclass(frozen=True)
class _AnswerRows:
    """The answers' tokens, a row each: what is read before the token, teacher forced."""

    rows: list[tuple[int, ...]]
    """Token ids up to the one that predicts."""
    token: Int[Tensor, " row"]
    """The token whose probability is attributed."""
    owner: Int[Tensor, " row"]
    """Which fact it belongs to."""
    ends: list[int]
    """Where the fact's prompt ends."""
    last: Int[Tensor, " row"]
    """Where the row ends."""

    def by_fact(
        self, values: Float[Tensor, "row d_mlp"], facts: int
    ) -> Float[Tensor, "fact d_mlp"]:
        """Rows added up by fact."""
        sums = torch.zeros(facts, values.shape[1], dtype=values.dtype, device=values.device)
        return sums.index_add_(0, self.owner, values)


def _answer_rows(lens: Lens, facts: Sequence[Fact], rule: IGRule) -> _AnswerRows:
    """What is asked of each fact: its answer token by token, after its own tokens (or, as EasyEdit
    runs it, after those that the model itself would say)."""
    rows, tokens, owners, ends = [], [], [], []
    for owner, (fact, prompt) in enumerate(zip(facts, lens.tokenize(list(facts)), strict=True)):
        forced = prompt.answer
        if rule == "easyedit":
            forced = tuple(greedy_tokens(lens, fact, len(prompt.answer) - 1))
        for position in prompt.positions("answer"):
            place = position - prompt.last
            rows.append((*prompt.ids, *forced[:place]))
            tokens.append(prompt.answer[place])
            owners.append(owner)
            ends.append(prompt.last)
    last = [len(row) - 1 for row in rows]
    device = lens.device
    return _AnswerRows(
        rows,
        torch.tensor(tokens, device=device),
        torch.tensor(owners, device=device),
        ends,
        torch.tensor(last, device=device),
    )


def _shares(steps: int, rule: IGRule) -> Float[Tensor, " step"]:
    """The shares of its value at which a site is read: 1/m to 1, or (EasyEdit) 0 to 1."""
    if rule == "easyedit":
        return torch.linspace(0, 1, steps, dtype=torch.float64)
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps


def _neurons_of_layer(
    layer: int, coefficient: Float[Tensor, "fact d_mlp"], score: Float[Tensor, "fact d_mlp"]
) -> pd.DataFrame:
    """A row for each fact and neuron."""
    facts, width = score.shape
    return pd.DataFrame(
        {
            "prompt": np.repeat(np.arange(facts), width),
            "unit": "ffn",
            "layer": layer,
            "neuron": np.tile(np.arange(width), facts),
            "coefficient": coefficient.flatten().cpu().numpy(),
            "score": score.flatten().cpu().numpy(),
        }
    )


def _value_at(
    lens: Lens, answers: _AnswerRows, layer: int, site: str, start: Start
) -> Float[Tensor, "row d_mlp"]:
    """A site's value at each row's last token."""
    kept: list[Tensor] = []
    lens.stream(answers.rows, layer + 1, [(site, kept.append)], start, last=answers.ends)
    row = torch.arange(len(answers.rows), device=answers.last.device)
    return at_least_float32(kept[0][row, answers.last])


def _path_gradient(
    lens: Lens,
    answers: _AnswerRows,
    site: str,
    value: Float[Tensor, "row d_mlp"],
    start: Start,
    grid: Float[Tensor, " step"],
) -> Float[Tensor, "row d_mlp"]:
    """sum over the grid of dP(token)/dvalue where the site is set to a share of its value at each
    row's last token."""
    count = len(answers.rows)
    gradient = torch.zeros_like(value)
    together = max(1, ROWS // count)  # steps in one pass
    for shares in grid.to(value).split(together):
        copies = len(shares)
        with torch.enable_grad():
            leaf = (value * shares[:, None, None]).flatten(0, 1).requires_grad_(True)
            logp = _logprobs(lens, answers, site, leaf, start, copies)
            scale = enlarged(logp)
            (each,) = torch.autograd.grad((scale * logp).sum(), leaf)
        each *= (logp.detach().exp() / scale)[:, None]  # dP = P dlog P, as above
        gradient += each.unflatten(0, (copies, count)).sum(0)
    return gradient


def _logprobs(
    lens: Lens,
    answers: _AnswerRows,
    site: str,
    leaf: Float[Tensor, "copy_row d_mlp"],
    start: Start,
    copies: int,
) -> Float[Tensor, " copy_row"]:
    """log P(token) of every copy of the rows, the site set to `leaf` at its last token."""
    layer, stream = start
    last = answers.last.repeat(copies)
    row = torch.arange(len(leaf), device=leaf.device)

    def put(x: Tensor) -> Tensor:
        out = x.clone()
        out[row, last] = leaf.to(x.dtype)
        return out

    final = lens.stream(
        answers.rows * copies,
        lens.n_layers,
        [(site, put)],
        (layer, stream.repeat(copies, 1, 1)),
        last=answers.ends * copies,
    )
    return log_probs(lens.read_out(final[row, last]))[row, answers.token.repeat(copies)]
