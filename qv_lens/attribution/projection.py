"""From the stream to the vocabulary: final-norm modes, and what a neuron promotes.

1. Logits of a stream vector y are U^T (gain * centre(y) / sigma) + c, with c = U^T bias + b_U (LayerNorm centres,
   RMSNorm does not). The modes differ in sigma:
   `frozen`  sigma of the whole pass's final vector, for every y (Yu & Ananiadou 2024; the default),
   `full`    sigma of y itself (the ordinary logit lens),
   `none`    no final norm at all (ACE, Eq. 2 as printed).
2. A neuron's projection is U^T (gain * centre(fc2_k)): a positive factor and the bias are left out,
   so ranks are those of what it adds. A neuron with a negative coefficient promotes the other end
   of its list.
3. The logit lens reads the stream above each layer in the same way, at its own sigma: what the
   model would say at each token if it ended there (nostalgebraist, 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.attribution.log_sums import Lengths
from qv_lens.errors import ConfigError, check_count, unknown
from qv_lens.facts.records import Fact
from qv_lens.facts.scripts import unspaced
from qv_lens.models.lens import Lens, check_lens
from qv_lens.models.norms import Norm, at_least_float32, capped
from qv_lens.models.units import warn_of_others
from qv_lens.neurons import NeuronSet, check_set
from qv_lens.trace import Trace

NormMode = Literal["frozen", "full", "none"]
NORM_MODES: tuple[NormMode, ...] = ("frozen", "full", "none")


@dataclass(frozen=True)
class Readout:
    """The final norm and the unembedding as one map, gain folded into `U`, in float32 or better.

    The mean over the vocabulary is taken out of every row of `U` (and of `c`): it moves all logits
    alike, which no probability sees, and would cost float32 its digits. Under a soft cap, which
    does not move alike, it stays."""

    mode: NormMode
    """How the norm is taken."""
    norm: Norm
    """The final norm."""
    U: Float[Tensor, "d_model d_vocab"]
    """The unembedding, gain folded in."""
    c: Float[Tensor, " d_vocab"]
    """What is added to the logits."""
    sigma: Float[Tensor, "row 1"]
    """The pass's own divisors."""
    lengths: Lengths
    """How far a vector can move any logit."""
    cap: float | None = None
    """The soft cap of the logits."""

    @classmethod
    def of(cls, lens: Lens, trace: Trace, mode: NormMode, final_bias: bool = True) -> Readout:
        """The readout of a traced batch; the published codes leave ln_f.bias out
        (`final_bias=False`).

        Raises `ConfigError` for an unknown mode.
        """
        if mode not in NORM_MODES:
            raise unknown("Norm mode", mode, NORM_MODES)
        norm = lens.backend_adapter.norm(None)
        weight, bias = (at_least_float32(w) for w in lens.backend_adapter.unembed())
        sigma = norm.scale(trace.final)
        cap = lens.backend_adapter.logit_cap
        gain, c = at_least_float32(norm.gain), bias
        if mode == "none":
            sigma, gain = torch.ones_like(sigma), torch.ones_like(gain)
        elif norm.bias is not None and final_bias:
            c = bias + at_least_float32(norm.bias) @ weight
        U = weight * gain[:, None]
        if cap is None:
            U -= U.mean(1, keepdim=True)  # in place: with a real vocabulary a copy is half a GB
            c = c - c.mean()
        return cls(mode, norm, U, c, sigma, Lengths.of(U), cap)

    def centre(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return y if self.mode == "none" else self.norm.center(y)

    def scale(
        self, y: Float[Tensor, "row d_model"], rows: Tensor | slice = slice(None)
    ) -> Float[Tensor, "row 1"]:
        """sigma by which the centred vectors are divided; `rows` says which rows of the trace they
        belong to."""
        return self.norm.scale(y) if self.mode == "full" else self.sigma[rows]

    def logits(
        self, y: Float[Tensor, "row d_model"], rows: Tensor | slice = slice(None)
    ) -> Float[Tensor, "row d_vocab"]:
        return capped(self.raw_logits(y, rows), self.cap)

    def raw_logits(
        self, y: Float[Tensor, "row d_model"], rows: Tensor | slice = slice(None)
    ) -> Float[Tensor, "row d_vocab"]:
        """Before any soft cap."""
        return self.centre(y) @ self.U / self.scale(y, rows) + self.c


def vocabulary(
    lens: Lens, neurons: NeuronSet, top: int = 10, *, bias: bool = False
) -> pd.DataFrame:
    """Tokens that neurons promote and suppress: the set's columns, and lists of `top` token texts,
    strongest first.

    FFN neurons and attention channels, by the vector they write. Sign-aware: with a negative
    coefficient a neuron promotes what its vector points away from. Rows of the vocabulary that no
    token uses are left out. `bias` adds the unembedding's bias (GPT-J's swamps short vectors).
    Raises `ConfigError` for `top` below 1, for heads or columns of W_out, and for units that the
    model lacks.
    Source: ACE, Tables 6 and 7.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> best = qv.value_neurons(lens, fact, 1)
    >>> qv.vocabulary(lens, best)["promoted"][0][:2]
    [' invented', ' football']
    """
    check_lens(lens)
    check_set(neurons)
    check_count("top", top)
    warn_of_others(lens, neurons)
    frame = neurons.to_frame()
    ids = projected(lens, written(lens, neurons), top, bias, signs(frame))
    promoted, suppressed = (token_labels(lens, end) for end in ids)
    # promoted last: a narrow print of a frame keeps its last column
    return frame.assign(suppressed=suppressed, promoted=promoted)


def token_labels(lens: Lens, tokens: Int[Tensor, "row token"]) -> list[list[str]]:
    """Rows of the vocabulary as text, a list for each row."""
    return [[lens.token_label(token) for token in row] for row in tokens.tolist()]


@torch.no_grad()
def logit_lens(lens: Lens, fact: Fact, top: int = 5) -> pd.DataFrame:
    """What the model would say if it ended at a layer: `layer, position, token, promoted,
    probability, answer`, one row per layer and token of the prompt.

    `promoted`: the `top` likeliest tokens of the stream above the layer, `probability` that of the
    likeliest, `answer` that of the fact's first answer token. In the last layer these are the
    model's own.
    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).

    >>> import qv_lens as qv
    >>> from qv_lens.attribution.projection import logit_lens
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> logit_lens(lens, fact).iloc[-1]["promoted"][0]
    ' fencing'
    """
    check_count("top", top)
    trace = lens.trace(fact, "all")
    readout = Readout.of(lens, trace, "full")
    answer, tokens = trace.prompts[0].answer[0], lens.str_tokens(fact)
    frames = []
    for layer in range(lens.n_layers):
        stream = at_least_float32(trace.resid[layer + 1])
        p = readout.logits(stream).softmax(-1)
        best = p.topk(top)
        columns = {
            "layer": layer,
            "position": trace.positions.tolist(),
            "token": tokens,
            "promoted": token_labels(lens, best.indices),
            "probability": best.values[:, 0].tolist(),
            "answer": p[:, answer].tolist(),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def interpretable(
    lens: Lens,
    neurons: NeuronSet,
    answer: str,
    top: int = 10,
    *,
    plural: bool = False,
    bias: bool = False,
) -> pd.Series:
    """For each row of the set, whether the answer or a surface variant of it is among the `top`
    promoted tokens.

    Variants: `surface_forms` (`plural` adds the answer with an s). `bias` adds the unembedding's bias, as
    `vocabulary` does. Use: `value.where(qv.interpretable(lens, value, "basketball"))`.
    Raises what `vocabulary` raises, and `ConfigError` for an answer that is not a text.
    Source: ACE, section 6.4 ("associated vocabulary included the correct target token").
    """
    check_lens(lens)
    check_set(neurons)
    check_count("top", top)
    if not isinstance(answer, str):
        raise ConfigError(f"The answer is a text, got {type(answer).__name__}: pass fact.answer.")
    wanted = surface_forms(lens, answer, plural=plural)
    promoted, _ = projected(lens, written(lens, neurons), top, bias, signs(neurons.frame))
    return pd.Series(
        [not wanted.isdisjoint(row) for row in promoted.tolist()],
        index=neurons.frame.index,
        dtype=bool,
    )


def surface_forms(lens: Lens, answer: str, *, plural: bool = False) -> set[int]:
    """The first token of an answer that is more than a blank, and the answer's forms that are single
    tokens: other case, with and without a leading space, `plural` also with an s."""
    words = {answer, answer.lower(), answer.upper(), answer.capitalize()}
    words |= {f"{word}s" for word in words} if plural else set()
    # where an answer of its script follows a blank, and where it does not
    before = "。" if unspaced(answer[:1]) else "The"
    wanted = {next(i for i in lens.answer_ids(before, answer) if lens.token_label(i).strip())}
    tokens = partial(lens.tokenizer, add_special_tokens=False)
    inside = len(tokens("(")["input_ids"])
    for word in words:
        # some tokenizers put a blank in front of every text, but not behind a bracket
        bare = tokens(f"({word}")["input_ids"][inside:]
        forms = (tokens(word)["input_ids"], tokens(f" {word}")["input_ids"], bare)
        wanted |= {ids[0] for ids in forms if len(ids) == 1}
    return wanted


def signs(frame: pd.DataFrame) -> Float[Tensor, "neuron 1"]:
    """-1 for neurons with a negative coefficient, 1 for all others."""
    return torch.tensor([[-1.0 if c < 0 else 1.0] for c in frame["coefficient"]])


def written(lens: Lens, neurons: NeuronSet) -> Float[Tensor, "neuron d_model"]:
    """The vector that each row's unit writes per unit of its coefficient. Raises `ConfigError` for
    heads and columns."""
    if neurons.unit not in ("ffn", "attn_channel", "attn_neuron"):
        raise ConfigError(
            f"A vocabulary projection needs units that write one vector, not {neurons.unit!r}."
        )
    out = torch.empty(
        len(neurons), lens.d_model, dtype=at_least_float32(lens.w_out(0)).dtype, device=lens.device
    )
    for layer, rows in neurons.frame.reset_index(drop=True).groupby("layer"):
        weight = lens.backend_adapter.value_vectors(
            lens.check_layer(layer), "ffn" if neurons.unit == "ffn" else "attn"
        )
        index = torch.tensor(rows["neuron"].to_numpy())
        if not 0 <= int(index.min()) <= int(index.max()) < len(weight):
            raise ConfigError(
                f"Layer {layer} has units 0 to {len(weight) - 1}; the set names {int(index.min())} "
                f"to {int(index.max())}."
            )
        out[torch.tensor(rows.index.to_numpy())] = at_least_float32(weight[index])
    return out


def projected(
    lens: Lens,
    vectors: Float[Tensor, "neuron d_model"],
    top: int,
    bias: bool,
    sign: Float[Tensor, "neuron 1"],
    tile: int = 64,
) -> tuple[Int[Tensor, "neuron top"], Int[Tensor, "neuron top"]]:
    """The `top` highest and lowest tokens of U^T (gain * centre(v)), times the sign."""
    norm = lens.backend_adapter.norm(None)
    U, b = (at_least_float32(w)[..., : len(lens.tokenizer)] for w in lens.backend_adapter.unembed())
    U, ends = U * at_least_float32(norm.gain)[:, None], []
    for i in range(0, len(vectors), tile):
        logits = norm.center(vectors[i : i + tile]) @ U + (b if bias else 0)
        logits = logits * sign[i : i + tile].to(logits)
        ends.append(
            [
                logits.topk(min(top, logits.shape[1]), dim=1, largest=largest).indices
                for largest in (True, False)
            ]
        )
    if not ends:
        return torch.empty(0, top, dtype=torch.long), torch.empty(0, top, dtype=torch.long)
    return torch.cat([high for high, _ in ends]), torch.cat([low for _, low in ends])
