"""The subset that a model can be asked about (ACE, Appendix B.1): cases whose single hops it answers before any edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd

from qv_lens.errors import unknown
from qv_lens.evaluation.metrics import correct
from qv_lens.facts.prompts import G2, begins
from qv_lens.facts.records import Hop, MultiHopCase, Probe
from qv_lens.models.lens import Lens

How = Literal["cloze", "generate", "few_shot"]


def known(
    lens: Lens, cases: Sequence[MultiHopCase], how: How = "cloze", examples: Sequence[tuple[str, str]] = G2
) -> tuple[list[MultiHopCase], pd.DataFrame]:
    """The cases all of whose hops the model answers, and what it said: `case, hop, prompt, answer, right`.

    `how`: 'cloze', the answer is the argmax at each token; 'generate', the greedy continuation of the cloze begins with it
    or an alias; 'few_shot', that of "Q: <question> A:" behind `examples` (question, answer; ACE's of Appendix G.2).
    """
    if how not in ("cloze", "generate", "few_shot"):
        raise unknown("How", how, ("cloze", "generate", "few_shot"))
    asked = [(i, j, hop) for i, case in enumerate(cases) for j, hop in enumerate(case.hops)]
    shots = "".join(f"Q: {question} A: {answer}\n" for question, answer in examples)
    prompts = [shots + f"Q: {hop.question} A:" if how == "few_shot" else hop.cloze for _, _, hop in asked]
    right = _right(lens, [hop for _, _, hop in asked], prompts, how)
    rows = [
        (cases[i].case_id, j, prompt, hop.answer, hit) for (i, j, hop), prompt, hit in zip(asked, prompts, right, strict=True)
    ]
    wrong = {i for (i, _, _), hit in zip(asked, right, strict=True) if not hit}
    kept = [case for i, case in enumerate(cases) if case.hops and i not in wrong]
    return kept, pd.DataFrame(rows, columns=["case", "hop", "prompt", "answer", "right"])


def _right(lens: Lens, hops: Sequence[Hop], prompts: Sequence[str], how: How) -> list[bool]:
    if not hops:
        return []
    if how == "cloze":
        return correct(lens, [Probe(prompt, hop.answer) for prompt, hop in zip(prompts, hops, strict=True)])
    said = lens.generate(list(prompts), 12)
    return [begins(text, [hop.answer, *hop.aliases]) for text, hop in zip(said, hops, strict=True)]
