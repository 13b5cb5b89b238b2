"""What a model loses without a neuron: s = m dy/dm, gradient times activation.

1. y is the log-probability of what is asked for (natural log; a contrast: the difference of two), at each row of the trace.
2. One forward and one backward pass give dy/dm of every FFN neuron at the rows' positions, in all layers at once.
3. s = m dy/dm: to first order what y loses when the neuron is set to zero there, everything behind it free to react.

Unlike Eq. 9, which reads a neuron's vector out where it is written, s counts what later layers make of it. Source:
attribution patching (Nanda 2023) against zero; Molchanov et al. (2017).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.attribution.setting import Over, Setting, Target, check_over, setting
from qv_lens.attribution.value import check_top, grouped, ranked
from qv_lens.models.lens import Facts, Lens, at_least_float32
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace

#: prompts in one pass, which holds the activations of every layer for the gradient
TOGETHER = 16


def neuron_effects(
    lens: Lens, facts: Facts | Trace, top: int | None = 300, *, over: Over = "prompt", target: Target = "answer"
) -> NeuronSet:
    """FFN neurons by what the answer loses without them, in nats: a positive score supports the answer.

    `top`: how many per prompt (None: all). `over='set'` adds the prompts up. `target`: as for `value_neurons`.
    Raises `ConfigError` for an unknown target or way to add up, `FactError` for prompts that do not tokenise.
    """
    check_top(top)
    check_over(over)
    task = setting(lens, facts, target=target)
    m = torch.stack([at_least_float32(layer) for layer in task.trace.m])
    scores = m * _gradients(task)
    groups = task.rows.groups(over)
    by_group = torch.stack([grouped(layer, groups) for layer in scores])
    count = torch.bincount(groups.to(m.device))[:, None]
    coefficients = torch.stack([grouped(layer, groups) / count for layer in m])
    settings = {**task.attrs, "method": "gradient", "over": over}
    return ranked(task.rows, "ffn", by_group, coefficients, top, settings, over)


def _gradients(task: Setting) -> Float[Tensor, "layer row d_mlp"]:
    """dy/dm at every row of the trace."""
    prompts = len(task.trace.prompts)
    parts = []
    for begin in range(0, prompts, TOGETHER):
        inside = (begin <= task.trace.prompt) & (task.trace.prompt < begin + TOGETHER)
        parts.append(_one_pass(task, inside.nonzero()[:, 0], begin))
    return torch.cat(parts, dim=1)


def _one_pass(task: Setting, rows: Int[Tensor, " row"], begin: int) -> Float[Tensor, "layer row d_mlp"]:
    """dy/dm at the rows of the prompts from `begin` on."""
    lens = task.lens
    prompts = task.trace.prompts[begin : begin + TOGETHER]
    where = (task.trace.prompt[rows] - begin).to(lens.device), task.trace.positions[rows].to(lens.device)
    dtype = task.readout.U.dtype
    added = [torch.zeros(len(rows), lens.d_mlp, dtype=dtype, device=lens.device) for _ in range(lens.n_layers)]
    leaves = [leaf.requires_grad_() for leaf in added]
    sites = [lens.backend_adapter.coefficient(layer) for layer in range(lens.n_layers)]
    hooks = [(site, _adding(leaf, where)) for site, leaf in zip(sites, leaves, strict=True)]
    with torch.enable_grad():
        ids = [prompt.row("answer") for prompt in prompts]
        stream = lens.stream(ids, lens.n_layers, hooks, last=[prompt.last for prompt in prompts])
        logp = at_least_float32(lens.read_out(stream[where])).log_softmax(-1)
        y = logp.gather(1, task.token[rows, None])
        if task.against is not None:
            y = y - logp.gather(1, task.against[rows, None])
        return torch.stack(torch.autograd.grad(y.sum(), leaves))


def _adding(leaf: Float[Tensor, "row d_mlp"], where: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """A hook that adds the rows of `leaf` at their places."""

    def add(m: Tensor) -> Tensor:
        return m.index_put(where, leaf.to(m.dtype), accumulate=True)

    return add
