"""LocFT-BF: fine-tuning one W_out breadth first, in mini-batches, with the end of the text.

1. A fact's text is its prompt, the new answer and the end of text; the loss of a fact is the mean
   of -log p over the tokens after the prompt, that of a mini-batch the mean over its facts.
2. Epoch: all facts in a new order, cut into mini-batches (the last may be short). One step of Adam
   each, none where its loss is below `stop`.
3. Training ends after an epoch whose mean loss over the facts, measured before each step, is below
   `stop`, or after `epochs`.

Source: LocFT-BF (2025), released code (ICT-STAR/LocFT). Its padding counts by length here: with the
end of text as the padding's id the release leaves the answer's first token out of the loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qv_lens.editing.bounds import Count, NotNegative, Positive
from qv_lens.editing.job import Deltas, Job
from qv_lens.errors import EditError
from qv_lens.facts.spans import Prompt
from qv_lens.models.deltas import delta_hooks, zeros_like_parameters
from qv_lens.models.lens import Lens
from qv_lens.patch import Delta
from qv_lens.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class LocFT:
    """LocFT-BF (2025): fine-tuning of one layer's W_out, breadth first. Defaults: of the authors'
    release for Llama-3-8B, at FT's layer of GPT-J, which has none there."""

    layer: int = 21
    """The layer that is written."""
    lr: Positive = 5e-4
    """Learning rate."""
    epochs: Count = 25
    """Passes over all facts, at most."""
    mini_batch: Count = 100
    """Facts of one step."""
    stop: NotNegative = 1e-2
    """Loss (nats) below which a mini-batch takes no step, and below whose mean training ends."""
    end_of_text: bool = True
    """Whether the end of the text is trained after the answer."""

    def deltas(self, job: Job) -> Deltas:
        return job.in_turn(self._trained)

    def _trained(self, job: Job) -> Deltas:
        key = (job.lens.check_layer(self.layer), "W_out")
        prompts = job.lens.tokenize([request.target for request in job.requests])
        if self.end_of_text:
            end = _end_of_text(job.lens)
            prompts = [replace(prompt, answer=(*prompt.answer, end)) for prompt in prompts]
        leaves = zeros_like_parameters(job.lens, [key])
        job.losses.append(
            _train(self, partial(_loss, job.lens, leaves), leaves[key], prompts, job.seed)
        )
        return {key: Delta(leaves[key].detach().double())}


def _end_of_text(lens: Lens) -> int:
    ends = lens.ends_of_text
    if not ends:
        raise EditError(f"{lens.name} has no token for the end of a text: pass end_of_text=False.")
    own = lens.tokenizer.eos_token_id
    return own if own in ends else min(ends)


def _loss(lens: Lens, leaves: dict[tuple[int, str], Tensor], prompts: list[Prompt]) -> Tensor:
    """The mean over the facts of each one's mean over its tokens."""
    logp = lens.answer_logprobs(prompts, delta_hooks(lens, dict(leaves)))
    each = logp.split([len(prompt.answer) for prompt in prompts])
    return -torch.stack([tokens.mean() for tokens in each]).mean()


def _train(
    editor: LocFT,
    loss_of: Callable[[list[Prompt]], Tensor],
    leaf: Tensor,
    prompts: list[Prompt],
    seed: int,
) -> list[list[float]]:
    """Train the leaf; the mean loss of every epoch."""
    adam, order, shuffled = torch.optim.Adam([leaf], lr=editor.lr), random.Random(seed), [*prompts]
    means: list[list[float]] = []
    for _ in progress_bar(range(editor.epochs), of="fine-tuning", unit="epoch"):
        order.shuffle(shuffled)
        total = 0.0
        for i in range(0, len(shuffled), editor.mini_batch):
            chunk = shuffled[i : i + editor.mini_batch]
            adam.zero_grad()
            with torch.enable_grad():
                loss = loss_of(chunk)
                if not torch.isfinite(loss):
                    raise EditError(f"The loss is not finite in epoch {len(means)}: lower lr.")
                total += len(chunk) * loss.item()
                if loss.item() >= editor.stop:
                    loss.backward()
                    adam.step()
        means.append([total / len(prompts)])
        if means[-1][0] < editor.stop:
            break
    return means
