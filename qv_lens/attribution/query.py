"""Query importance (ACE, Eq. 10): which lower units activate the value neurons.

1. Take the top K value neurons j of each prompt, with importance I_j and coefficient m_j: FFN
   neurons, read at the prompt's last token, or attention neurons (head, channel, position p), read
   at p with the attention weight held.
2. A query unit q of a lower layer writes v_q (m_q fc2_q, a channel, a head) into the stream h that j reads. Its score
   adds up, over j, what v_q does to m_j, weighted by I_j. Three readings:
   `grad`           sum_j (I_j / m_j) v_q . grad m_j(h): first order through the norm and the gate (default),
   `share`          sum_j I_j (v_q . key_j) / (h . key_j), key_j = gain * subkey_j (Yu & Ananiadou 2024),
   `inner_product`  sum_j v_q . subkey_j: Eq. 10 literally.
   subkey_j is row j of fc1; of a gated FFN its linearisation s'(z_g) z_u g_j + s(z_g) u_j for `share`, its gate row
   for `inner_product`; of an attention neuron the row of W_V.
   All are linear in v_q, so one vector per layer and row, summed over the layers above, scores everything below.
3. h is the stream after attention for an FFN (in GPT-J the stream before it, which its FFN reads),
   the stream before attention for an attention neuron.
4. A query unit at another token reaches j through heads alone: `through="attention"` scores those
   too (see `readers`).
5. Layers: the same functional on whole outputs A^l and F^l (`query_layers`), the embedding apart
   (layer -1)."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from qv_lens.attribution.grouping import Grouping, Over, check_over
from qv_lens.attribution.ranking import check_top, grouped, ranked
from qv_lens.attribution.readers import (
    Method,
    QueryOptions,
    Reader,
    Subkey,
    Through,
    Writer,
    targets_of,
)
from qv_lens.attribution.units import AT_POSITIONS, Unit, units_of
from qv_lens.errors import ConfigError
from qv_lens.facts.spans import Positions
from qv_lens.models.lens import Facts, Lens, check_lens
from qv_lens.models.norms import at_least_float32
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace


@torch.no_grad()
def query_neurons(
    lens: Lens,
    facts: Facts | Trace,
    value: NeuronSet,
    top: int | None = 300,
    *,
    unit: Unit = "ffn",
    over: Over = "prompt",
    method: Method = "grad",
    targets: int = 30,
    subkey: Subkey | None = None,
    positions: Positions = "last",
    through: Through = "stream",
) -> NeuronSet:
    """The `top` query units for the `targets` best value neurons of each prompt; `top=None` keeps
    all.

    `value` is what `value_neurons` gave for the same facts (rows of prompt -1 count for every
    prompt): FFN neurons, or attention neurons (`unit='attn_neuron'`), whose query units have a
    `position`, that which they read. `unit`: what may be a query, 'ffn', 'attn_channel' or 'head'
    (FFN targets also take 'attn_neuron', 'head_position'). `over` ranks by the sum over a set or
    category. `method`: 'grad', 'share' or 'inner_product' (see the module). `positions`: the tokens
    at which the value neurons lie, as they were found. `subkey`: for a gated FFN, 'linear' (share's default), 'gate' (inner_product's) or
    'up'. `through='attention'` asks units at every token of the prompt, whose effect heads carry
    to the value neurons (method 'grad', FFN neurons as targets); the queries then have a
    `position`. Scores are in nats for `grad` and `share`.
    Raises `ConfigError` if a prompt has no value neurons, for an unknown option, under a `Suppress`,
    and while a `Scale` or `Replace` is in force on value neurons (through the stream).

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> value = qv.value_neurons(lens, fact, 30)
    >>> qv.query_neurons(lens, fact, value, 3).units
    [(2, 91), (1, 385), (1, 37)]
    """
    check_lens(lens)
    check_over(over)
    check_top(top)
    options = QueryOptions(method, targets, subkey, positions, through)
    reader = targets_of(lens, facts, value, options, attention=unit in AT_POSITIONS)
    settings = {**settings_of(lens, reader, options, value), "over": over, "unit": unit}
    return queries_of(lens, reader, unit, top, over, settings)


def queries_of(
    lens: Lens, reader: Reader, unit: Unit, top: int | None, over: Over, settings: dict[str, Any]
) -> NeuronSet:
    """The units below the reader's targets, scored by its keys and ranked."""
    if reader.by_position and (over != "prompt" or unit in AT_POSITIONS):
        raise ConfigError(
            "Queries of attention neurons, and those through attention, have a position: use "
            "over='prompt' and unit 'ffn', 'attn_channel' or 'head'."
        )
    trace, below = reader.trace, reader.below("ffn" if unit == "ffn" else "attn")
    scores, m = [], []
    for layer in range(lens.n_layers):
        units = units_of(lens, trace, unit, layer)
        if units.kind == "head":
            scores.append(einsum(units.vectors, below[layer], "r u d, r d -> r u"))
        else:
            reach = (below[layer] @ at_least_float32(units.vectors).T).repeat(1, units.keys)
            scores.append(units.m * reach)
        m.append(units.coefficients)
    if reader.by_position:
        last = [prompt.last for prompt in trace.prompts]
        return ranked(
            Grouping(lens, trace),
            unit,
            _by_prompt(trace, scores),
            _by_prompt(trace, m),
            top,
            settings,
            last=last,
        )
    groups = Grouping(lens, trace).groups(over)
    sizes = torch.bincount(groups)[:, None].to(m[0])
    totals, means = (torch.stack([grouped(x, groups) for x in parts]) for parts in (scores, m))
    last = trace.positions.tolist() if unit in AT_POSITIONS else None
    return ranked(Grouping(lens, trace), unit, totals, means / sizes, top, settings, over, last)


@torch.no_grad()
def query_layers(
    lens: Lens,
    facts: Facts | Trace,
    value: NeuronSet,
    *,
    method: Method = "grad",
    targets: int = 30,
    subkey: Subkey | None = None,
    positions: Positions = "last",
    through: Through = "stream",
) -> pd.DataFrame:
    """Query scores of whole outputs: `prompt, kind ('ffn', 'attn', 'embed'), layer, score`; the
    embedding is layer -1.

    `value`, `method`, `targets`, `subkey`, `positions`, `through`: as in `query_neurons`. For
    attention neurons as targets, and `through='attention'`, the positions are added up. Raises what
    `query_neurons` raises.
    """
    check_lens(lens)
    options = QueryOptions(method, targets, subkey, positions, through)
    reader = targets_of(lens, facts, value, options)
    frame = layers_of(lens, reader)
    frame.attrs.update(settings_of(lens, reader, options, value))
    return frame


def layers_of(lens: Lens, reader: Reader) -> pd.DataFrame:
    """The functional on whole outputs, per prompt."""
    trace, rows = reader.trace, []
    outputs: dict[Writer, Tensor] = {"ffn": trace.ffn, "attn": trace.attn, "embed": trace.resid[:1]}
    for kind, output in outputs.items():
        scores = (at_least_float32(output) * reader.below(kind)).sum(2, keepdim=True)
        for layer, each in enumerate(scores):
            by_prompt = grouped(each, trace.prompt)[:, 0].tolist()
            place = -1 if kind == "embed" else layer
            rows += [(prompt, kind, place, score) for prompt, score in enumerate(by_prompt)]
    return pd.DataFrame(rows, columns=["prompt", "kind", "layer", "score"])


def _by_prompt(
    trace: Trace, parts: list[Float[Tensor, "row unit"]]
) -> Float[Tensor, "layer prompt key_unit"]:
    """Rows of all positions as one (position, unit) axis per prompt, padded with zeros."""
    longest = int(trace.positions.max()) + 1
    stacked = torch.stack(parts)
    out = stacked.new_zeros(len(parts), len(trace.prompts), longest, stacked.shape[2])
    out[:, trace.prompt, trace.positions] = stacked
    return rearrange(out, "l p k u -> l p (k u)")


def settings_of(
    lens: Lens, reader: Reader, options: QueryOptions, value: NeuronSet
) -> dict[str, Any]:
    """What results are labelled with: `norm` and `base` are those of the value neurons' scores,
    `targets` is how many of these were asked, `subkey` their key where there are several."""
    read = {name: value.settings[name] for name in ("norm", "base") if name in value.settings}
    texts = [prompt.text for prompt in reader.trace.prompts]
    settings: dict[str, Any] = {"method": options.method, "targets": options.targets}
    if options.method != "grad" and value.unit == "ffn" and lens.backend_adapter.gated:
        settings["subkey"] = options.key
    return {**lens.label, **read, **settings, "through": options.through, "texts": texts}
