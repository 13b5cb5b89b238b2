"""stats, edit, evaluate, tune: edits and what they need."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from qv_lens.cli.options import (
    AS_IT_IS,
    Answer,
    Cloze,
    Completed,
    EditorName,
    Loading,
    Model,
    New,
    PresetOf,
    Seed,
    Settings,
    Several,
    Subject,
    announce,
    at_least,
    check_apart,
    check_new,
    check_writable,
    loaded,
    not_empty,
    phases,
    requested,
    settings_of,
)
from qv_lens.cli.printing import print_knowledge
from qv_lens.editing.editors import check_name, spelled
from qv_lens.errors import ConfigError
from qv_lens.files import placed

if TYPE_CHECKING:
    import pandas as pd

    from qv_lens.editing.job import Editor
    from qv_lens.editing.statistics import Module
    from qv_lens.models.lens import Lens

#: tokens of the text on which perplexity is measured
HELD_OUT = 8_000


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
    from qv_lens.facts.files import check_there

    at_least("--tokens", tokens, 0)
    at_least("--max-tokens", max_tokens, 1)
    not_empty("--layers", layers)
    check_there("text", text)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(
            f"--out {out} is a file: the statistics go into a folder. Choose another one."
        )
    announce(model)

    from qv_lens.editing.kept_statistics import default_text, default_texts, kept_covariance
    from qv_lens.editing.statistics import covariance
    from qv_lens.facts.corpora import corpus

    lens = loaded(model, loading)
    source = text or default_text(lens)
    texts = corpus(source) if tokens == 0 else default_texts(lens, source, tokens, max_tokens)
    modules = ("ffn", "attn") if attention else ("ffn",)
    wanted = layers or list(range(lens.backend_adapter.first_editable, lens.n_layers))
    if out is None:
        statistics = kept_covariance(
            lens, list(texts), wanted, max_tokens=max_tokens, modules=modules
        )
    else:
        statistics = covariance(
            lens, texts, wanted, max_tokens=max_tokens, modules=modules, folder=out
        )
    if statistics.tokens < lens.d_mlp:
        print(
            f"qv-lens: warning: {statistics.tokens:,} tokens for {lens.d_mlp:,} neurons: C0 has not "
            f"full rank, and closed-form editors will refuse it. Take at least {10 * lens.d_mlp:,} "
            "(--tokens, a longer --text).",
            file=sys.stderr,
        )
    where = "the user's cache" if out is None else out
    print(
        f"{where}: C0 of layers {wanted} over {statistics.tokens} tokens of {source} (text "
        f"{statistics.corpus}, model {statistics.fingerprint})"
    )


def edit(
    prompt: Cloze,
    *,
    subject: Subject,
    answer: Answer,
    new: New,
    editor: EditorName = "MEMIT",
    settings: Settings = None,
    model: Model = "toy-gptj",
    statistics: Path | None = None,
    text: str = "",
    out: Path | None = None,
    save: Path | None = None,
    lora: Path | None = None,
    preset: PresetOf = None,
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """Edit one fact with an editor's preset, and probe it before and after.

    Parameters
    ----------
    statistics
        Folder made by qv-lens stats (default: C0 over a default text, computed once and kept in
        $QV_LENS_CACHE or the user's cache).
    text
        Text for C0, as qv-lens stats takes it, where no --statistics are given.
    out
        Folder for the patch.
    save
        Folder for the edited model, a checkpoint that transformers alone loads.
    lora
        Folder for the edit as a PEFT adapter of the model.
    """
    from qv_lens.facts.files import check_there

    check_name(editor)
    changes = settings_of(settings)
    request = requested(prompt, subject, answer, new)
    fact = request.fact
    if out is not None and (out / "patch.json").exists():
        raise ConfigError(f"{out} holds a patch already. Choose another --out.")
    if out is not None:
        check_writable(out / "patch.json")
    check_apart({"--out": out, "--save": save, "--lora": lora})
    check_new("--save", save)
    check_new("--lora", lora)
    check_there("text", text)
    announce(model)

    import qv_lens as qv
    from qv_lens.editing.edit import check_statistics
    from qv_lens.editing.job import reads_statistics
    from qv_lens.editing.kept_statistics import corpus_statistics
    from qv_lens.editing.presets import preset_of, with_settings
    from qv_lens.editing.statistics import Statistics
    from qv_lens.evaluation.answers import greedy_answers
    from qv_lens.facts.prompts import contains, one_line

    chosen = preset_of(preset or model, editor)
    used = with_settings(chosen.editor, changes)
    C0 = Statistics.load(statistics) if statistics is not None else None
    lens = loaded(model, loading)
    lens.tokenize([request.target, fact])
    if C0 is not None:
        check_statistics(lens, used, C0)
    print(f"{used}   ({_source(chosen.source, model, preset, bool(changes))})")
    layers, modules = _written(lens, used)
    print_knowledge(lens, fact)
    if C0 is None and reads_statistics(used):
        C0 = corpus_statistics(lens, text, layers, modules=modules)
    patch = qv.edit(lens, request, used, statistics=C0, seed=seed)
    adapter = (
        None if lora is None else patch.to_lora(lora)
    )  # it may be refused: nothing else is written
    before = lens.logprob([request.target, fact])
    with lens.patched(patch):
        after = lens.logprob([request.target, fact])
        (continuation,) = greedy_answers(lens, [fact], new)
        if save is not None:
            lens.save(save)
    heard = one_line(continuation)
    took = "" if contains(continuation, [new]) else f"; the edit did not take: {new} is not in it"
    print(f"After the edit: {fact.text} {heard}{took}")
    names, olds = (lens.answer_ids(each) for each in (request.target, fact))
    which = " of the first tokens" if max(len(names), len(olds)) > 1 else ""
    if names[0] == olds[0]:
        which = f" (of both the first token, {lens.token_label(names[0])!r})"
    print(
        f"log p({new}) {before[0]:.3f} -> {after[0]:.3f}, log p({answer}) {before[1]:.3f} -> "
        f"{after[1]:.3f}{which}"
    )
    print(patch.frame().round(4).to_string(index=False))
    if out is not None:
        print(patch.save(out))
    if adapter is not None:
        print(adapter)
    if save is not None:
        print(save)


def evaluate(
    cases: str = "facts",
    *,
    model: Model = "toy-gptj",
    editor: Annotated[str | None, Completed] = None,
    settings: Settings = None,
    protocol: Literal["single", "batch", "consecutive"] = "single",
    metrics: Annotated[list[str] | None, Parameter(name="--metric", consume_multiple=True)] = None,
    count: int = 16,
    text: str = "",
    statistics: Path | None = None,
    held_out: Path | None = None,
    blocks: Path | None = None,
    out: Path | None = None,
    preset: PresetOf = None,
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """What a model answers about cases, before and after an editor's edits.

    Parameters
    ----------
    cases
        facts or multihop (the bundled world), or a file in MQuAKE's, CounterFact's, ZsRE's or
        KnowEdit's format.
    editor
        An editor by name, at the model's preset; none (the default) asks the unedited model alone.
    protocol
        One case at a time, batches of 32, or one after another without putting back.
    metrics
        Names of metrics (default: those that fit the cases).
    count
        How many cases, drawn by --seed (0: 34 single edits, a batch, 100 one after another); --out
        says which.
    text
        Text for C0, as qv-lens stats takes it.
    statistics
        Folder made by qv-lens stats --out, instead.
    held_out
        A file of texts whose perplexity is measured before and after every edit (its first 8,000
        tokens).
    blocks
        A file of worked examples for multi-hop questions, separated by empty lines (default: the
        bundled world's for its own models, else ACE's five).
    out
        A CSV file for the rows, case by case.
    """
    from qv_lens.evaluation.metrics import check_metrics
    from qv_lens.facts.files import check_there, read_texts

    not_empty("--metric", metrics)
    at_least("--count", count, 0)
    for what, name in (
        ("data", cases),
        ("text", text),
        ("blocks", str(blocks or "")),
        ("held-out", str(held_out or "")),
    ):
        check_there(what, name)
    check_metrics(metrics or ())
    changes = settings_of(settings)
    named = None if editor is None or editor.lower() == "none" else editor
    if named is not None:
        check_name(named)
    options = {
        "--set": bool(settings), "--protocol": protocol != "single", "--text": bool(text),
        "--statistics": statistics is not None, "--preset": preset is not None,
    }  # fmt: skip
    unread = [option for option, there in options.items() if there and named is None]
    if unread:
        raise ConfigError(f"{unread[0]} is for an editor, and none is named: add --editor.")
    if out is not None:
        check_writable(out)
    announce(model)

    from qv_lens.editing.job import reads_statistics
    from qv_lens.editing.kept_statistics import corpus_statistics
    from qv_lens.editing.presets import preset_of, with_settings
    from qv_lens.editing.statistics import Statistics, enough
    from qv_lens.evaluation.known_cases import knowledge
    from qv_lens.evaluation.protocols import evaluate as measure
    from qv_lens.evaluation.questions import Generation
    from qv_lens.evaluation.selection import usual_count, usual_metrics
    from qv_lens.evaluation.summary import summary
    from qv_lens.facts.records import edited_facts
    from qv_lens.world.evaluation import cases_of, examples_of

    used = None
    if named is not None:
        chosen = preset_of(preset or model, named)
        used = with_settings(chosen.editor, changes)
        print(f"{used}   ({_source(chosen.source, model, preset, bool(changes))})")
    stored = Statistics.load(statistics) if statistics is not None else None
    lens = loaded(model, loading)
    layers, modules = _written(lens, used)
    drawn = cases_of(lens, cases, count or usual_count(protocol), seed)
    known = knowledge(lens, edited_facts(drawn.cases))
    if known["prompts_asked"]:
        print(
            f"Before any edit {model} knows {known['prompts_known']} of the "
            f"{known['prompts_asked']} facts."
        )
    C0 = None
    if reads_statistics(used):
        C0 = stored or corpus_statistics(lens, text, layers, modules=modules)
    ordinary = [] if held_out is None else enough(lens, read_texts(held_out), HELD_OUT)
    generation = Generation(blocks=examples_of(lens, drawn.cases, seed, str(blocks or "")))
    wanted = metrics or usual_metrics(drawn.cases)
    frame = measure(
        lens,
        drawn.cases,
        wanted,
        used,
        protocol,
        seed,
        statistics=C0,
        generation=generation,
        held_out=ordinary,
    )
    table = summary(frame).rename(columns={"low": "after: 95% from", "high": "to"})
    print(table.drop(columns=["relative_norm", "seconds"]).round(3).to_string(index=False))
    if used is not None:
        print(
            f"{frame['seconds'].mean():.1f} seconds an edit; the largest ||dW|| / ||W|| "
            f"{frame['relative_norm'].max():.3f}"
        )
    skipped = frame.attrs["skipped"]
    if skipped:
        case, reason = next(iter(skipped.items()))
        print(f"{len(skipped)} cases skipped, the first ({case}): {reason}")
    if out is not None:
        ids = [getattr(drawn.cases[i], "case_id", i) for i in frame["case"]]
        frame.insert(1, "case_id", ids)
        _write(frame, out)


def _source(source: str, model: str, preset: str | None, changed: bool) -> str:
    """Where an editor's settings come from, and whether they were made for this model."""
    origin = "the preset, changed" if changed else source
    if preset is None or preset == model:
        return origin
    return f"settings of {preset}, not tuned for this model; {origin}"


def _written(
    lens: Lens, editor: Editor | None
) -> tuple[tuple[int, ...] | None, tuple[Module, ...]]:
    """The layers and modules whose C0 an editor reads; None: all. Raises `EditError` for a layer that
    the model does not have."""
    written = getattr(editor, "written", None)
    return written(lens) if written is not None else (None, ("ffn", "attn"))


def _write(frame: pd.DataFrame, out: Path) -> None:
    with placed(out, "the rows") as partial:
        # the file that is written has another ending
        frame.to_csv(partial, index=False, compression="gzip" if out.suffix == ".gz" else None)
    print(out)


def _lacks_wrapped(names: list[str], model: str, *, found: bool) -> bool:
    """Whether SimIE would be tuned without the preset that it wraps: the model has none, and none
    is tuned before it and `found` afterwards."""
    from qv_lens.editing.presets import preset_of
    from qv_lens.tuning.grids import WRAPPED

    if "SimIE" not in names or (found and WRAPPED in names[: names.index("SimIE")]):
        return False
    try:
        preset_of(model, WRAPPED)
    except ConfigError:
        return True
    return False


def tune(
    model: Model,
    *,
    editor: Annotated[list[str] | None, Several, Completed] = None,
    text: str | None = None,
    count: int = 32,
    folder: Path | None = None,
    out: Path | None = None,
    seed: Seed = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """Choose settings of the editors for a model, by successive halving on facts that it knows; run
    it again to resume.

    Parameters
    ----------
    editor
        Which editors (default: all).
    text
        Text for C0, as qv-lens stats takes it (default: "python").
    count
        How many edits, at least 32: 16 choose the settings, the others tell which of the two best
        is better, and how good it is.
    folder
        Where trials and searches are kept (default: runs/tune- and the model's name).
    out
        The file of presets (default: in the user's cache, where presets(model) and --editor find
        it).
    """
    from qv_lens.cache import cache_folder
    from qv_lens.facts.files import check_there

    not_empty("--editor", editor)
    for name in editor or ():
        check_name(name)
    at_least("--count", count, 1)
    if text is not None:
        check_there("text", text)
    place = cache_folder()
    if out is None and place is None:
        raise ConfigError(
            "No cache is kept (QV_LENS_CACHE is empty): say with --out where the presets go."
        )
    if out is not None:
        check_writable(out)
    announce(model)

    from qv_lens.editing.job import reads_statistics
    from qv_lens.editing.kept_statistics import corpus_statistics
    from qv_lens.editing.preset_files import (
        check_weights,
        entries_of,
        entry_of,
        file_name,
        text_of,
        write_presets,
    )
    from qv_lens.tuning.grids import GRIDS, WRAPPED, grid, shape_of
    from qv_lens.tuning.tune import RUNGS, known_cases
    from qv_lens.tuning.tune import tune as choose

    at_least("--count", count, 2 * RUNGS[-1])
    names = [spelled(name, GRIDS) for name in editor or GRIDS]
    target = out or place / "presets" / file_name(model)  # pyright: ignore[reportOptionalOperand]
    check_writable(target)
    work = folder or Path("runs") / f"tune-{file_name(model).removesuffix('.toml')}"
    lens = loaded(model, loading)
    check_weights(target, lens.fingerprint)
    if _lacks_wrapped(names, lens.name, found=out is None):
        lacking = (
            f"it wraps the preset of {WRAPPED}, and none is found for {lens.name}. Tune both, without "
            f"--out: qv-lens tune {model} --editor {WRAPPED} --editor SimIE."
        )
        if editor:
            raise ConfigError(f"SimIE cannot be tuned: {lacking}")
        print(f"SimIE is left out: {lacking}")
        names.remove("SimIE")
    cases = known_cases(lens, count, seed)
    choosing, held = cases[: RUNGS[-1]], cases[RUNGS[-1] :]
    shape = shape_of(lens, [case.request.fact for case in choosing])
    print(
        f"{lens.name}: {len(choosing)} edits choose, {len(held)} are held apart; half of the "
        f"subject's part lies up to layer {shape.depth}"
    )
    reading = [name for name in names if any(map(reads_statistics, grid(name, shape)))]
    if text is not None and not reading:
        raise ConfigError(f"--text is the text for C0, which {', '.join(names)} does not read.")
    text = text or "python"
    C0 = corpus_statistics(lens, text) if reading else None
    header = {
        "model": lens.name,
        "fingerprint": lens.fingerprint,
        "text": text if reading else text_of(target),
    }
    failed: list[str] = []
    for name in names:
        statistics = C0 if name in reading else None
        with phases("tuning", unless_seen=True):
            tuned = choose(lens, name, shape, choosing, held, statistics, work)
        print(f"{tuned.editor}\n  {tuned.score_in_words}: {tuned.figures_in_words}", flush=True)
        if tuned.score <= 0:
            failed.append(name)
            print(f"  Not written: no setting of {name} gave the new answers.", flush=True)
            continue
        entries = entries_of(target) if target.exists() else {}
        entries[name] = entry_of(tuned.editor, tuned.source(lens))
        write_presets(target, header, entries)
    if failed == names:
        raise ConfigError(
            f"No setting that was tried of {', '.join(names)} gave the new answers (score 0): nothing "
            f"was written. The trials are in {work}."
        )
    print(target)
