"""What the verbs print about a model, a fact and a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from qv_lens.case_study import Study
    from qv_lens.facts.records import Fact
    from qv_lens.models.lens import Lens
    from qv_lens.neurons import NeuronSet


def print_knowledge(lens: Lens, fact: Fact) -> None:
    """Say, before anything is done, whether the model knows the fact."""
    from qv_lens.evaluation.answers import greedy_answers, tell
    from qv_lens.facts.prompts import one_line

    knows = tell(lens, [fact])[0].right
    (text,) = greedy_answers(lens, [fact])
    if knows:
        print(f"{lens.name} knows the fact. It says: {fact.text} {one_line(text)}")
    else:
        print(
            f"{lens.name} does not know the fact: it says {text.strip()!r}, not {fact.answer!r} "
            f"({of_answer(lens, fact)} {lens.logprob(fact):.3f}). What follows is about an answer "
            "that it does not give."
        )


def of_answer(lens: Lens, fact: Fact) -> str:
    """What `lens.logprob` is of."""
    tokens = lens.answer_ids(fact)
    part = "" if len(tokens) == 1 else f"'s first token {lens.token_label(tokens[0])!r}"
    return f"log p of the answer{part}"


def print_facts(
    lens: Lens, facts: Sequence[Fact], value: NeuronSet, query: NeuronSet, tokens: int = 4
) -> None:
    """A line for each fact: whether it is known, log p of its answer, its best value neuron with
    what it promotes, and its best query neuron."""
    from qv_lens.attribution.projection import vocabulary
    from qv_lens.evaluation.answers import correct, greedy_answers
    from qv_lens.facts.prompts import one_line

    known, logprobs = correct(lens, facts), lens.logprob(facts)
    texts = greedy_answers(lens, facts, least=6)
    print(
        f"{lens.name} knows {sum(known)} of them (every token of the answer is the likeliest). log p "
        "is that of its first token."
    )
    words = vocabulary(lens, value.top(1))
    best = query.top(1).frame.set_index("prompt")
    for row in words.itertuples():
        fact = facts[row.prompt]
        heard = one_line(texts[row.prompt])
        right = "known" if known[row.prompt] else f'not known, it says "{heard}"'
        promoted = " ".join(token.strip() for token in row.promoted[:tokens])
        fed = best.loc[row.prompt] if row.prompt in best.index else None
        by = "" if fed is None else f"; query f{fed['layer']:.0f}-{fed['neuron']:.0f}"
        print(
            f"  {fact.text} {fact.answer}: {right}, log p {logprobs[row.prompt]:.3f}; value "
            f"f{row.layer}-{row.neuron} ({promoted}){by}"
        )


def print_removal(removal: pd.DataFrame) -> None:
    """log p by how many units are taken out or kept (columns of `faithfulness`, and `text`), and at
    how many taken out the answer is lost."""
    from qv_lens.evaluation.faithfulness import lost_at

    curve = removal.groupby(["text", "ranking", "k"], sort=False)["logprob"].mean().unstack("k")
    print(curve.round(2).to_string())
    if removal["kept"].all():
        return
    of = removal.groupby("prompt").agg(text=("text", "first"), known=("known", "all"))
    lost = lost_at(removal).groupby(["prompt", "ranking"], sort=False)["k"]
    for (prompt, ranking), draws in lost:  # pyright: ignore[reportGeneralTypeIssues]
        count, known = len(draws), of.loc[prompt, "known"]
        answer = "not lost" if known else "not known before"
        if draws.count():
            answer = f"its first token lost at {draws.median():.0f} or fewer"
        share = f" ({draws.count()} of {count} draws)" if count > 1 else ""
        print(f"  {of.loc[prompt, 'text']}, by {ranking}: {answer}{share}")


def print_study(study: Study) -> None:
    from qv_lens.evaluation.ablation import DROP

    fact = study.request.fact
    knows = (
        ""
        if study.known
        else "; it does not know this fact, and what follows is about an answer that it does not give"
    )
    print(
        f"\n{fact.text} {fact.answer} -> {study.request.new}   (the model answers {study.answered.strip()!r}; log p of the first token of {fact.answer!r} {study.logprob:.3f}{knows})"
    )
    kinds = study.material[study.material["asked"] > 0]
    known = [f"{row.known} of {row.asked} {row.kind}" for row in kinds.itertuples()]
    print(
        f"Beside it are asked what the model answers before anything is done: {', '.join(known)}."
    )
    print_neurons("Value neurons", study.value_tokens)
    print_neurons("Query neurons", study.query_tokens)
    print_neurons("Neurons of the largest effect", study.effect_tokens)
    print(
        f"\nThe best of {study.settings['neurons']:,} neurons zeroed at the last token: log p of the answer's first token, by how many"
    )
    print_removal(study.removal)
    print(
        f"\nLayers by effect at the subject, strongest first: value {study.layers.value[:8]}, query {study.layers.query[:8]}"
    )
    if len(study.ablation):
        print("\nZeroing 1% of the neurons")
        print(
            study.ablation.groupby(["neurons", "group"], sort=False)[["count", *DROP]]
            .mean()
            .round(3)
            .to_string()
        )
    if len(study.suppression):
        print("\nSilencing query neurons, two-hop prompts")
        print(study.suppression.round(3).to_string(index=False))
    print("\nEdit, before and after")
    print(
        study.edits[["variant", "layers", "metric", "before", "after", "cases"]]
        .round(3)
        .to_string(index=False)
    )
    print()
    for row in study.probes.to_dict("records"):
        answers = "; ".join(
            f"{name}: {text!r}"
            for name, text in row.items()
            if name not in ("kind", "prompt", "wanted")
        )
        print(f"  {row['kind']}: {row['prompt']} (wanted {row['wanted']!r})  {answers}")
    print(f"Weights given back bit for bit: {'yes' if study.restored else 'no'}")


def print_neurons(title: str, frame: pd.DataFrame) -> None:
    print(f"\n{title}: neuron, coefficient, score, promoted tokens")
    for row in frame.itertuples():
        tokens = " ".join(token.strip() for token in row.promoted[:6])
        print(f"  f{row.layer}-{row.neuron:<6} {row.coefficient:>8.3f} {row.score:>9.4f}  {tokens}")
