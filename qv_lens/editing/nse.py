"""NSE: targets from the unedited model, rows of the neurons that matter, written in rounds.

1. z* of every fact is searched (MEMIT's search) on the weights as they were before the first edit
   by this editor in force, whatever is written afterwards; or with `unedited=False` on the weights
   as the batches before it left them.
2. A batch is written in up to `rounds` rounds. In a round the distance of a fact is
   ||z* - current|| on its bare prompt; facts whose distance lies between `near` and `far` take
   part, and where there are none the batch is done. A batch of which no fact ever does is not
   written, and step 4 counts it all the same.
3. A round is MEMIT's sweep over these facts. At each layer neurons are scored, by sum |K| over the
   facts or by an attribution, and the largest of them whose shares of the sum add up to at most
   `share` are written (at least one):

       dW[I] = (lam C0 + S + K K^T)[I, I]^-1 K[I] R^T,  S the keys of earlier batches, K K^T.

4. Behind the rounds, S takes in the keys of all facts of the batch on the weights as written.

Source: NSE (2025), released code. It searches on the unedited model where its store of z* is
filled beforehand, else on the edited one. There a first neuron above the share fails, and facts
farther than `far` are left out without a word. `score='value'` and 'effects' are ours: if attribution finds
where a fact lies, rows chosen by it should carry the edit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.value import for_every_neuron, value_neurons
from qv_lens.editing.bounds import Count, Limit, NotNegative, Positive, Share
from qv_lens.editing.closed_form import EarlierKeys
from qv_lens.editing.job import Deltas, Job
from qv_lens.editing.keys import (
    ContextRows,
    clean_values,
    mean_over_contexts,
    read,
    rows_of,
)
from qv_lens.editing.layer_by_layer import ClosedForm, Group, Pass, Solver, Sweep
from qv_lens.editing.solve import InverseMetric, factor_of
from qv_lens.editing.targets import Targets, search
from qv_lens.errors import EditError, unknown
from qv_lens.facts.records import EditRequest
from qv_lens.models.lens import Lens
from qv_lens.patch import Delta, summed

NeuronScore = Literal["keys", "value", "effects"]
SCORES: tuple[NeuronScore, ...] = ("keys", "value", "effects")


@dataclass(frozen=True, kw_only=True)
class NSE(ClosedForm):
    """Neuron-level sequential editing (2025): MEMIT's targets of the unedited model, rows of some
    neurons, rounds. Defaults: GPT-J's, of the authors' release.

    The keys are kept with the patch, for edits made while it is applied."""

    layers: Group = (3, 4, 5, 6, 7, 8)
    """The layers that are written."""
    lam: Positive = 15000.0
    """Multiplies the mean second moment C0."""
    rounds: Count = 2
    """How many rounds are written at most (the release's max_iterations, less one)."""
    near: NotNegative = 15.0
    """alpha: facts nearer to their z* than this are done."""
    far: Limit = 100.0
    """Facts farther from their z* than this are not written."""
    share: Share = 0.8
    """p: the share of the scores that the neurons written hold."""
    unedited: bool = True
    """Whether z* is searched on the model as it was before all edits by this editor."""
    score: NeuronScore = "keys"
    """What chooses neurons: the size of their keys, or, for the fact's old answer asked at the
    fact's token, Eq. 9 ('value') or `neuron_effects` ('effects')."""

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        if self.score not in SCORES:
            raise unknown("NSE's score", self.score, SCORES, error=EditError)
        if self.near >= self.far:
            raise EditError(f"near must be below far; got near={self.near}, far={self.far}.")
        return (self.spread(lens, self.layers),)

    def solver(self, job: Job) -> Solver:
        return self._solver(job, EarlierKeys(job, self), {})

    def _solver(self, job: Job, earlier: EarlierKeys, scores: Mapping[int, Tensor]) -> Solver:
        """The metric of a round, its neurons chosen by the scores or, where there are none, by
        their keys."""
        C0 = job.required_statistics()

        def metric(layer: int, module: str) -> InverseMetric:
            moment = C0.of(job.lens, layer).to(job.lens.device)
            seen = earlier.gram(layer)

            def of(K: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
                chosen = largest(scores.get(layer, K.abs().sum(1)), self.share)
                job.notes["neurons"].append([layer, len(chosen)])
                return some_rows(moment, self.lam, seen, chosen, K)

            return of

        return Solver(metric, lambda n: 1.0, earlier.learn)

    def deltas(self, job: Job) -> Deltas:
        (plan,) = self.plan(job.lens)
        earlier = EarlierKeys(job, self)
        templates = job.prefixes(self.style)
        batches = job.batches(self.batch)
        all_rows = [rows_of(job.lens, each, templates, plan.fact_token) for each in batches]
        all_targets = self._targets(job, plan, batches, all_rows)
        written: list[Deltas] = []
        job.notes.update(rounds=[], neurons=[])
        for requests, rows, targets in zip(batches, all_rows, all_targets, strict=True):
            history = []
            for i in range(len(requests)):
                job.losses.append([list(step[i]) for step in targets.losses])
            searched, rounds = len(job.losses), len(written)
            names = [(layer, "W_out") for layer in plan.groups[0]] if self.trims else []
            before = {key: job.lens.parameter(*key).clone() for key in names}
            for _ in range(self.rounds):
                distance = self._distance(job.lens, plan, rows, targets)
                active = [i for i, far in enumerate(distance) if self.near < far < self.far]
                history.append({"distance": distance, "active": active})
                if not active:
                    break
                part = [requests[i] for i in active]
                solver = self._solver(job, earlier, self._scores(job, part))
                some = rows_of(job.lens, part, templates, plan.fact_token)
                deltas: dict[tuple[int, str], list[Delta]] = {}
                Sweep(job, some, targets.rows(active), plan, solver, deltas).run()
                del job.losses[searched:]  # a round searches nothing
                written.append({key: Delta.total(parts) for key, parts in deltas.items()})
            if self.trims and len(written) > rounds:
                written[rounds:] = [self.kept_of(job, before, summed(written[rounds:]))]
            self._warn_of_far(self._distance(job.lens, plan, rows, targets))
            job.notes["rounds"].append(history)
            earlier.learn(self._keys(job.lens, plan, rows))
        self._warn_of_near(job.notes["rounds"])
        if not written:
            return {(layer, "W_out"): _nothing(job.lens.w_out(layer)) for layer in plan.groups[0]}
        return summed(written)

    def _targets(
        self,
        job: Job,
        plan: Pass,
        batches: Sequence[Sequence[EditRequest]],
        all_rows: Sequence[ContextRows],
    ) -> Iterator[Targets]:
        """z* of one batch after another: of all on the weights before all edits by this editor, or
        of each when its turn comes, on the weights as they then are."""

        def searched(requests: Sequence[EditRequest], rows: ContextRows) -> Targets:
            return search(job.lens, requests, rows, plan.fact_token, plan.search)

        ahead = job.ahead  # searched on the weights as they are at first
        if ahead is not None and self.unedited and job.earlier(self):
            warnings.warn(
                "These targets were searched on edited weights, and NSE takes those of the unedited "
                "model: they are searched anew. With unedited=False yours are taken.",
                stacklevel=4,
            )
            ahead = None
        if not self.unedited:
            for i, (requests, rows) in enumerate(zip(batches, all_rows, strict=True)):
                yield searched(requests, rows) if i or ahead is None else ahead.of(requests)
        elif ahead is not None:
            yield from [ahead.of(requests) for requests in batches]
        else:
            with job.before(self):
                found = [searched(*each) for each in zip(batches, all_rows, strict=True)]
            yield from found

    def _distance(self, lens: Lens, plan: Pass, rows: ContextRows, targets: Targets) -> list[float]:
        """||z* - current|| of each fact."""
        site = plan.search.sites[0]
        now = clean_values(rows, read(lens, rows, (site,), stop=plan.z_layer + 1)[site])
        return (targets.z - now.double()).norm(dim=1).tolist()

    def _warn_of_far(self, distance: Sequence[float]) -> None:
        far = [size for size in distance if size >= self.far]
        if far:
            warnings.warn(
                f"{len(far)} of {len(distance)} facts are farther from their z* than "
                f"far={self.far:g} (the farthest {max(far):.3g}) and are not written.",
                stacklevel=4,
            )

    def _warn_of_near(self, batches: Sequence[Sequence[Mapping[str, list]]]) -> None:
        """Warn of facts that no round has written because they were near from the start."""
        near = facts = 0
        for rounds in batches:
            first, active = rounds[0]["distance"], {i for each in rounds for i in each["active"]}
            facts += len(first)
            near += sum(size <= self.near and i not in active for i, size in enumerate(first))
        if near:
            warnings.warn(
                f"{near} of {facts} facts lie within near={self.near:g} of their z* and are not "
                "written: lower near.",
                stacklevel=4,
            )

    def _keys(self, lens: Lens, plan: Pass, rows: ContextRows) -> dict[int, list[Tensor]]:
        """K of every layer, a column for each fact, on the weights as they are."""
        sites = {layer: lens.backend_adapter.coefficient(layer) for layer in plan.groups[0]}
        seen = read(lens, rows, list(sites.values()), stop=plan.z_layer + 1)
        return {
            layer: [mean_over_contexts(rows, seen[site], plan.average).T.double()]
            for layer, site in sites.items()
        }

    def _scores(
        self, job: Job, requests: Sequence[EditRequest]
    ) -> Mapping[int, Float[Tensor, " neuron"]]:
        """|score| of every neuron of the layers, by attribution for the old answers; none where the
        keys choose."""
        if self.score == "keys":
            return {}
        facts, lens, at = [request.fact for request in requests], job.lens, self.fact_token
        if self.score == "value":
            method = for_every_neuron(lens)
            every = value_neurons(lens, facts, None, over="set", positions=at, method=method)
        else:
            every = neuron_effects(lens, facts, None, over="set", positions=at)
        scores = {}
        for layer in self.layers:
            rows = every.layer(layer).frame.sort_values("neuron")
            scores[layer] = torch.tensor(rows["score"].to_numpy(), device=lens.device).abs()
        return scores


def _nothing(W: Float[Tensor, "k d"]) -> Delta:
    """A change of W by 0."""
    return Delta(W.new_zeros(len(W), 1).double(), W.new_zeros(1, W.shape[1]).double())


def some_rows(
    C0: Float[Tensor, "k k"],
    lam: float,
    seen: Float[Tensor, "k k"] | None,
    chosen: Int[Tensor, " chosen"],
    K: Float[Tensor, "k n"],
) -> Float[Tensor, "k n"]:
    """Y with (lam C0 + S)[I, I] Y[I] = K[I], 0 elsewhere: S is K K^T of the earlier keys, I the
    chosen neurons."""
    system = lam * C0[chosen][:, chosen].double()
    if seen is not None:
        system = system + seen[chosen][:, chosen]
    Y = torch.zeros_like(K)
    factor = factor_of(system, "lower share, so that fewer neurons are written")
    Y[chosen] = torch.cholesky_solve(K[chosen], factor)
    return Y


def largest(size: Float[Tensor, " k"], share: float) -> Int[Tensor, " chosen"]:
    """The largest entries whose shares of the sum add up to at most `share`, at least one; in
    ascending order."""
    order = size.argsort(descending=True, stable=True)
    held = size[order].cumsum(0) / size.sum()
    # a rounded sum of all shares may exceed 1
    return order[: max(1, int((held <= share + 1e-12).sum()))].sort().values
