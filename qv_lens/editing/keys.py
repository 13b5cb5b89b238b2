"""What an edit reads at the fact's token: keys k (the FFN's activations) and values, averaged over contexts.

A request is read in several contexts: the bare prompt, and the prompt behind short prefixes that the model wrote
itself. The key is the mean of two group means, so that the bare prompt weighs one half (MEMIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qv_lens.facts.records import EditRequest
from qv_lens.facts.spans import FactToken, tokenize
from qv_lens.models.lens import Lens, at_least_float32

STARTS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class Rows:
    """Token rows of requests in contexts: `fact[r]` is the request of row r, row `clean[i]` is request i's bare prompt.

    `lookup` marks the positions at which the fact is read or written; `answer` those that predict the new answer,
    whose tokens are `labels`.
    """

    ids: tuple[tuple[int, ...], ...]
    fact: tuple[int, ...]
    clean: tuple[int, ...]
    lookup: Bool[Tensor, "row seq"]
    answer: Bool[Tensor, "row seq"]
    labels: Tensor


@torch.no_grad()
def contexts(lens: Lens, seed: int = 0, length: int = 10) -> tuple[str, ...]:
    """The bare context "{}" and five prefixes "<start> ... . {}" sampled from the model (top 5) with its own generator."""
    generator = torch.Generator().manual_seed(seed)
    rows = [list(prompt.ids) for prompt in lens.tokenize(STARTS)]
    for _ in range(length):
        logits = lens.logits(rows)
        for i, row in enumerate(rows):
            best = logits[i, len(row) - 1].float().cpu().topk(5)
            row.append(int(best.indices[torch.multinomial(best.values.softmax(0), 1, generator=generator)]))
    texts = [lens.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    clean = [" ".join(text.replace("{", " ").replace("}", " ").split()) for text in texts]
    return ("{}", *(f"{text.rstrip('. ')}. {{}}" for text in clean))


def rows_of(lens: Lens, requests: Sequence[EditRequest], templates: Sequence[str], token: FactToken) -> Rows:
    """The requests in every context, each followed by all but the last token of the new answer.

    With `token="last"` and an answer of several tokens, every predicting position is looked up (only the first could
    be reached from the last prompt token).
    """
    ids, fact, clean, looked, asked, labels = [], [], [], [], [], []
    for i, request in enumerate(requests):
        clean.append(len(ids))
        for template in templates:
            prompt = tokenize(
                lens.tokenizer, request.target.with_prompt(template.replace("{}", request.fact.prompt)), lens.prepend_bos
            )
            n, last = len(prompt.answer), prompt.last
            ids.append((*prompt.ids, *prompt.answer[:-1]))
            fact.append(i)
            asked.append(range(last, last + n))
            looked.append(range(last, last + n) if token == "last" else [prompt.position(token)])
            labels.extend(prompt.answer)
    length = max(map(len, ids))
    lookup, answer = (torch.zeros(len(ids), length, dtype=torch.bool) for _ in range(2))
    for r, (where, predicted) in enumerate(zip(looked, asked, strict=True)):
        lookup[r, list(where)] = True
        answer[r, list(predicted)] = True
    device = lens.device
    return Rows(tuple(ids), tuple(fact), tuple(clean), lookup.to(device), answer.to(device), torch.tensor(labels, device=device))


@torch.no_grad()
def read(lens: Lens, rows: Rows, sites: Sequence[str]) -> dict[str, Float[Tensor, "row d"]]:
    """The activation at each site (hook name), averaged over a row's lookup positions."""
    kept: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(x: Tensor) -> None:
            chosen = at_least_float32(x) * rows.lookup[..., None]
            kept[name] = chosen.sum(1) / rows.lookup.sum(1, keepdim=True)

        return hook

    lens.logits(rows.ids, [(name, keep(name)) for name in sites])
    return kept


def mean_over_contexts(rows: Rows, x: Float[Tensor, "row d"]) -> Float[Tensor, "fact d"]:
    """Bare prompt and mean of the prefixed ones, half each; the bare prompt alone where there are no others."""
    owner = torch.tensor(rows.fact, device=x.device)
    bare = x[list(rows.clean)]
    total = torch.zeros_like(bare).index_add_(0, owner, x)
    others = torch.bincount(owner, minlength=len(bare))[:, None] - 1
    return torch.where(others > 0, (bare + (total - bare) / others.clamp_min(1)) / 2, bare)


def clean_values(rows: Rows, x: Float[Tensor, "row d"]) -> Float[Tensor, "fact d"]:
    """The rows of the bare prompts."""
    return x[list(rows.clean)]
