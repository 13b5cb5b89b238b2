"""What is counted: pure functions of a lens and facts.

`_acc`      the answer is the argmax at each of its tokens, teacher-forced;
`_success`  the new answer is likelier than the true one (mean log-probability of their tokens; CounterFact).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.facts.records import Fact
from qv_lens.models.lens import Lens, at_least_float32


@torch.no_grad()
def answer_logits(lens: Lens, facts: Sequence[Fact], batch_size: int = 64) -> list[Float[Tensor, "token d_vocab"]]:
    """Logits at the positions that predict each fact's answer, teacher-forced."""
    out = []
    prompts = lens.tokenize(list(facts))
    for i in range(0, len(prompts), batch_size):
        chunk = prompts[i : i + batch_size]
        logits = lens.logits([(*p.ids, *p.answer[:-1]) for p in chunk])
        out += [at_least_float32(logits[r, p.last : p.last + len(p.answer)]) for r, p in enumerate(chunk)]
    return out


def correct(lens: Lens, facts: Sequence[Fact]) -> list[bool]:
    """Whether each answer is the argmax at every one of its tokens."""
    if not facts:
        return []
    answers = [prompt.answer for prompt in lens.tokenize(list(facts))]
    logits = answer_logits(lens, facts)
    return [rows.argmax(-1).tolist() == list(ids) for rows, ids in zip(logits, answers, strict=True)]


def mean_logprob(lens: Lens, facts: Sequence[Fact]) -> list[float]:
    """Mean log-probability (nats) of each answer's tokens."""
    if not facts:
        return []
    answers = [torch.tensor(prompt.answer, device=lens.device) for prompt in lens.tokenize(list(facts))]
    logits = answer_logits(lens, facts)
    return [float(rows.log_softmax(-1).gather(1, ids[:, None]).mean()) for rows, ids in zip(logits, answers, strict=True)]


def accuracy(lens: Lens, facts: Sequence[Fact]) -> float:
    """Share of facts answered right; NaN for none."""
    hits = correct(lens, facts)
    return sum(hits) / len(hits) if hits else float("nan")
