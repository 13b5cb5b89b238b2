"""ACE, Table 5: FFN's and attention's importance at every token of a prompt, and what the model
would say there; and the effects of the neurons there on log p of the answer, added up (ours).

    qv-lens run experiments/ace/table_5.py
    qv-lens run experiments/ace/table_5.py --model EleutherAI/gpt-j-6B \\
        --set facts=MQuAKE-CF-3k-v2.json

MQuAKE-CF-3k-v2.json is the release's file.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from experiments.ace import BY_EFFECT, NO_CODE, sums_to_nothing
from experiments.decide import NOT_MEASURED, Claim, Verdict, decided, difference, together
from experiments.models import STUDIED
from experiments.prompts import asked, check_asked
from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.layers import by_token
from qv_lens.evaluation.intervals import UNBOUNDED
from qv_lens.evaluation.known_cases import knowledge
from qv_lens.facts.spans import Prompt
from qv_lens.models.lens import Lens
from qv_lens.plots import token_bars
from qv_lens.plots.parts import quoted

# all that exist where there are fewer; the figure shows the first
SETTINGS = {"category": "sport", "prompts": 100}
GRID = {"model": STUDIED, "seed": [0]}
MEASURES = ("ffn", "attn")


@dataclass(frozen=True)
class Task:
    """Prompts of a category, each by itself."""

    model: str
    """The model's name."""
    category: str = "sport"
    """One of ACE's categories, or 'all'."""
    prompts: int = 100
    """How many prompts are drawn."""
    seed: int = 0
    """Which ones."""
    facts: str = ""
    """A file or dataset of facts or chains (default: `prompts.usual`)."""

    def __post_init__(self) -> None:
        check_asked(self)


def rows(task: Task, lens: Lens) -> pd.DataFrame:
    """Per `prompt`: `position, token, ffn, attn` (nats; I of the answer's first token, by the layer
    whose output adds most), `effect` (nats: the effects of all neurons there on log p of the
    answer, added up; NaN where `sums_to_nothing`), `promoted`: the likeliest next tokens there, `place` ('subject', 'first
    behind it', 'last', 'other')."""
    parts = []
    facts = asked(lens, task)
    for i, fact in enumerate(facts):
        frame = by_token(lens, fact)
        places = _places(lens.tokenize(fact)[0])
        neurons = neuron_effects(lens, fact, None, positions="all").frame
        effect = neurons.groupby("position")["score"].sum(min_count=1).reindex(frame["position"])
        if sums_to_nothing(lens, "ffn"):
            effect[:] = float("nan")
        parts.append(
            frame.assign(
                effect=effect.to_numpy(),
                promoted=frame["promoted"].map(quoted),
                place=places,
                prompt=i,
                text=fact.text,
                answer=fact.answer,
            )
        )
    return pd.concat(parts, ignore_index=True).assign(**knowledge(lens, facts))


def _places(prompt: Prompt) -> list[str]:
    first, last = prompt.subject or (0, -1)
    named = {last + 1: "first behind it"} if prompt.subject else {}
    named |= dict.fromkeys(range(first, last + 1), "subject") | {prompt.last: "last"}
    return [named.get(at, "other") for at in range(len(prompt.ids))]


def figure(frame: pd.DataFrame) -> go.Figure:
    """A bar per token of the first prompt, after its first token."""
    return token_bars(after_the_sink(frame), "Importance by token, after the first (ACE, Table 5)")


def after_the_sink(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows without each prompt's first token. Heads that find nothing attend there (an attention
    sink), and the layers that write its massive activation score 26 (Qwen) and 31 nats (SmolLM2),
    ten and four times as much as the others on average: a mean with it in says nothing of them."""
    return frame[frame["position"] > 0]


def converging_tokens(frame: pd.DataFrame) -> Verdict:
    """By I of the best FFN layer and the best attention layer at a token."""
    return higher_than_others(frame.assign(total=frame["ffn"] + frame["attn"]))


def converging_effects(frame: pd.DataFrame) -> Verdict:
    """By the effects of the neurons at a token on log p of the answer, each for itself, added up."""
    if "effect" not in frame or frame["effect"].isna().all():
        return NOT_MEASURED
    return higher_than_others(frame.assign(total=frame["effect"]))


def higher_than_others(whole: pd.DataFrame) -> Verdict:
    """The token after the subject and the last one, each against the mean of those in between, which
    decides; and of all others but the prompt's first."""
    whole = after_the_sink(whole)
    place = whole["place"].where(whole["place"].isin(CONVERGING), "others")
    means = whole.pivot_table(index="prompt", columns=place, values="total", aggfunc="mean")
    between = whole[_between(whole)].groupby("prompt")["total"].mean().reindex(means.index)
    lines, verdicts = [], []
    for name, where in CONVERGING.items():
        gap = difference(means[name], between, UNBOUNDED)
        rest = difference(means[name], means["others"], UNBOUNDED)
        lines.append(
            f"{where} − in between {gap.mean:+.2f} {gap.spread(digits=2)} nats (− all others "
            f"{rest.mean:+.2f} {rest.spread(digits=2)})"
        )
        verdicts.append(decided(gap))
    return f"{'; '.join(lines)} ({gap.cases} prompts)", together(verdicts)


#: the tokens where, by the paper, semantics converge
CONVERGING = {"first behind it": "after the subject", "last": "last token"}


def _between(whole: pd.DataFrame) -> pd.Series:
    """Which rows are of tokens between the two converging ones of their prompt."""
    at = {
        name: whole["prompt"].map(
            whole[whole["place"] == name].groupby("prompt")["position"].first()
        )
        for name in CONVERGING
    }
    return (whole["position"] > at["first behind it"]) & (whole["position"] < at["last"])


CLAIMS = (
    Claim(
        source="ACE, Table 5",
        words=(
            "importance rises most where semantics converge ('plays' 0.99, 'of' 0.85), not in "
            "between"
        ),
        statistic=(
            "importance after the subject and at the last token, each minus the mean of the tokens "
            "in between, which decides (and of all others but the prompt's first, an attention sink)"
        ),
        decide=converging_tokens,
        release=NO_CODE,
    ),
    Claim(
        source="ACE, Table 5",
        words=f"the same, {BY_EFFECT}",
        statistic="the same, effects of all neurons at a token, added up",
        decide=converging_effects,
    ),
)
