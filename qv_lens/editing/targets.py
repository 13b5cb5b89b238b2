"""Target vectors v* (z*): what a site should say at the fact's token for the model to give the new answer.

For all facts at once (one Adam; clamp and early stop per fact), delta starts at 0, is added at the lookup position of
every prompt of its fact, the KL prompt included, and minimises (MEMIT; ACE Eq. 13)

    L = phi * mean over prompts of NLL(o*) + mu * KL(p_edited || p_original) at "{subject} is a"
        + wd * ||delta|| / ||init||^2

1. it = 0 .. steps - 1: forward; a fact stops when L < 0.05, all stop at the last iteration (so steps - 1 updates).
2. Step; project ||delta|| <= clamp * ||init||.  v* = init + delta, init the site's value on the bare prompt.
3. PMET (`drop`): delta at attention and FFN output together, each with its own clamp; phi falls to 0.1 on steps where
   the new answer is the argmax at every position of every prompt, and the fact then also stops once mu * KL <= 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from qv_lens.editing.keys import Rows, clean_values, read
from qv_lens.errors import EditError
from qv_lens.facts.records import EditRequest, Fact
from qv_lens.facts.spans import FactToken, tokenize
from qv_lens.models.lens import Lens, at_least_float32

STOP = 0.05  # L below which a fact is done (MEMIT)
KL_STOP = 0.01


@dataclass(frozen=True)
class Search:
    """Settings of the search for v*: `sites` are hook names, one delta each; the first one's target is used."""

    sites: tuple[str, ...]
    steps: int
    lr: float
    weight_decay: float
    clamp: float
    kl: float
    drop: bool = False


@dataclass(frozen=True)
class Targets:
    """z* by site, and per fact the losses along the way: `losses[step][fact]` = (total, NLL, KL)."""

    z_of: tuple[Float[Tensor, "fact d_model"], ...]
    losses: tuple[tuple[tuple[float, float, float], ...], ...]

    @property
    def z(self) -> Float[Tensor, "fact d_model"]:
        """z* of the first site."""
        return self.z_of[0]


def search(lens: Lens, requests: Sequence[EditRequest], rows: Rows, token: FactToken, settings: Search) -> Targets:
    """Optimise v* of every request. Raises `EditError` if the loss is not finite or no gradient reaches a site."""
    kl_ids, kl_at = _kl_rows(lens, requests, token)
    ids = [*rows.ids, *kl_ids]
    owner = torch.tensor([*rows.fact, *range(len(requests))], device=lens.device)
    where = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.bool, device=lens.device)
    where[: len(rows.ids), : rows.lookup.shape[1]] = rows.lookup
    where[torch.arange(len(rows.ids), len(ids)), kl_at] = True
    answer = torch.zeros_like(where)
    answer[: len(rows.ids), : rows.answer.shape[1]] = rows.answer
    problem = _Problem(lens, rows, ids, owner, where, answer, torch.tensor(kl_at, device=lens.device), settings)
    return problem.run()


def _kl_rows(lens: Lens, requests: Sequence[EditRequest], token: FactToken) -> tuple[list[tuple[int, ...]], list[int]]:
    prompts = [tokenize(lens.tokenizer, Fact("{} is a", r.fact.subject, r.fact.answer), lens.prepend_bos) for r in requests]
    return [p.ids for p in prompts], [p.position(token) for p in prompts]


class _Problem:
    """The search's tensors, set up once; `run` is the loop."""

    def __init__(
        self, lens: Lens, rows: Rows, ids: list, owner: Tensor, where: Tensor, answer: Tensor, kl_at: Tensor, settings: Search
    ) -> None:
        self.lens, self.rows, self.ids, self.owner, self.settings = lens, rows, ids, owner, settings
        self.where, self.answer, self.kl_at = where, answer, kl_at
        self.n = len(rows.clean)
        self.answer_rows, _ = answer.nonzero(as_tuple=True)
        z_layer = int(settings.sites[0].split(".")[1])
        with torch.no_grad():  # nothing below the z layer changes during the search
            self.start = (z_layer, lens.stream(ids, z_layer))
        inits = read(lens, rows, settings.sites, (z_layer, self.start[1][: len(rows.ids), : rows.lookup.shape[1]]), z_layer + 1)
        self.inits = [clean_values(rows, inits[site]) for site in settings.sites]
        self.deltas = [torch.zeros_like(init, requires_grad=True) for init in self.inits]
        self.kl_start: Tensor | None = None

    def run(self) -> Targets:
        s, losses = self.settings, []
        adam = torch.optim.Adam(self.deltas, lr=s.lr)
        active = torch.ones(self.n, dtype=torch.bool, device=self.owner.device)
        for step in tqdm(range(s.steps), desc="target vectors", unit="step", delay=2, leave=False):
            with torch.enable_grad():
                total, nll, kl, known = self._loss()
                if step == 0:
                    self._check_reach(nll)
            losses.append(tuple(zip(total.tolist(), nll.tolist(), kl.tolist(), strict=True)))
            if not torch.isfinite(total).all():
                raise EditError(f"The loss of the target vectors is not finite at step {step}: lower lr or clamp.")
            done = total.detach() < STOP
            if s.drop:
                done |= known & (kl.detach() <= KL_STOP)
            active &= ~done
            if step == s.steps - 1 or not active.any():
                break
            self._update(adam, total, active)
        z_of = tuple((init + delta).detach().double() for init, delta in zip(self.inits, self.deltas, strict=True))
        return Targets(z_of, tuple(losses))

    def _check_reach(self, nll: Tensor) -> None:
        """Raise `EditError` where the new answer's probability does not depend on delta at all."""
        gradients = torch.autograd.grad(nll.sum(), self.deltas, retain_graph=True, allow_unused=True)
        if not any(gradient is not None and gradient.any() for gradient in gradients):
            raise EditError(
                "No gradient reaches the site: behind the last edited layer nothing reads the fact's token any more. "
                "Choose value layers below the model's last layer, or fact_token='last'."
            )

    def _update(self, adam: torch.optim.Optimizer, total: Tensor, active: Tensor) -> None:
        before = [delta.detach().clone() for delta in self.deltas]
        adam.zero_grad()
        total.sum().backward()
        adam.step()
        with torch.no_grad():
            for delta, old, init in zip(self.deltas, before, self.inits, strict=True):
                limit = self.settings.clamp * init.norm(dim=1, keepdim=True)
                delta.mul_((limit / delta.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0))
                delta.copy_(torch.where(active[:, None], delta, old))

    def _loss(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per fact: L, its NLL and KL terms, and whether the new answer is the argmax everywhere."""
        s = self.settings
        hooks = list(zip(s.sites, map(self._adder, self.deltas), strict=True))
        logits = at_least_float32(self.lens.logits(self.ids, hooks, self.start))
        picked = logits[self.answer]
        label_logp = picked.log_softmax(-1).gather(1, self.rows.labels[:, None])[:, 0]
        row_nll = self._row_mean(-label_logp)
        hits = self._row_mean((picked.argmax(-1) == self.rows.labels).to(row_nll.dtype))
        fact = self.owner[: len(self.rows.ids)]
        count = torch.bincount(fact, minlength=self.n).to(row_nll.dtype)
        nll = torch.zeros(self.n, dtype=row_nll.dtype, device=row_nll.device).index_add(0, fact, row_nll) / count
        known = torch.zeros_like(count).index_add(0, fact, (hits == 1).to(count.dtype)) == count
        kl_log = logits[len(self.rows.ids) :][torch.arange(self.n), self.kl_at].log_softmax(-1)
        if self.kl_start is None:
            self.kl_start = kl_log.detach()
        kl = s.kl * F.kl_div(self.kl_start, kl_log, log_target=True, reduction="none").sum(-1)
        decay = sum(d.norm(dim=1) / i.norm(dim=1).square() for d, i in zip(self.deltas, self.inits, strict=True))
        phi = torch.where(known, 0.1, 1.0) if s.drop else 1.0
        return phi * nll + kl + s.weight_decay * decay, nll, kl, known

    def _adder(self, delta: Tensor):
        def add(x: Float[Tensor, "row seq d_model"]) -> Tensor:
            return x + (self.where[..., None] * delta[self.owner][:, None]).to(x.dtype)

        return add

    def _row_mean(self, x: Float[Tensor, " label"]) -> Float[Tensor, " row"]:
        size = torch.bincount(self.answer_rows, minlength=len(self.rows.ids)).to(x.dtype)
        return torch.zeros(len(self.rows.ids), dtype=x.dtype, device=x.device).index_add(0, self.answer_rows, x) / size
