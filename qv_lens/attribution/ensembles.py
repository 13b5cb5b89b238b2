"""KNE's neuronal ensembles (section 3, Eq. 4-7).

1. Scale a weight matrix of one layer by i/m, i = 1..m, all of it jointly, and take the gradient of
   sum_j P(y*_j | x, y*_<j).
2. Attr(w_k) = w_k/m * sum_i gradient at (i/m) w, summed over the entries of neuron k: a row of the
   stored (Hugging Face) matrix, which is a column here. Mean over the facts.
3. The ensemble is what lies above one quantile over all layers and matrices (Eq. 6, 7)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from numbers import Real
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.errors import ConfigError, check_count, several, unknown
from qv_lens.facts.records import Fact, Records, asked_facts
from qv_lens.models.deltas import Added, delta_hooks, zeros_like_parameters
from qv_lens.models.lens import Lens, check_lens
from qv_lens.models.norms import enlarged
from qv_lens.neurons import NeuronSet
from qv_lens.progress import progress_bar

#: token rows in one pass along a path of weights
ROWS = 64

Reduce = Literal["sum", "norm"]


def neuron_ensemble(
    lens: Lens,
    records: Records,
    share: float = 0.01,
    *,
    parameters: Sequence[str] = ("W_out",),
    axis: Literal["column", "row"] = "column",
    reduce: Reduce = "sum",
    steps: int = 20,
    together: bool = False,
) -> NeuronSet:
    """KNE's ensemble: the neurons above the 1 - `share` quantile of Attr over all layers (Eq. 4-7),
    unit e.g. 'w_out_column'.

    `records`: an EditRequest counts with its new answer, a Fact with its answer.
    `parameters`: names of `Lens.parameter`.
    `axis`: 'column' is KNE's neuron (a row of the stored matrix), 'row' KN's (W_out alone: FFN
    neurons).
    `reduce`: a neuron's entries summed, or their norm. `together` scales all layers at once
    (`steps` passes instead of one sweep per layer). Scores are probabilities, not nats.
    `settings["threshold"]` is t_p. The weights are scaled in passing: in a bf16 model the small
    steps round with it (up to a tenth of a score on tiny models); load in float32 for exact ones.
    Raises `ConfigError` for a share outside (0, 1], an unknown parameter or axis.
    """
    check_lens(lens)
    parameters = _names(parameters)
    _check_ensemble(share, parameters, axis, reduce, steps)
    facts = asked_facts(records)
    names = [(layer, name) for name in parameters for layer in range(lens.n_layers)]
    groups = [names] if together else [[name] for name in names]
    attributions: dict[tuple[int, str], Tensor] = {}
    for group in progress_bar(groups, of="neuron ensemble", unit="matrix"):
        attributions |= weight_attributions(lens, facts, group, steps)
    frames = []
    for (layer, name), entries in attributions.items():
        along = entries.sum if reduce == "sum" else entries.norm
        score = along(dim=1 if axis == "row" else 0)
        columns = {
            "prompt": -1,
            "unit": "ffn" if axis == "row" else f"{name.lower()}_column",
            "layer": layer,
            "neuron": range(len(score)),
            "coefficient": float("nan"),
            "score": score.cpu().numpy(),
        }
        frames.append(pd.DataFrame(columns))
    frame = pd.concat(frames, ignore_index=True)
    if not frame["score"].any():
        raise ConfigError(
            "Every attribution is 0: the answers' probability is too small to be told from 0, or "
            "nothing of these weights reaches it. Choose another answer, or other parameters."
        )
    threshold = float(frame["score"].quantile(1 - share))  # t_p (Eq. 6)
    frame = _at_least_threshold(frame, share)
    settings = {
        **lens.label,
        "method": "integrated gradients of weights",
        "share": share,
        "threshold": threshold,
        "parameters": list(parameters),
        "axis": axis,
        "reduce": reduce,
        "steps": steps,
        "together": together,
    }
    return NeuronSet(frame, settings)


def _at_least_threshold(frame: pd.DataFrame, share: float) -> pd.DataFrame:
    """Eq. 7: the neurons with Attr >= t_p, the 1 - `share` quantile of all; best first. Of those
    equal to t_p (the readers of dead neurons, all 0) only the first, as many as the share allows.

    t_p lies at a place among the ordered scores, between two of them: from the next one on they are
    at least t_p. Its own value would have rounding decide."""
    ordered = frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)
    below = ceil((len(frame) - 1) * (1 - share) - 1e-9)
    return ordered.head(len(frame) - below)


def _names(parameters: Sequence[str]) -> tuple[str, ...]:
    """The parameters' names, read once. Raises `ConfigError` for none, or one alone."""
    names = several(parameters)
    if not names:
        raise ConfigError(
            "parameters are the weights to take neurons from, ('W_out',) or more, got "
            f"{parameters!r:.80}."
        )
    return names


def _check_ensemble(
    share: float, parameters: Sequence[str], axis: str, reduce: str, steps: int
) -> None:
    """Raise `ConfigError` for options that `neuron_ensemble` does not take."""
    if not isinstance(share, Real) or not 0 < share <= 1:
        raise ConfigError(
            f"share is a fraction of the neurons, above 0 and at most 1; got {share!r}."
        )
    check_count("steps", steps)
    vectors = [name for name in parameters if not str(name).startswith("W_")]
    if vectors:
        raise ConfigError(
            f"{vectors[0]!r} is not a weight matrix: a neuron of KNE is a column of W_out, W_in, "
            "W_gate, W_O, W_Q, W_K or W_V."
        )
    if axis not in ("column", "row"):
        raise unknown("Axis", axis, ("column", "row"))
    if axis == "row" and tuple(parameters) != ("W_out",):
        raise ConfigError(
            "axis='row' means FFN neurons, rows of W_out: use it with parameters=('W_out',)."
        )
    if reduce not in ("sum", "norm"):
        raise unknown("Reduction", reduce, ("sum", "norm"))


def weight_attributions(
    lens: Lens, facts: Sequence[Fact], names: list[tuple[int, str]], steps: int = 20
) -> dict[tuple[int, str], Tensor]:
    """w/m sum_i dP/dw at (i/m) w for every entry of the named weights, scaled together, mean over
    the facts (Eq. 5).

    The m scales run side by side as copies of the facts' rows, from the lowest named layer on:
    below it nothing changes."""
    prompts, first = lens.tokenize(list(facts)), min(layer for layer, _ in names)
    with torch.no_grad():
        below = lens.stream(
            [prompt.row("answer") for prompt in prompts],
            first,
            last=[prompt.last for prompt in prompts],
        )
    total, together = {name: torch.zeros(()) for name in names}, max(1, ROWS // len(prompts))
    for begin in range(0, steps, together):
        shares = (
            torch.arange(begin + 1, min(begin + together, steps) + 1, device=lens.device) / steps
        )
        # one for all copies: its gradient is the sum over them
        leaves = zeros_like_parameters(lens, names)
        added: dict[tuple[int, str], Added] = {
            name: _rescaled(lens.parameter(*name), leaf, shares.repeat_interleave(len(prompts)))
            for name, leaf in leaves.items()
        }
        with torch.enable_grad():
            start = first, below.repeat(len(shares), 1, 1)
            logp = lens.answer_logprobs(prompts * len(shares), delta_hooks(lens, added), start)
            # dP = P dlog P: the gradient of a small P, or of one near 1, lies below float16's range
            p = logp.detach().exp()
            size = (p / enlarged(logp)).max().clamp_min(torch.finfo(p.dtype).tiny)
            gradients = torch.autograd.grad((p / size * logp).sum(), list(leaves.values()))
        for name, gradient in zip(names, gradients, strict=True):
            total[name] = total[name].to(gradient.device) + gradient * (size / len(prompts))
    return {
        (layer, name): lens.parameter(layer, name).to(g.dtype) * g / steps
        for (layer, name), g in total.items()
    }


def _rescaled(weight: Tensor, leaf: Tensor, shares: Float[Tensor, " row"]) -> Added:
    """What turns W into share * W + leaf, each row by its own share."""
    weight, less = weight.to(leaf.dtype), (shares.to(leaf.dtype) - 1)[:, None, None]

    def add(x: Tensor) -> Tensor:
        x = x.to(leaf.dtype)
        return (x @ weight) * less + x @ leaf

    return add
