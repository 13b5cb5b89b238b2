"""KN: knowledge neurons, whose rows are moved from the old answer to the new one. Nothing is
trained.

1. The neurons of the old answer are those whose attribution exceeds a share of the largest.
2. Their rows of W_out are moved along the embeddings of the old and the new answer.

Sources: Dai et al. 2022 and its authors' code, or EasyEdit's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qv_lens.attribution.knowledge_neurons import IGRule, greedy_tokens, integrated_gradients
from qv_lens.editing.bounds import Count, NotNegative, Share
from qv_lens.editing.job import Deltas, Job
from qv_lens.errors import EditError, unknown
from qv_lens.facts.records import EditRequest
from qv_lens.models.lens import Lens
from qv_lens.models.norms import at_least_float32
from qv_lens.patch import Delta


@dataclass(frozen=True, kw_only=True)
class KN:
    """Knowledge neurons (Dai et al. 2022): rows of W_out with the largest attribution for the OLD
    answer are moved from its embedding towards the new answer's.

    `rule='paper'`: the attribution of the paper (`integrated_gradients`), and the move of the
    authors' code, row +=
    |row| (`lam_new` e_new - `lam_old` e_old), e the unit vector along an answer's mean embedding.
    `rule='easyedit'`: EasyEdit's attribution, -2 emb(what the model itself says) + emb(new); for a
    new answer of n > 1 tokens, -1 times each of n greedy tokens and +1 times each token of the
    new answer.
    `threshold`: share of the largest attribution that a neuron must exceed.
    Both moves are added to a row whatever the sign of its coefficient; in a gated FFN it is often
    negative, and the row then pushes towards the old answer.
    """

    rule: IGRule = "paper"
    """Whose attribution and move (see above)."""
    threshold: Share = 0.1
    """Share of the largest attribution that a neuron must exceed."""
    steps: Count = 20
    """Steps of integrated gradients."""
    lam_old: NotNegative = 1.0
    """How far a row moves from the old answer's embedding."""
    lam_new: NotNegative = 8.0
    """How far it moves to the new answer's."""

    def deltas(self, job: Job) -> Deltas:
        if self.rule not in ("paper", "easyedit"):
            raise unknown("KN's rule", self.rule, ("paper", "easyedit"), error=EditError)
        return job.in_turn(self._moved)

    def _moved(self, job: Job) -> Deltas:
        lens = job.lens
        rows: dict[int, dict[int, Tensor]] = {}
        for request in dict.fromkeys(job.requests):  # the same one again would move rows twice
            neurons = integrated_gradients(
                lens, request.fact, None, steps=self.steps, rule=self.rule
            ).frame
            strong = neurons[neurons["score"] > self.threshold * neurons["score"].max()]
            if strong.empty:
                raise EditError(
                    f"No neuron speaks for {request.fact.answer!r} after {request.fact.text!r:.200}: no "
                    "attribution is above 0, so KN has nothing to write."
                )
            for layer, neuron in strong[["layer", "neuron"]].itertuples(index=False):
                table = rows.setdefault(int(layer), {})
                W_out = at_least_float32(lens.w_out(int(layer)))
                move = self._move(lens, request, W_out[int(neuron)])
                table[int(neuron)] = table.get(int(neuron), torch.zeros_like(move)) + move
        job.notes["neurons"] = {str(layer): sorted(table) for layer, table in rows.items()}
        out = {}
        for layer, table in rows.items():
            left = torch.zeros(lens.d_mlp, len(table), dtype=torch.float64, device=lens.device)
            left[list(table), range(len(table))] = 1.0
            out[layer, "W_out"] = Delta(left, torch.stack(list(table.values())).double())
        return out

    def _move(self, lens: Lens, request: EditRequest, row: Tensor) -> Tensor:
        """The vector added to one row."""
        embed = at_least_float32(lens.backend_adapter.embedding())
        new = list(lens.answer_ids(request.fact, request.new))
        if self.rule == "paper":
            old = list(lens.answer_ids(request.fact))
            e_old, e_new = (F.normalize(embed[ids].mean(0), dim=0) for ids in (old, new))
            return row.norm() * (self.lam_new * e_new - self.lam_old * e_old)
        before = greedy_tokens(lens, request.fact, len(new))
        return embed[new].sum(0) - (2.0 if len(new) == 1 else 1.0) * embed[before].sum(0)
