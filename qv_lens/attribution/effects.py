"""What a model loses without a neuron: s = m dy/dm, gradient times activation.

1. y is the log-probability of what is asked for at the prompt's end (natural log; a contrast: the
   difference of two).
2. One forward and one backward pass give dy/dm of every FFN neuron at the rows' positions, in all
   layers at once.
3. s = m dy/dm: to first order what y loses when the neuron is set to zero there, everything after
   it free to react.
4. In rounds: the best neurons are taken out of the pass (masked, so that no gradient goes through
   them either) and all others asked again without them, until enough are found. The loss without a
   set is not the sum of the losses without each neuron, so a ranking in rounds says more about
   sets.

Unlike Eq. 9, which reads a neuron's vector out where it is written, s counts what later layers make
of it. Source: attribution patching (Nanda 2023) against zero; Molchanov et al. (2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qv_lens.attribution.setting import Over, Setting, Target, TraceRows, check_over, setting
from qv_lens.attribution.value import check_top, grouped, ranked
from qv_lens.errors import ConfigError
from qv_lens.facts.spans import Positions
from qv_lens.models.lens import Facts, Lens, at_least_float32, log_probs
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace

#: prompts in one pass, which holds the activations of every layer for the gradient
TOGETHER = 16


def neuron_effects(
    lens: Lens,
    facts: Facts | Trace,
    top: int | None = 300,
    *,
    over: Over = "prompt",
    target: Target = "answer",
    positions: Positions = "last",
    rounds: int = 1,
) -> NeuronSet:
    """FFN neurons by what the answer loses without them, in nats: a positive score supports the
    answer.

    `top`: how many per prompt (None: all). `over='set'` adds the prompts up.
    `target`: as for `value_neurons`; it is read at the prompt's end (a whole answer: token by token
    from there).
    `positions`: where the neurons are taken out ('all': a ranking for each token). Of a Trace only
    its facts are used.
    `rounds`: in how many passes the `top` neurons are found, each pass without the neurons found
    before; the column `round` says in which one. The scores of a round are those of the model
    without the earlier rounds' neurons; sets keep the order of the rounds.
    Raises `ConfigError` for an unknown target or way to add up, or a trace of other weights,
    `FactError` for prompts that do not tokenise.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> qv.neuron_effects(lens, fact, 3).units
    [(4, 148), (11, 414), (2, 297)]
    """
    check_top(top)
    check_over(over)
    records = lens.traced(facts).facts if isinstance(facts, Trace) else facts
    if positions == "answer" and target != "sequence":
        raise ConfigError(
            "positions='answer' takes neurons at every token of the answer: it goes with "
            "target='sequence'."
        )
    sizes = _sizes(top, rounds)
    task = setting(lens, records, target=target)
    trace = task.trace if positions == "last" else lens.trace(task.trace.facts, positions)
    rows = TraceRows(lens, trace, task.sequence)
    groups = rows.groups(over).to(trace.m.device)
    count = torch.bincount(groups)[:, None]
    settings = {
        **task.attrs,
        "positions": trace.positions.tolist(),
        "method": "gradient",
        "over": over,
        "rounds": rounds,
    }
    taken = torch.zeros(
        lens.n_layers, len(count), lens.d_mlp, dtype=torch.bool, device=trace.m.device
    )
    found = []
    for number, size in enumerate(sizes):
        m, gradient = _activations_and_gradients(task, trace, ~taken[:, groups])
        scores = torch.stack([grouped(layer, groups) for layer in m * gradient])
        scores = scores.masked_fill(taken, -torch.inf)
        coefficients = torch.stack([grouped(layer, groups) / count for layer in m])
        found.append(ranked(rows, "ffn", scores, coefficients, size, settings, over))
        if len(sizes) > 1:
            found[-1] = replace(found[-1], frame=found[-1].frame.assign(round=number))
            taken |= _best(scores, size)
    return found[0] if len(found) == 1 else _joined(found)


def _sizes(top: int | None, rounds: int) -> list[int | None]:
    """How many neurons each round takes: as equal as can be, the earlier ones one more."""
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


def _best(scores: Float[Tensor, "layer group d_mlp"], size: int | None) -> Bool[Tensor, ...]:
    """A mask of the `size` best neurons of each group, as `ranked` takes them."""
    flat = rearrange(scores, "l g u -> g (l u)")
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :size]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
    return rearrange(mask, "g (l u) -> l g u", l=len(scores))


def _joined(found: Sequence[NeuronSet]) -> NeuronSet:
    """The rounds one after another, prompt by prompt."""
    frame = pd.concat([each.frame for each in found], ignore_index=True)
    frame = frame.sort_values(["prompt", "round"], kind="stable").reset_index(drop=True)
    return replace(found[0], frame=frame)


def _activations_and_gradients(
    task: Setting, trace: Trace, kept: Bool[Tensor, "layer row d_mlp"]
) -> tuple[Float[Tensor, "layer row d_mlp"], Float[Tensor, "layer row d_mlp"]]:
    """m and dy/dm at every row of the trace, in a pass without the neurons that are not `kept`."""
    parts = [
        _one_pass(task, trace, kept, begin) for begin in range(0, len(trace.prompts), TOGETHER)
    ]
    return torch.cat([m for m, _ in parts], dim=1), torch.cat([g for _, g in parts], dim=1)


def _one_pass(
    task: Setting, trace: Trace, kept: Bool[Tensor, "layer row d_mlp"], begin: int
) -> tuple[Float[Tensor, "layer row d_mlp"], Float[Tensor, "layer row d_mlp"]]:
    """m and dy/dm at the rows of `TOGETHER` prompts from `begin` on."""
    lens = task.lens
    prompts = trace.prompts[begin : begin + TOGETHER]
    read, asked = _places(task.trace, begin)
    at, rows = _places(trace, begin)
    dtype = task.readout.U.dtype
    shape = (len(rows), lens.d_mlp)
    leaves = [torch.zeros(shape, dtype=dtype, device=lens.device) for _ in range(lens.n_layers)]
    seen: list[Tensor] = []
    hooks = []
    for layer, leaf in enumerate(leaves):
        leaf.requires_grad_()
        site = lens.backend_adapter.coefficient(layer)
        hooks.append((site, _masked(leaf, at, kept[layer, rows], seen)))
    ids = [prompt.row("answer" if task.sequence else "last") for prompt in prompts]
    with torch.enable_grad():
        stream = lens.stream(ids, lens.n_layers, hooks, last=[prompt.last for prompt in prompts])
        logp = log_probs(lens.read_out(stream[read]))
        y = logp.gather(1, task.token[asked, None])
        if task.against is not None:
            y = y - logp.gather(1, task.against[asked, None])
        gradients = torch.autograd.grad(y.sum(), leaves)
    return torch.stack(seen), torch.stack(gradients)


def _places(trace: Trace, begin: int) -> tuple[tuple[Tensor, Tensor], Int[Tensor, " row"]]:
    """Where the rows of `TOGETHER` prompts from `begin` on stand in their pass (prompt, position),
    and which rows they are."""
    rows = ((begin <= trace.prompt) & (trace.prompt < begin + TOGETHER)).nonzero()[:, 0]
    return (trace.prompt[rows] - begin, trace.positions[rows]), rows


def _masked(
    leaf: Float[Tensor, "row d_mlp"],
    where: tuple[Tensor, Tensor],
    kept: Bool[Tensor, "row d_mlp"],
    seen: list[Tensor],
) -> Callable[[Tensor], Tensor]:
    """A hook that adds the rows of `leaf` at their places, takes out what is not `kept` there, and
    appends what is there to `seen`."""

    def hook(m: Tensor) -> Tensor:
        here = (m[where] + leaf.to(m.dtype)) * kept
        seen.append(at_least_float32(here.detach()))
        return m.index_put(where, here)

    return hook
