"""One FFN neuron of a layer at a time, set to a value at one token: what is then said at the
prompt's end.

1. Everything below the layer, and every token before that one, is the same for all neurons: the
   stream in front of the layer is computed once, and keys and values of the earlier tokens are kept
   where the model can (`Lens.past`).
2. From there on each neuron has a copy of the prompt of its own; so many copies as one pass takes
   run together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.facts.spans import Prompt
from qv_lens.models.lens import Lens, log_probs

#: copies of a prompt in one pass
TOGETHER = 256


@torch.no_grad()
def logp_with_each(
    lens: Lens,
    prompt: Prompt,
    layer: int,
    position: int,
    neurons: Int[Tensor, " neuron"],
    values: Float[Tensor, " neuron"],
    tokens: Int[Tensor, " token"] | None = None,
) -> Float[Tensor, "neuron token"]:
    """log p of the next token at the prompt's end, in nats, with each neuron alone set to its value
    at `position`. `tokens`: of which tokens (None: all)."""
    stream = lens.stream([prompt.ids], layer)
    past = lens.past((layer, stream), torch.tensor([position])) if position else None
    first = 0 if past is None else position
    site, parts = lens.backend_adapter.coefficient(layer), []
    for some in torch.arange(len(neurons), device=neurons.device).split(TOGETHER):
        copies = torch.zeros(len(some), dtype=torch.long, device=lens.device)
        index = torch.arange(len(some), device=lens.device), neurons[some].to(lens.device)
        put = _put(index, values[some].to(lens.device), position - first)
        final = lens.stream(
            [prompt.ids[first:]] * len(some),
            lens.n_layers,
            [(site, put)],
            (layer, stream[copies, first:]),
            None if past is None else past.rows(copies),
            last=[prompt.last - first] * len(some),
        )
        logp = log_probs(lens.read_out(final[:, -1]))
        parts.append(logp if tokens is None else logp[:, tokens])
    return torch.cat(parts)


def _put(
    index: tuple[Tensor, Tensor], values: Float[Tensor, " neuron"], at: int
) -> Callable[[Tensor], Tensor]:
    """A hook that sets, in each copy of a prompt, one neuron at a position."""

    def put(m: Tensor) -> Tensor:
        out = m.clone()
        out[index[0], at, index[1]] = values.to(m.dtype)
        return out

    return put
