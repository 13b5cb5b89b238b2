"""UltraEdit: every fact in one backward pass, one small system; no subject, no search, no C0.

A turn is a batch of facts; for every written weight, in TransformerLens layout [k, d]:

1. Facts run in mini-batches, prompt and new answer; the loss is the mean of -log p over all answer
   tokens of the mini-batch. A row for each token asked: x, what the weight reads there, and g, the
   gradient of the loss at what it gives.
2. Mean and deviation of [x, g] over all rows of this and earlier turns, taken in mini-batch by
   mini-batch (b rows, N before): D = mean_b - mean, mean += b D / N', M += b var_b + N b D^2 / N',
   N' = N + b, deviation = sqrt(M / (N' - 1)); var_b is the unbiased variance.
3. (x', g') = ([x, g] - mean) / deviation, V = -lr ||x'||^2 g' for each row.
4. dW = X^T (X X^T + I)^-1 V, X the rows x of this turn. All weights are read from the same pass.

Source: UltraEdit (2025), released code (XiaojieGu/UltraEdit). There weights of one shape share
their moments, and a mini-batch of a single row makes all of them NaN; here each weight has its own,
and the variance of one row counts as 0. A first turn of a single row writes nothing, with a warning;
its row counts for the turns after it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.editing.bounds import Count, Positive
from qv_lens.editing.job import Deltas, Job
from qv_lens.editing.layer_by_layer import weights_of
from qv_lens.errors import EditError, unknown
from qv_lens.facts.records import EditRequest
from qv_lens.models.deltas import delta_hooks, taps
from qv_lens.models.lens import Lens
from qv_lens.patch import Delta, summed
from qv_lens.progress import progress_bar

Key = tuple[int, str]
#: added to N - 1 and to the deviations (float32's epsilon, as released)
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of rows, as UltraEdit adds them up."""

    count: float
    """N: how many rows."""
    mean: Float[Tensor, " column"]
    """Their mean."""
    squares: Float[Tensor, " column"]
    """M: the sum of squared deviations."""

    @classmethod
    def of(cls, rows: Float[Tensor, "row column"]) -> Moments:
        """Those of one mini-batch."""
        variance = rows.var(0) if len(rows) > 1 else torch.zeros_like(rows[0])
        return cls(len(rows), rows.mean(0), len(rows) * variance)

    def with_more(self, other: Moments) -> Moments:
        """Both together."""
        count = self.count + other.count
        gap = other.mean - self.mean
        return Moments(
            count,
            self.mean + other.count * gap / count,
            self.squares + other.squares + self.count * other.count * gap.square() / count,
        )

    @property
    def of_one_row(self) -> bool:
        """Whether all rows are alike, but for float32's rounding."""
        size = self.count * self.mean.square().sum()
        return self.count < 2 or bool(self.squares.sum() <= 1e-12 * size)

    @property
    def deviation(self) -> Float[Tensor, " column"]:
        return (self.squares / (self.count - 1 + EPS)).sqrt()

    def stored(self) -> Delta:
        """As a patch keeps them: N, the sums and the sums of squares, so that those of several
        patches add up."""
        total = self.count * self.mean
        squares = self.squares + total * self.mean
        return Delta(torch.stack([torch.full_like(total, self.count), total, squares]))

    @classmethod
    def read(cls, stored: Delta) -> Moments:
        """Those that `stored` gave, of one patch or of a sum of several."""
        count, total, squares = stored.left
        mean = total / count
        return cls(float(count[0]), mean, (squares - total * mean).clamp_min(0))


@dataclass(frozen=True, kw_only=True)
class UltraEdit:
    """UltraEdit (2025): one backward pass and one solve for a batch of facts. Defaults: of the
    authors' release for GPT-J.

    A turn is all requests of an edit, or `edit(..., batch_size=)` of them. The moments of the rows
    are kept with the patch, for edits made while it is applied."""

    layers: tuple[int, ...] = (18, 19, 20, 21, 22, 23, 24, 25, 26)
    """The layers that are written."""
    parameters: tuple[str, ...] = ("W_out",)
    """The weights of each layer: W_out, W_in, W_gate."""
    lr: Positive = 1e-6
    """Scales the update."""
    mini_batch: Count = 10
    """Facts of one backward pass; their tokens share its mean loss."""
    tokens: Literal["answer", "all"] = "answer"
    """Which tokens are rows: those that predict the answer, or all."""

    def deltas(self, job: Job) -> Deltas:
        names = self._names(job.lens)
        earlier = job.kept_earlier(self)
        seen = {key: Moments.read(stored) for key, stored in earlier.items()}
        own: dict[Key, Moments] = {}
        parts: list[Deltas] = []
        for requests in job.batches(None):
            rows = _rows(self, job.lens, requests, names, job.losses)
            for batch in rows:
                own = _together(
                    own, {key: Moments.of(torch.cat(xg, 1)) for key, xg in batch.items()}
                )
            all_seen = _together(seen, own)
            if any(moments.of_one_row for moments in all_seen.values()):
                warnings.warn(
                    "UltraEdit writes nothing for a first token alone (or the same one again), which "
                    "has no deviation to be measured by; it counts for edits made while this patch "
                    "is in force. Edit several facts at once, or pass tokens='all'.",
                    stacklevel=4,
                )
            turn = {
                key: _solved(self.lr, [batch[key] for batch in rows], all_seen[key])
                for key in names
            }
            parts.append(turn)
            for key, delta in turn.items():
                job.write(*key, delta)
        job.kept.update({key: moments.stored() for key, moments in own.items()})
        return summed(parts)

    def _names(self, lens: Lens) -> list[Key]:
        if self.tokens not in ("answer", "all"):
            raise unknown("UltraEdit's tokens", self.tokens, ("answer", "all"), error=EditError)
        return weights_of(lens, self.layers, self.parameters)


def _together(first: dict[Key, Moments], second: dict[Key, Moments]) -> dict[Key, Moments]:
    """The moments of both, weight by weight."""
    out = dict(first)
    for key, moments in second.items():
        out[key] = out[key].with_more(moments) if key in out else moments
    return out


def _rows(
    editor: UltraEdit,
    lens: Lens,
    requests: Sequence[EditRequest],
    names: Sequence[Key],
    losses: list,
) -> list[dict[Key, tuple[Float[Tensor, "row k"], Float[Tensor, "row d"]]]]:
    """x and g of every row of a turn, by mini-batch and weight."""
    out = []
    starts = range(0, len(requests), editor.mini_batch)
    for i in progress_bar(starts, of="gradients", unit="mini-batch"):
        chunk = requests[i : i + editor.mini_batch]
        prompts = lens.tokenize([request.target for request in chunk])
        tapped = taps(lens, names)
        with torch.enable_grad():
            loss = -lens.answer_logprobs(prompts, delta_hooks(lens, dict(tapped))).mean()
            if not torch.isfinite(loss):
                raise EditError("The loss is not finite: the model gives no probability to learn.")
            zeros = [tap.given for tap in tapped.values() if tap.given is not None]
            gradients = torch.autograd.grad(loss, zeros)
        losses += [[[loss.item()]]] * len(chunk)
        predicting = torch.zeros(gradients[0].shape[:2], dtype=torch.bool, device=lens.device)
        for row, prompt in enumerate(prompts):
            if editor.tokens == "all":
                predicting[row, : len(prompt.row("answer"))] = True
            else:
                predicting[row, list(prompt.positions("answer"))] = True
        out.append(
            {
                key: (tap.read[predicting].double(), g[predicting].double())
                for (key, tap), g in zip(tapped.items(), gradients, strict=True)
                if tap.read is not None
            }
        )
    return out


def _solved(
    lr: float,
    parts: Sequence[tuple[Float[Tensor, "row k"], Float[Tensor, "row d"]]],
    moments: Moments,
) -> Delta:
    """dW of one weight, from the rows of a turn."""
    X, g = (torch.cat(rows) for rows in zip(*parts, strict=True))
    normed = (torch.cat([X, g], 1) - moments.mean) / (moments.deviation + EPS)
    x_, g_ = normed.split([X.shape[1], g.shape[1]], 1)
    V = -lr * x_.square().sum(1, keepdim=True) * g_
    if moments.of_one_row:
        V = torch.zeros_like(V)
    system = X @ X.T + torch.eye(len(X), dtype=X.dtype, device=X.device)
    return Delta(X.T, torch.cholesky_solve(V, torch.linalg.cholesky(system)))
