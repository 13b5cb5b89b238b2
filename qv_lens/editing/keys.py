"""What an edit reads at the fact's token: keys k (the FFN's activations) and values, averaged over
contexts.

A request is read in several contexts: the bare prompt, and the prompt after short prefixes that the
model wrote itself. The key is the mean of two group means, so that the bare prompt weighs one half
(MEMIT). A request that is read on several multi-hop prompts has as many bare prompts: they weigh
one half together, and their order changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qv_lens.errors import EditError, check_seed
from qv_lens.facts.records import EditRequest
from qv_lens.facts.spans import FactToken, Prompt, continuation, tokenize
from qv_lens.models.lens import Lens, Start
from qv_lens.models.norms import at_least_float32

STARTS = ("The", "Therefore", "Because", "I", "You")
#: the request's own prompt, or the multi-hop prompts that end at its fact
Prompts = Literal["rewrite", "via"]
#: MEMIT's mean of two group means (the bare prompt weighs one half), or ROME's plain mean
Average = Literal["halves", "mean"]


@dataclass(frozen=True)
class ContextRows:
    """Token rows of requests in contexts: `fact[r]` is the request of row r, the rows `clean[i]`
    are request i's bare prompts (one, but for several multi-hop prompts).

    `lookup` marks the positions at which the fact is read or written; `answer` those that predict
    the new answer, whose tokens are `labels`."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids of every row."""
    fact: tuple[int, ...]
    """The request of every row."""
    clean: tuple[tuple[int, ...], ...]
    """The rows of every request's bare prompts (one, but for several multi-hop prompts)."""
    lookup: Bool[Tensor, "row seq"]
    """Where the fact is read or written."""
    answer: Bool[Tensor, "row seq"]
    """Where the new answer is predicted."""
    labels: Tensor
    """Its tokens."""

    @cached_property
    def heads(self) -> tuple[tuple[int, ...], ...]:
        """Each row up to its last lookup position: keys and values depend on nothing after it."""
        return tuple(
            row[: int(at.nonzero()[-1]) + 1] for row, at in zip(self.ids, self.lookup, strict=True)
        )

    def of(self, facts: range) -> ContextRows:
        """The rows of some of the requests, which follow one another."""
        kept = [r for r, fact in enumerate(self.fact) if fact in facts]
        begin, end = kept[0], kept[-1] + 1
        length = max(len(row) for row in self.ids[begin:end])
        labels = slice(int(self.answer[:begin].sum()), int(self.answer[:end].sum()))
        return ContextRows(
            self.ids[begin:end],
            tuple(fact - facts.start for fact in self.fact[begin:end]),
            tuple(tuple(row - begin for row in self.clean[i]) for i in facts),
            self.lookup[begin:end, :length],
            self.answer[begin:end, :length],
            self.labels[labels],
        )


@torch.no_grad()
def contexts(lens: Lens, seed: int = 0, style: str = "memit") -> tuple[str, ...]:
    """The bare context "{}" and prefixes "... . {}" sampled from the model (top 5) with its own
    generator.

    MEMIT: five of 10 tokens that begin with "The", "Therefore", ... ROME: ten of 5 and ten of 10
    tokens that begin with the start of a text. As in the releases, the length counts the first
    token."""
    generator = torch.Generator().manual_seed(check_seed(seed))
    if style == "memit":
        texts = _sampled(
            lens, [list(prompt.ids) for prompt in lens.tokenize(STARTS)], 10, generator
        )
    else:
        start = (
            lens.tokenizer.bos_token_id
            if lens.tokenizer.bos_token_id is not None
            else lens.tokenizer.eos_token_id
        )
        first = [start] if start is not None else list(lens.tokenize(STARTS[0])[0].ids)
        texts = [
            text
            for length in (5, 10)
            for text in _sampled(lens, [list(first) for _ in range(10)], length, generator)
        ]
    clean = [" ".join(text.replace("{", " ").replace("}", " ").split()) for text in texts]
    return ("{}", *(f"{text.rstrip('. ')}. {{}}" for text in clean))


def _sampled(
    lens: Lens, rows: list[list[int]], length: int, generator: torch.Generator
) -> list[str]:
    while any(len(row) < length for row in rows):
        logits = lens.logits_at(rows, [(i, len(row) - 1) for i, row in enumerate(rows)])
        for i, row in enumerate(rows):
            if len(row) >= length:
                continue
            best = logits[i].float().cpu().topk(5)
            row.append(
                int(best.indices[torch.multinomial(best.values.softmax(0), 1, generator=generator)])
            )
    return [lens.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def rows_of(
    lens: Lens,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    token: FactToken,
    prompts: Prompts = "rewrite",
) -> ContextRows:
    """The requests in every context, each followed by all but the last token of the new answer.

    `prompts='via'`: the request's multi-hop prompts instead of its own (its own where it has none);
    they have no subject to look up, so the token must be 'last'. With `token="last"` and an answer
    of several tokens, every predicting position is looked up (only the first could be reached from
    the last prompt token)."""
    if prompts == "via" and token != "last":
        raise EditError(
            f"Multi-hop prompts are read at their last token; got fact_token={token!r}."
        )
    ids, fact, clean, looked, predicting, labels = [], [], [], [], [], []
    for i, request in enumerate(requests):
        start = len(ids)
        for c, template in enumerate(templates):
            prompts_here = _asked(lens, request, template, prompts)
            if c == 0:
                clean.append(tuple(range(start, start + len(prompts_here))))
            for prompt in prompts_here:
                n, last = len(prompt.answer), prompt.last
                ids.append((*prompt.ids, *prompt.answer[:-1]))
                fact.append(i)
                predicting.append(range(last, last + n))
                looked.append(
                    range(last, last + n) if token == "last" else [prompt.position(token)]
                )
                labels.extend(prompt.answer)
    length = max(map(len, ids))
    lookup, answer = (torch.zeros(len(ids), length, dtype=torch.bool) for _ in range(2))
    for r, (where, predicted) in enumerate(zip(looked, predicting, strict=True)):
        lookup[r, list(where)] = True
        answer[r, list(predicted)] = True
    device = lens.device
    return ContextRows(
        tuple(ids),
        tuple(fact),
        tuple(clean),
        lookup.to(device),
        answer.to(device),
        torch.tensor(labels, device=device),
    )


def _asked(lens: Lens, request: EditRequest, template: str, prompts: Prompts) -> list[Prompt]:
    """The prompts of a request in one context, with the new answer's tokens."""
    if prompts == "rewrite" or not request.via:
        prompt_fact = request.target.with_prompt(template.replace("{}", request.fact.prompt))
        return [tokenize(lens.tokenizer, prompt_fact, lens.prepend_bos)]
    texts = [template.replace("{}", text) for text in request.via]
    bare = [tokenize(lens.tokenizer, text, lens.prepend_bos) for text in texts]
    space = request.fact.space
    return [
        replace(
            p, answer=continuation(lens.tokenizer, p.text, request.new, lens.prepend_bos, space)
        )
        for p in bare
    ]


@torch.no_grad()
def read(
    lens: Lens,
    rows: ContextRows,
    sites: Sequence[str],
    start: Start | None = None,
    stop: int | None = None,
) -> dict[str, Float[Tensor, "row d"]]:
    """The activation at each site (hook name), averaged over a row's lookup positions.

    `start` (the stream of `rows.heads`) leaves out the layers below, `stop` those above
    (`Lens.stream`)."""
    kept: dict[str, Tensor] = {}
    lookup = rows.lookup[:, : max(map(len, rows.heads))]

    def keep(name: str):
        def hook(x: Tensor) -> None:
            chosen = at_least_float32(x.flatten(2)) * lookup[..., None]
            kept[name] = chosen.sum(1) / lookup.sum(1, keepdim=True)

        return hook

    lens.stream(
        rows.heads,
        lens.n_layers if stop is None else stop,
        [(name, keep(name)) for name in sites],
        start,
    )
    return kept


def mean_over_contexts(
    rows: ContextRows, x: Float[Tensor, "row d"], average: Average = "halves"
) -> Float[Tensor, "fact d"]:
    """Bare prompts and mean of the prefixed ones, half each (the bare ones alone where there are no
    others); or the mean."""
    owner = torch.tensor(rows.fact, device=x.device)
    bare = clean_values(rows, x)
    total = torch.zeros_like(bare).index_add_(0, owner, x)
    count = torch.bincount(owner, minlength=len(bare))[:, None]
    if average == "mean":
        return total / count
    bare_count = torch.tensor([len(own) for own in rows.clean], device=x.device)[:, None]
    prefixed = (total - bare * bare_count) / (count - bare_count).clamp_min(1)
    return torch.where(count > bare_count, (bare + prefixed) / 2, bare)


def clean_values(rows: ContextRows, x: Float[Tensor, "row d"]) -> Float[Tensor, "fact d"]:
    """The value on each fact's bare prompt, or its mean over several."""
    return torch.stack([x[list(own)].mean(0) for own in rows.clean])


def values(rows: ContextRows, x: Float[Tensor, "row d"], mean: bool) -> Float[Tensor, "fact d"]:
    """A site's value for each fact: its bare prompt's, or the mean over its contexts (R-ROME)."""
    return mean_over_contexts(rows, x, "mean") if mean else clean_values(rows, x)
