"""Over what scores are added up: a prompt's rows, each row by itself, all prompts, or those of a
category."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.records import Fact
from qv_lens.models.lens import Lens
from qv_lens.trace import Rows

Over = Literal["prompt", "positions", "set", "category"]

OVERS: tuple[Over, ...] = ("prompt", "positions", "set", "category")


@dataclass(frozen=True)
class Grouping:
    """How rows (positions of prompts) are added up and named. `sequence`: a prompt's rows belong
    together."""

    lens: Lens
    """The model."""
    rows: Rows
    """The rows."""
    sequence: bool = False
    """Whether a prompt's rows belong together."""

    def groups(self, over: Over) -> Int[Tensor, " row"]:
        """Which group each row is added up in: its prompt and position, its prompt (all positions
        of it), the set, or its fact's category.

        The rows of a whole answer belong to one prompt. Raises `ConfigError` for categories that
        facts do not have."""
        if over == "set":
            return torch.zeros_like(self.rows.prompt)
        if over == "category":
            names = self.categories()
            return torch.tensor(
                [names.index(_category(self.rows.facts[p])) for p in self.rows.prompt.tolist()]
            )
        if self.sequence or over == "positions":
            return self.rows.prompt
        return torch.arange(len(self.rows.prompt))

    def categories(self) -> list[str]:
        """The categories of the facts, in order of first appearance. Raises `ConfigError` if one
        has none."""
        return list(dict.fromkeys(_category(fact) for fact in self.rows.facts))

    def labels(self, over: Over) -> list[dict[str, Any]]:
        """One record per group: `prompt` (-1 for sums), `position` and `token` where a prompt has
        several rows, `category`."""
        if over == "set":
            return [{"prompt": -1}]
        if over == "category":
            return [{"prompt": -1, "category": name} for name in self.categories()]
        rows = self.rows
        whole = self.sequence or over == "positions"
        if whole or len(rows.prompt) == len(rows.prompts):
            return [{"prompt": i} for i in range(len(rows.prompts))]
        where = list(zip(rows.prompt.tolist(), rows.positions.tolist(), strict=True))
        ids = [prompt.row("answer") for prompt in rows.prompts]
        return [
            {"prompt": i, "position": p, "token": self.lens.token_label(ids[i][p])}
            for i, p in where
        ]


def check_over(over: str) -> None:
    """Raise `ConfigError` for an unknown way to add up prompts."""
    if over not in OVERS:
        raise unknown("over", over, OVERS)


def _category(fact: Fact | str) -> str:
    name = None if isinstance(fact, str) else fact.category
    if not name:
        text = fact if isinstance(fact, str) else fact.text
        raise ConfigError(
            f"over='category' needs a category of every fact; {text!r:.200} has none: Fact(..., "
            "category=...)."
        )
    return name
