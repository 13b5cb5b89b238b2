"""Target vectors v* (z*): the value of a site at the fact's token with which the model gives the
new answer.

For all facts at once, as far as memory allows (one Adam; clamp and early stop per fact), delta
starts at 0, is added at the lookup position of every prompt of its fact, the KL prompt included,
and minimises (MEMIT; ACE Eq. 13)

    L = phi * mean over prompts of NLL(o*) + mu * KL(p_edited || p_original) at "{subject} is a"
        + wd * ||delta|| / ||init||^2

1. it = 0 .. steps - 1: forward; a fact stops when L < 0.05, all stop at the last iteration (so
   steps - 1 updates).
2. Step; project ||delta|| <= clamp * ||init||.  v* = init + delta, init the site's value on the bare prompt (`mean`: over all).
3. PMET (`drop`): delta at attention and FFN output together, each with its own clamp. Where the new
   answer is the argmax at every position of every prompt, phi is 0.1 in the NEXT step (else 1
   again), as the release sets it once the loss of a step is computed; and the fact then also stops
   if mu * KL <= 0.01.
4. MPES (`hits`): a forward in which the new answer is the argmax at every position of every
   prefixed prompt is a hit; at so many hits, which need not follow one another, the fact stops
   before anything else is asked. Source: ENCORE (Gupta et al. 2025); its release counts right
   tokens, which is this rule for answers of one token and five prefixes alone. Its other rule
   (`sure`): the fact stops where the answer's probability, the geometric mean over its tokens,
   exceeds this in the mean over all its prompts, the bare one included.
5. NAS (`anchor` = mu): of v*, the part that the FFN writes is v = v0 + delta, v0 its output on the
   bare prompt. v is scaled to the length mu; a fact whose v is longer than 2 mu is skipped: its v*
   is init. (`anchor.norm_anchor` measures mu.)
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qv_lens.editing.keys import ContextRows, Prompts, read, values
from qv_lens.errors import EditError
from qv_lens.facts.records import EditRequest, Fact
from qv_lens.facts.spans import FactToken, tokenize
from qv_lens.models.lens import Intervention, Lens, Start, log_probs
from qv_lens.patch import Patch
from qv_lens.progress import progress_bar

STOP = 0.05  # L below which a fact is done (MEMIT)
KL_STOP = 0.01
#: times mu above which NAS skips a fact
TOO_LONG = 2.0
# rows above which a pass is split by length: measured on SmolLM2, from 8 facts of 7 rows on a step is
# then 10 to 15% faster on a CPU; on a GPU a pass of few rows takes as long as one of many
APART = 40
APART_GPU = 512
#: bytes that a search on a CPU may keep for its backward pass, which holds about twice as much at its
#: peak: measured on SmolLM2, 64 facts take as long as without a limit, a tenth longer with a quarter
#: of it. On a GPU: this share of what is free.
ROOM = 2 * 2**30
ROOM_GPU = 0.5


@dataclass(frozen=True)
class Search:
    """Settings of the search for v*."""

    sites: tuple[str, ...]
    """Hook names, one delta each; the first one's target is used."""
    steps: int
    """Steps of Adam."""
    lr: float
    """Learning rate."""
    weight_decay: float
    """Weight of ||delta|| / ||init||^2."""
    clamp: float
    """Largest ||delta|| / ||init||."""
    kl: float
    """mu: weight of the KL at "{subject} is a"."""
    drop: bool = False
    """PMET's: whether phi drops once the new answer is the argmax everywhere."""
    mean: bool = False
    """Whether init is the mean over the contexts (R-ROME), not the bare prompt's."""
    hits: int = 0
    """MPES: forwards that give the new answer everywhere, after which a fact stops (0: not
    asked)."""
    sure: float = 0.0
    """MPES: the new answer's probability above which a fact stops (0: not asked)."""
    anchor: float = 0.0
    """NAS: mu, the length that the FFN's part of v* is scaled to (0: as it is)."""

    @property
    def z_layer(self) -> int:
        """The layer of the sites."""
        return int(self.sites[0].split(".")[1])


@dataclass(frozen=True)
class Targets:
    """z* by site, and per fact the losses along the way."""

    z_of: tuple[Float[Tensor, "fact d_model"], ...]
    """z* by site."""
    losses: tuple[tuple[tuple[float, float, float], ...], ...]
    """`losses[step][fact]`: (total, NLL, KL) in nats."""

    @property
    def z(self) -> Float[Tensor, "fact d_model"]:
        """z* of the first site."""
        return self.z_of[0]

    def rows(self, index: Sequence[int]) -> Targets:
        """Those of some facts."""
        return Targets(
            tuple(z[list(index)] for z in self.z_of),
            tuple(tuple(step[i] for i in index) for step in self.losses),
        )

    @classmethod
    def joined(cls, parts: Sequence[Targets]) -> Targets:
        """Those of several searches; one that stopped earlier repeats its last losses."""
        steps = max(len(part.losses) for part in parts)
        padded = [
            (*part.losses, *(part.losses[-1],) * (steps - len(part.losses))) for part in parts
        ]
        losses = zip(*padded, strict=True)
        return cls(
            tuple(torch.cat(z) for z in zip(*(part.z_of for part in parts), strict=True)),
            tuple(tuple(fact for part in step for fact in part) for step in losses),
        )


@dataclass(frozen=True)
class SearchKind:
    """The settings that editors with the same search of z* have in common: for example MEMIT, RECT
    and AlphaEdit at one layer with one clamp."""

    search: Search
    """The settings."""
    token: FactToken
    """Where z* is read."""
    prompts: Prompts
    """What is read."""
    prefix: str
    """A text before every prompt."""


@dataclass(frozen=True)
class PrecomputedTargets:
    """z* of requests that are edited one by one on the same weights, searched together. The object
    records the kind of search, the contexts, the model, and the patches and interventions in force,
    and serves no others. (It cannot detect weights that were written without the patch stack:
    search again after that.)
    `seconds`: each request's share of the search."""

    kind: SearchKind
    """The kind of search."""
    fingerprint: str
    """The model."""
    in_force: tuple[Patch | Intervention, ...]
    """Patches and interventions at the time."""
    templates: tuple[str, ...]
    """The contexts."""
    found: Mapping[EditRequest, Targets]
    """z* by request."""
    seconds: Mapping[EditRequest, float]
    """Each request's share of the search."""

    def check(self, lens: Lens, kind: SearchKind | None, templates: Sequence[str] | None) -> None:
        """Raise `EditError` unless this is that kind of search on the weights as they are."""
        now = (*lens.patches, *lens.interventions)
        same = len(now) == len(self.in_force) and all(
            a is b for a, b in zip(now, self.in_force, strict=True)
        )
        for right, what in (
            (self.kind == kind, "with another editor"),
            (self.fingerprint == lens.fingerprint and same, "on other weights"),
            (templates is None or tuple(templates) == self.templates, "in other contexts"),
        ):
            if not right:
                raise EditError(
                    f"These targets were searched {what}: search again (layer_by_layer.search_ahead)."
                )

    def of(self, requests: Sequence[EditRequest]) -> Targets:
        """Raises `EditError` for a request that was not searched."""
        missing = [r.fact.text for r in requests if r not in self.found]
        if missing:
            raise EditError(
                f"No target was searched for {missing[0]!r}: name it in layer_by_layer.search_ahead."
            )
        return Targets.joined([self.found[r] for r in requests])


def search(
    lens: Lens,
    requests: Sequence[EditRequest],
    rows: ContextRows,
    token: FactToken,
    settings: Search,
) -> Targets:
    """Optimise v* of every request. Raises `EditError` if the loss is not finite, no gradient
    reaches a site, or an intervention at some tokens of a prompt is in force (the search's own rows
    have others)."""
    somewhere = [getattr(intervention, "positions", "all") for intervention in lens.interventions]
    if where := [positions for positions in somewhere if positions != "all"]:
        raise EditError(
            f"An intervention with positions={where[0]!r} is in force: an edit is computed without "
            "it, or with positions='all'."
        )
    parts = []
    for facts in _together(lens, rows, settings):
        kl = _kl_rows(lens, requests[facts.start : facts.stop], token)
        parts.append(_Problem(lens, rows.of(facts), kl, settings).run())
    return Targets.joined(parts)


def _together(lens: Lens, rows: ContextRows, settings: Search) -> list[range]:
    """The facts that are searched together: as many as their backward pass has room for, at least
    one."""
    # of a token, a block keeps about so many numbers of each size; of one that is asked, the logits,
    # their log-softmax and the gradients of both
    of_token = (lens.n_layers - settings.z_layer) * (8 * lens.d_model + 5 * lens.d_mlp)
    tokens = torch.tensor([len(row) for row in rows.ids], device=rows.lookup.device)
    tokens = (tokens - rows.lookup.int().argmax(1)).tolist()
    counts = rows.answer.sum(1).tolist()
    size = [0] * len(rows.clean)
    for fact, many, few in zip(rows.fact, tokens, counts, strict=True):
        size[fact] += many * of_token * lens.dtype.itemsize + 4 * few * lens.d_vocab * 4
    room = float(ROOM)
    if lens.device.type == "cuda":
        room = ROOM_GPU * torch.cuda.mem_get_info(lens.device)[0]
    begins, held = [0], 0.0
    for fact, needed in enumerate(size):
        held += needed
        if held > room and fact > begins[-1]:
            begins.append(fact)
            held = needed
    return [range(*pair) for pair in itertools.pairwise([*begins, len(size)])]


def _kl_rows(
    lens: Lens, requests: Sequence[EditRequest], token: FactToken
) -> tuple[list[tuple[int, ...]], list[int]]:
    prompts = [
        tokenize(lens.tokenizer, Fact("{} is a", r.fact.subject, r.fact.answer), lens.prepend_bos)
        for r in requests
    ]
    return [p.ids for p in prompts], [p.position(token) for p in prompts]


def ffn_part(
    lens: Lens, rows: ContextRows, settings: Search, start: Start
) -> Float[Tensor, "fact d_model"]:
    """v0: what the z layer's FFN adds at the fact's token of the bare prompt; of a search at the
    FFN's own output, that output."""
    backend, site, layer = lens.backend_adapter, settings.sites[0], settings.z_layer
    if site == backend.resid_post(layer):
        site = backend.mlp_out(layer)
    stream = read(lens, rows, (site,), start, layer + 1)[site]
    return values(rows, stream, settings.mean)


def _anchored(
    z_of: Sequence[Float[Tensor, "fact d_model"]],
    inits: Sequence[Float[Tensor, "fact d_model"]],
    v0: Float[Tensor, "fact d_model"],
    mu: float,
) -> list[Float[Tensor, "fact d_model"]]:
    """NAS: v* with the FFN's part, the first, scaled to mu; init of every part where that one is too
    long."""
    (z, *others), (init, *theirs) = z_of, inits
    v = z - init + v0
    length = v.norm(dim=1, keepdim=True)
    long = length > TOO_LONG * mu
    if long.any():
        warnings.warn(
            f"{int(long.sum())} of {len(z)} facts are skipped: their v* is longer than twice the "
            f"anchor of {mu:.3g} (the largest is {float(length.max()):.3g}).",
            stacklevel=4,
        )
    scaled = torch.where(length > 0, v * mu / length.clamp_min(1e-30), v)
    kept = zip((init - v0 + scaled, *others), (init, *theirs), strict=True)
    return [torch.where(long, start, optimum) for optimum, start in kept]


class _Step(NamedTuple):
    """What one forward gives, per fact."""

    total: Tensor
    """L."""
    nll: Tensor
    """Its NLL term, without phi."""
    kl: Tensor
    """Its KL term."""
    right: Tensor
    """Whether the new answer is the argmax at each of its tokens, after every prompt."""
    right_prefixed: Tensor
    """Whether it is after every prompt with a context in front."""
    probability: Tensor
    """The new answer's, per token, in the mean over the prompts."""


class _Problem:
    """The search's tensors, set up once; `run` is the loop.

    Rows are those of the contexts and, after them, one KL prompt per fact. Everything that no delta
    changes is computed once: the stream before the z layer, and keys and values of the tokens
    before a row's first lookup position. The rows of a finished fact leave the pass; logits are
    formed only where something reads them."""

    def __init__(
        self,
        lens: Lens,
        rows: ContextRows,
        kl: tuple[list[tuple[int, ...]], list[int]],
        settings: Search,
    ) -> None:
        self.lens = lens
        self.settings = settings
        self.n = len(rows.clean)
        device = lens.device
        kl_ids, kl_positions = kl
        contexts = len(rows.ids)
        self.ids = [*rows.ids, *kl_ids]
        self.owner = torch.tensor([*rows.fact, *range(self.n)], device=device)
        kl_rows = torch.arange(contexts, len(self.ids), device=device)
        self.kl_asked = torch.stack([kl_rows, torch.tensor(kl_positions, device=device)])
        self.where = self._lookups(rows, contexts)
        self.asked = torch.stack(rows.answer.nonzero(as_tuple=True))
        self.labels = rows.labels
        self.z_layer = settings.z_layer
        with torch.no_grad():  # nothing below the z layer changes during the search
            self.below = lens.stream(self.ids, self.z_layer)
            first = self.where.int().argmax(1)
            self.past = lens.past((self.z_layer, self.below), first)
        self.first = first if self.past is not None else torch.zeros_like(first)
        self.length = torch.tensor([len(row) for row in self.ids], device=device) - self.first
        start = (self.z_layer, self.below[:contexts, : max(map(len, rows.heads))])
        inits = read(lens, rows, settings.sites, start, self.z_layer + 1)
        self.inits = [values(rows, inits[site], settings.mean) for site in settings.sites]
        self.deltas = [torch.zeros_like(init, requires_grad=True) for init in self.inits]
        self.ffn = None if not settings.anchor else ffn_part(lens, rows, settings, start)
        self.prefixed = torch.ones(len(self.ids), dtype=torch.bool, device=device)
        contexts_of = Counter(rows.fact)
        for fact, bare in enumerate(rows.clean):
            if contexts_of[fact] > len(bare):  # else the bare prompt alone counts
                self.prefixed[list(bare)] = False
        self.kl_start: Tensor | None = None

    def _lookups(self, rows: ContextRows, contexts: int) -> Tensor:
        """Where delta is added: at the fact's token of every row, the KL prompts included."""
        longest = max(map(len, self.ids))
        where = torch.zeros(len(self.ids), longest, dtype=torch.bool, device=self.owner.device)
        where[:contexts, : rows.lookup.shape[1]] = rows.lookup
        kl_rows, kl_positions = self.kl_asked
        where[kl_rows, kl_positions] = True
        return where

    def run(self) -> Targets:
        s, losses = self.settings, []
        adam = torch.optim.Adam(self.deltas, lr=s.lr)
        active = torch.ones(self.n, dtype=torch.bool, device=self.owner.device)
        total = nll = kl = torch.zeros(self.n, device=self.owner.device)
        dropped, hits = torch.zeros_like(active), torch.zeros_like(total, dtype=torch.long)
        for step in progress_bar(range(s.steps), of="target vectors", unit="step"):
            with torch.enable_grad():
                now = self._loss(active, dropped)
                if step == 0:
                    self._check_reach(now.nll)
            total, nll, kl = (
                torch.where(active, a.detach(), b)
                for a, b in ((now.total, total), (now.nll, nll), (now.kl, kl))
            )
            losses.append(tuple(zip(total.tolist(), nll.tolist(), kl.tolist(), strict=True)))
            if not torch.isfinite(total).all():
                raise EditError(
                    f"The loss of the target vectors is not finite at step {step}: lower lr or "
                    "clamp."
                )
            finished = total < STOP
            if s.hits:
                hits += active & now.right_prefixed
                finished |= hits >= s.hits
            if s.sure:
                finished |= now.probability > s.sure
            if s.drop:
                finished |= now.right & (kl <= KL_STOP)
                dropped = now.right
            going = active & ~finished
            if step == s.steps - 1 or not going.any():
                break
            with torch.enable_grad():  # also under a caller's torch.no_grad()
                self._update(adam, now.total, going)
            active = going
        z_of = [
            (init + delta).detach().double()
            for init, delta in zip(self.inits, self.deltas, strict=True)
        ]
        if self.ffn is not None:
            inits = [init.double() for init in self.inits]
            z_of = _anchored(z_of, inits, self.ffn.double(), s.anchor)
        return Targets(tuple(z_of), tuple(losses))

    def _check_reach(self, nll: Tensor) -> None:
        """Raise `EditError` where the probability of a fact's new answer does not depend on its
        delta at all."""
        gradients = torch.autograd.grad(
            nll.sum(), self.deltas, retain_graph=True, allow_unused=True
        )
        felt = sum((g.abs().sum(1) for g in gradients if g is not None), torch.zeros_like(nll))
        unreached = [
            i
            for i, (g, loss) in enumerate(zip(felt.tolist(), nll.tolist(), strict=True))
            if g == 0 and loss > STOP
        ]
        if unreached:
            which = (
                "" if len(unreached) == self.n else f" of {len(unreached)} of the {self.n} facts"
            )
            raise EditError(
                f"No gradient reaches the site{which}: after the last edited layer nothing reads "
                "the fact's token any more. Choose value layers below the model's last layer, or "
                "fact_token='last'."
            )

    def _update(self, adam: torch.optim.Optimizer, total: Tensor, active: Tensor) -> None:
        before = [delta.detach().clone() for delta in self.deltas]
        adam.zero_grad()
        total[active].sum().backward()
        adam.step()
        with torch.no_grad():
            for delta, old, init in zip(self.deltas, before, self.inits, strict=True):
                limit = self.settings.clamp * init.norm(dim=1, keepdim=True)
                delta.mul_(
                    (limit / delta.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
                )
                delta.copy_(torch.where(active[:, None], delta, old))

    def _loss(self, active: Tensor, dropped: Tensor) -> _Step:
        """One forward, phi 0.1 where `dropped`; 0 for facts not active."""
        live = active[self.owner].nonzero()[:, 0]
        place = torch.full((len(self.ids),), -1, device=live.device)
        place[live] = torch.arange(len(live), device=live.device)
        stream = self._stream(live)
        nll, right, right_prefixed, probability = self._nll(stream, place)
        kl = self._kl(stream, place, nll)
        decay = sum(
            delta.norm(dim=1) / init.norm(dim=1).square()
            for delta, init in zip(self.deltas, self.inits, strict=True)
        )
        phi = torch.where(dropped, 0.1, 1.0)
        total = phi * nll + kl + self.settings.weight_decay * decay
        return _Step(total, nll, kl, right, right_prefixed, probability)

    def _nll(self, stream: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per fact `nll, right, right_prefixed, probability` of a `_Step`."""
        kept = place[self.asked[0]] >= 0
        rows, positions = self.asked[:, kept]
        labels = self.labels[kept]
        logp = log_probs(self.lens.read_out(stream[place[rows], positions - self.first[rows]]))
        tokens = torch.bincount(rows, minlength=len(self.ids)).to(logp.dtype)
        per_token = -logp.gather(1, labels[:, None])[:, 0] / tokens[rows]
        wrong = (logp.argmax(-1) != labels).to(logp.dtype)
        zeros = torch.zeros(self.n, dtype=logp.dtype, device=logp.device)
        distinct = rows.unique()
        owners = self.owner[distinct]
        prompts = zeros.index_add(0, owners, torch.ones_like(owners, dtype=logp.dtype))
        nll = zeros.index_add(0, self.owner[rows], per_token) / prompts.clamp_min(1)
        of_row = torch.zeros_like(tokens).index_add(0, rows, per_token.detach())
        probability = zeros.index_add(0, owners, (-of_row[distinct]).exp()) / prompts.clamp_min(1)
        right, right_prefixed = (
            zeros.index_add(0, self.owner[rows], missed) == 0
            for missed in (wrong, wrong * self.prefixed[rows])
        )
        return nll, right, right_prefixed, probability

    def _kl(self, stream: Tensor, place: Tensor, like: Tensor) -> Tensor:
        """mu KL(p_edited || p_original) after the KL prompt, per fact."""
        kept = place[self.kl_asked[0]] >= 0
        rows, positions = self.kl_asked[:, kept]
        kl_log = log_probs(self.lens.read_out(stream[place[rows], positions - self.first[rows]]))
        if self.kl_start is None:
            self.kl_start = kl_log.detach()  # the first step: every fact is active
        facts = self.owner[rows]
        term = self.settings.kl * F.kl_div(
            self.kl_start[facts], kl_log, log_target=True, reduction="none"
        ).sum(-1)
        return torch.zeros_like(like).index_add(0, facts, term)

    def _stream(self, live: Tensor) -> Float[Tensor, "live seq d_model"]:
        """The final stream of the live rows from `first` on, deltas added at their sites."""
        out = self.below.new_zeros(len(live), int(self.length[live].max()), self.below.shape[-1])
        # many rows: those of nearly one length together, so that little is padded (a few rows: one
        # pass is cheaper than two)
        most = APART_GPU if out.is_cuda else APART
        apart = self.past is not None and len(live) > most
        size = (self.length[live] + 1) // 2 if apart else torch.zeros_like(live)
        for group in size.unique():
            kept = (size == group).nonzero()[:, 0]
            part = self._group(live[kept])
            out[kept, : part.shape[1]] = part
        return out

    def _group(self, rows: Tensor) -> Float[Tensor, "row seq d_model"]:
        first, longest = self.first[rows], int(self.length[rows].max())
        at = (first[:, None] + torch.arange(longest, device=rows.device)).clamp_max(
            self.below.shape[1] - 1
        )
        below, where = self.below[rows[:, None], at], self.where[rows[:, None], at][..., None]
        owner, ids = self.owner[rows], [self.ids[row][self.first[row] :] for row in rows.tolist()]

        def adder(delta: Tensor):
            return lambda x: x + (where * delta[owner][:, None]).to(x.dtype)

        hooks = list(zip(self.settings.sites, map(adder, self.deltas), strict=True))
        past = self.past and self.past.rows(rows)
        return self.lens.stream(ids, self.lens.n_layers, hooks, (self.z_layer, below), past)
