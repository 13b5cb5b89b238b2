"""What is asked for: the token w whose log-probability a unit raises, row by row of a trace.

The answer's first token, the model's own prediction, a token id, the whole answer (teacher forced, a
row per token), or one token against another."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.spans import Positions
from qv_lens.models.lens import Lens
from qv_lens.models.norms import dtype_name
from qv_lens.trace import Rows, Trace

#: 'answer', 'predicted', 'sequence', a token id, or a pair (for, against) of answers, ids, 'answer'
#: or 'predicted'
Target = str | int | tuple[str | int, str | int]

TARGETS = ("answer", "predicted", "sequence", "a token id", "a pair of these")


@dataclass(frozen=True)
class Wanted:
    """What is asked for at each row: a token, or how much likelier it is than another."""

    lens: Lens
    """The model."""
    rows: Rows
    """Where it is read."""
    token: Int[Tensor, " row"]
    """The token asked for at each row."""
    against: Int[Tensor, " row"] | None = None
    """The other token of a contrast."""
    sequence: bool = False
    """Whether a whole answer is asked for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of scores: the weights', in float32 or better."""
        return torch.promote_types(self.lens.dtype, torch.float32)

    def attrs(self, predicted: Int[Tensor, " row"]) -> dict[str, Any]:
        """What frames and sets are labelled with; `predicted`: the model's own most likely token at
        each row. `positions` are where units lie, `read_at` where the target is read."""
        label = self.lens.token_label
        attrs = {
            **self.lens.label,
            "texts": [p.text for p in self.rows.prompts],
            "dtype": dtype_name(self.dtype),
            "target_tokens": [label(int(t)) for t in self.token],
            "target_ids": self.token.tolist(),
            "positions": self.rows.positions.tolist(),
            "read_at": self.rows.positions.tolist(),
            "target_is_argmax": (predicted == self.token).tolist(),
        }
        if self.against is None:
            return attrs
        return {
            **attrs,
            "against": [label(int(t)) for t in self.against],
            "against_ids": self.against.tolist(),
        }


def where_read(target: Target, positions: Positions = "last") -> Positions:
    """The positions at which a target is read. Raises `ConfigError` for an unknown target, or for
    positions that do not go with it."""
    target = _plain_target(target)
    if isinstance(target, str) and target not in ("answer", "predicted", "sequence"):
        raise _no_target(target)
    sequence = target == "sequence"
    if positions == "answer" and not sequence:
        raise ConfigError(
            "positions='answer' reads every token of the answer: it goes with target='sequence'."
        )
    if sequence and positions not in ("last", "answer"):
        raise ConfigError(
            "target='sequence' has its own positions, those that predict the answer; got "
            f"{positions!r}."
        )
    return "answer" if sequence else positions


def wanted_at(lens: Lens, rows: Rows, target: Target) -> Wanted:
    """What is asked for at rows: those of a trace, or the prompts' ends, where the model is asked
    what it predicts itself if that is wanted.

    Raises `ConfigError` for a token that does not exist, or a contrast of one token with itself."""
    target = _plain_target(target)
    pair = target if isinstance(target, tuple) else (target, None)
    token = _tokens(lens, rows, pair[0])
    against = None if pair[1] is None else _tokens(lens, rows, pair[1])
    if against is not None and bool((same := against == token).any()):
        text = rows.prompts[int(rows.prompt[same][0])].text
        raise ConfigError(
            f"A contrast compares two first tokens; both of {target} begin with "
            f"{lens.token_label(int(token[same][0]))!r} after {text!r:.200}."
        )
    for part, tokens in zip(pair, (token, against), strict=True):
        if isinstance(part, str) and part not in ("predicted", "sequence") and tokens is not None:
            answer_of = dict(zip(rows.prompt.tolist(), tokens.tolist(), strict=True))
            lens.warn_of_fragments(
                [rows.prompts[i].text for i in answer_of], list(answer_of.values())
            )
    return Wanted(lens, rows, token, against, target == "sequence")


def _plain_target(target: Any) -> Target:
    """The target, any integer in it as an int. Raises `ConfigError` for what is not a target."""
    if isinstance(target, tuple) and len(target) == 2:
        return _plain_target(target[0]), _plain_target(target[1])  # type: ignore[return-value]
    if isinstance(target, str):
        return target
    number: Any = target
    try:
        return operator.index(number)
    except TypeError:
        raise _no_target(target) from None


def _no_target(target: object) -> ConfigError:
    other = "To ask for another answer, pass a fact that has it: qv.Fact(prompt, subject, 'Rome')."
    return ConfigError(f"{unknown('Target', target, TARGETS)} {other}")


def _tokens(lens: Lens, rows: Rows, target: str | int) -> Int[Tensor, " row"]:
    """The token asked for at each row."""
    if isinstance(target, int):
        if not 0 <= target < lens.d_vocab:
            raise ConfigError(f"Token id {target} is outside the vocabulary of {lens.d_vocab}.")
        return torch.full_like(rows.prompt, target)
    if target == "predicted":
        return _predicted(lens, rows)
    named = list(_named(lens, rows, target))
    own = _predicted(lens, rows).tolist() if None in named else named
    token = [other if name is None else name for name, other in zip(named, own, strict=True)]
    return torch.tensor(token, device=rows.prompt.device)


def _predicted(lens: Lens, rows: Rows) -> Int[Tensor, " row"]:
    """The model's own most likely token at each row; rows that are no trace lie at the prompts'
    ends."""
    trace = rows if isinstance(rows, Trace) else lens.trace(rows.facts)
    return trace.logits.argmax(-1)


def _named(lens: Lens, rows: Rows, target: str) -> Iterator[int | None]:
    """The token that each row's prompt names; None where a bare prompt has no answer."""
    for index, position in zip(rows.prompt.tolist(), rows.positions.tolist(), strict=True):
        prompt = rows.prompts[index]
        if target == "answer":
            fact = rows.facts[index]
            yield None if isinstance(fact, str) else (prompt.answer or lens.answer_ids(fact))[0]
        elif target == "sequence":
            positions = rows.positions[rows.prompt == index].tolist()
            if tuple(positions) != prompt.positions("answer"):
                raise ConfigError(
                    "target='sequence' reads every token of the answer: trace with "
                    "positions='answer'."
                )
            yield prompt.answer[position - prompt.last]
        else:
            yield lens.answer_ids(rows.facts[index], target)[0]
