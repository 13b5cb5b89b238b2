"""From the stream to the vocabulary: final-norm modes, and what a neuron promotes.

1. Logits of a stream vector y are U^T (gain * centre(y) / sigma) + c, with c = U^T bias + b_U (LayerNorm centres,
   RMSNorm does not). The modes differ in sigma:
   `frozen`  sigma of the whole pass's final vector, for every y (Yu & Ananiadou 2024; the default),
   `full`    sigma of y itself (the ordinary logit lens),
   `none`    no final norm at all (ACE, Eq. 2 as printed).
2. A neuron's projection is U^T (gain * centre(fc2_k)): a positive factor and the bias are left out, so ranks are those
   of what it adds. A neuron with a negative coefficient promotes the other end of its list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.errors import unknown
from qv_lens.models.backend import Norm
from qv_lens.models.lens import Lens, at_least_float32
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace

NormMode = Literal["frozen", "full", "none"]
NORM_MODES: tuple[NormMode, ...] = ("frozen", "full", "none")


@dataclass(frozen=True)
class Readout:
    """The final norm and the unembedding as one map, gain folded into `U`, in float32 or better."""

    mode: NormMode
    norm: Norm
    U: Float[Tensor, "d_model d_vocab"]
    c: Float[Tensor, " d_vocab"]
    sigma: Float[Tensor, "row 1"]

    @classmethod
    def of(cls, lens: Lens, trace: Trace, mode: NormMode, final_bias: bool = True) -> Readout:
        """The readout of a traced batch; the published codes leave ln_f.bias out (`final_bias=False`).

        Raises `ConfigError` for an unknown mode.
        """
        if mode not in NORM_MODES:
            raise unknown("Norm mode", mode, NORM_MODES)
        norm = lens.backend_adapter.norm(None)
        weight, bias = (at_least_float32(w) for w in lens.backend_adapter.unembed())
        sigma = norm.scale(at_least_float32(trace.final))
        if mode == "none":
            return cls(mode, norm, weight, bias, torch.ones_like(sigma))
        c = bias if norm.bias is None or not final_bias else bias + at_least_float32(norm.bias) @ weight
        return cls(mode, norm, weight * at_least_float32(norm.gain)[:, None], c, sigma)

    def centre(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return y if self.mode == "none" else self.norm.center(y)

    def scale(self, y: Float[Tensor, "row d_model"], rows: Tensor | slice = slice(None)) -> Float[Tensor, "row 1"]:
        """sigma by which the centred vectors are divided; `rows` says which rows of the trace they belong to."""
        return self.norm.scale(y) if self.mode == "full" else self.sigma[rows]

    def logits(self, y: Float[Tensor, "row d_model"], rows: Tensor | slice = slice(None)) -> Float[Tensor, "row d_vocab"]:
        return self.centre(y) @ self.U / self.scale(y, rows) + self.c


def vocabulary(lens: Lens, neurons: NeuronSet, top: int = 10) -> pd.DataFrame:
    """Tokens that FFN neurons promote and suppress: `prompt, layer, neuron, coefficient, score, promoted, suppressed`.

    Lists of `top` token texts, strongest first, sign-aware: with m < 0 the neuron promotes what its value vector
    points away from. Rows of the vocabulary that no token uses are left out. Source: ACE, Tables 6 and 7.
    """
    norm = lens.backend_adapter.norm(None)
    weight = at_least_float32(lens.backend_adapter.unembed()[0])[:, : len(lens.tokenizer)]
    weight = weight * at_least_float32(norm.gain)[:, None]
    frame = neurons.to_frame()
    promoted, suppressed = [], []
    for layer, neuron, coefficient in zip(frame["layer"], frame["neuron"], frame["coefficient"], strict=True):
        vector = at_least_float32(lens.w_out(int(layer))[int(neuron)])
        logits = norm.center(vector) @ weight * (-1.0 if coefficient < 0 else 1.0)
        order = logits.argsort(descending=True).tolist()
        promoted.append([lens.token_label(i) for i in order[:top]])
        suppressed.append([lens.token_label(i) for i in order[::-1][:top]])
    keep = [column for column in ("prompt", "layer", "neuron", "coefficient", "score") if column in frame]
    return frame[keep].assign(promoted=promoted, suppressed=suppressed)
