"""How well a model predicts ordinary text: what edits should leave as it was."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, log
from sys import float_info

import torch

from qv_lens.errors import ConfigError, several
from qv_lens.models.lens import Lens, log_probs

#: nats whose exponential is still a number
LARGEST = log(float_info.max)
#: tokens of a text that are read, and texts in one pass
LONGEST, TOGETHER = 512, 8


@torch.no_grad()
def perplexity(lens: Lens, texts: Sequence[str]) -> float:
    """exp of the mean loss (nats) of every token of the texts but each one's first, on the weights
    as they now are, interventions in force included; of a text the first 512 tokens.

    Raises `ConfigError` for a single string, or texts of fewer than two tokens."""
    every = several(texts)
    if every is None:
        raise ConfigError(f"perplexity takes several texts, [text, ...], got {texts!r:.60}.")
    longest = min(LONGEST, lens.backend_adapter.cfg.n_ctx)
    filled = [text for text in every if not isinstance(text, str) or text.strip()]
    rows = [list(prompt.ids)[:longest] for prompt in lens.tokenize(filled)] if filled else []
    rows = sorted((row for row in rows if len(row) > 1), key=len)
    if not rows:
        raise ConfigError("There is no text to measure perplexity on: each has at most one token.")
    loss, count = 0.0, 0
    for i in range(0, len(rows), TOGETHER):
        chunk = rows[i : i + TOGETHER]
        logits = lens.logits(chunk)
        for logit, row in zip(logits, chunk, strict=True):
            logp = log_probs(logit[: len(row) - 1])
            wanted = torch.tensor(row[1:], device=logp.device)
            loss -= float(logp.gather(1, wanted[:, None]).double().sum())
            count += len(row) - 1
    mean = loss / count
    return exp(mean) if mean < LARGEST else inf
