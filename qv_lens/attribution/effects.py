"""What a model loses without a neuron: s = m dy/dm, gradient times activation.

1. y is the log-probability of what is asked for at the prompt's end (natural log; a contrast: the
   difference of two).
2. One forward and one backward pass give dy/dm of every FFN neuron at the rows' positions, in all
   layers at once.
3. s = m dy/dm: to first order what y loses when the neuron is set to zero there, everything after
   it free to react.

Unlike Eq. 9, which reads a neuron's vector out where it is written, s counts what later layers make
of it. Source: attribution patching (Nanda 2023) against zero; Molchanov et al. (2017)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.attribution.setting import Over, Setting, Target, TraceRows, check_over, setting
from qv_lens.attribution.value import check_top, grouped, ranked
from qv_lens.errors import ConfigError
from qv_lens.facts.spans import Positions
from qv_lens.models.lens import Facts, Lens, at_least_float32
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
) -> NeuronSet:
    """FFN neurons by what the answer loses without them, in nats: a positive score supports the
    answer.

    `top`: how many per prompt (None: all). `over='set'` adds the prompts up.
    `target`: as for `value_neurons`; it is read at the prompt's end (a whole answer: token by token
    from there).
    `positions`: where the neurons are taken out ('all': a ranking for each token). Of a Trace only
    its facts are used.
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
    task = setting(lens, records, target=target)
    trace = task.trace if positions == "last" else lens.trace(task.trace.facts, positions)
    rows = TraceRows(lens, trace, task.sequence)
    m = torch.stack([at_least_float32(layer) for layer in trace.m])
    scores = m * _gradients(task, trace)
    groups = rows.groups(over)
    by_group = torch.stack([grouped(layer, groups) for layer in scores])
    count = torch.bincount(groups).to(m.device)[:, None]
    coefficients = torch.stack([grouped(layer, groups) / count for layer in m])
    settings = {
        **task.attrs,
        "positions": trace.positions.tolist(),
        "method": "gradient",
        "over": over,
    }
    return ranked(rows, "ffn", by_group, coefficients, top, settings, over)


def _gradients(task: Setting, trace: Trace) -> Float[Tensor, "layer row d_mlp"]:
    """dy/dm at every row of the trace."""
    prompts = len(trace.prompts)
    return torch.cat(
        [_one_pass(task, trace, begin) for begin in range(0, prompts, TOGETHER)], dim=1
    )


def _one_pass(task: Setting, trace: Trace, begin: int) -> Float[Tensor, "layer row d_mlp"]:
    """dy/dm at the rows of `TOGETHER` prompts from `begin` on."""
    lens = task.lens
    prompts = trace.prompts[begin : begin + TOGETHER]
    read, asked = _places(task.trace, begin)
    at, rows = _places(trace, begin)
    dtype = task.readout.U.dtype
    leaves = [
        torch.zeros(len(rows), lens.d_mlp, dtype=dtype, device=lens.device)
        for _ in range(lens.n_layers)
    ]
    hooks = []
    for layer, leaf in enumerate(leaves):
        leaf.requires_grad_()
        hooks.append((lens.backend_adapter.coefficient(layer), _adding(leaf, at)))
    ids = [prompt.row("answer" if task.sequence else "last") for prompt in prompts]
    with torch.enable_grad():
        stream = lens.stream(ids, lens.n_layers, hooks, last=[prompt.last for prompt in prompts])
        logp = at_least_float32(lens.read_out(stream[read])).log_softmax(-1)
        y = logp.gather(1, task.token[asked, None])
        if task.against is not None:
            y = y - logp.gather(1, task.against[asked, None])
        return torch.stack(torch.autograd.grad(y.sum(), leaves))


def _places(trace: Trace, begin: int) -> tuple[tuple[Tensor, Tensor], Int[Tensor, " row"]]:
    """Where the rows of `TOGETHER` prompts from `begin` on stand in their pass (prompt, position),
    and which rows they are."""
    rows = ((begin <= trace.prompt) & (trace.prompt < begin + TOGETHER)).nonzero()[:, 0]
    return (trace.prompt[rows] - begin, trace.positions[rows]), rows


def _adding(
    leaf: Float[Tensor, "row d_mlp"], where: tuple[Tensor, Tensor]
) -> Callable[[Tensor], Tensor]:
    """A hook that adds the rows of `leaf` at their places."""

    def add(m: Tensor) -> Tensor:
        return m.index_put(where, leaf.to(m.dtype), accumulate=True)

    return add
