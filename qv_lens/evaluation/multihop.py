"""Multi-hop accuracy by chain of thought (MQuAKE; ACE, Appendix G.1).

A case counts as right if any of its questions is: greedy continuation of few-shot blocks + "Question: q\\nThoughts:",
the text behind the first "Answer:" equal to an accepted answer (case and outer punctuation aside).
"""

from __future__ import annotations

from collections.abc import Sequence

from qv_lens.facts.prompts import answered, cot_prompt, matches, parse_answer
from qv_lens.models.lens import Lens


def chain_of_thought(
    lens: Lens,
    questions: Sequence[Sequence[str]],
    accepted: Sequence[Sequence[str]],
    blocks: Sequence[str],
    max_new_tokens: int = 100,
) -> list[list[bool]]:
    """For each case, whether each of its questions is answered with one of the accepted answers."""
    flat = [cot_prompt(question, blocks) for case in questions for question in case]
    answers = iter([parse_answer(text) for text in lens.generate(flat, max_new_tokens, enough=answered)] if flat else [])
    return [[matches(next(answers), names) for _ in case] for case, names in zip(questions, accepted, strict=True)]
