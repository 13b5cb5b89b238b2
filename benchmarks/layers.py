"""Does attribution choose better layers for an edit than chance?

    python benchmarks/layers.py smollm2-135m --data counterfact-edit.json --out FOLDER    # hours on one core

MEMIT and ACE, with the settings of the model's presets, at layers chosen by each score, at the
preset's own and at twenty random draws of as many layers; one edit at a time, of facts that the
model knows. Layers are located over other facts that it knows: by the effects of neurons at the
subject's last token (`locate(by="effects")`), by Eq. 9 (value layers) and Eq. 10 (query layers) at
the prompt's last token, as the paper has it. Every choice is a CSV in the folder, and is not
measured again; a z* that two choices share is searched once.

Printed: efficacy, paraphrase, specificity (by probability), their harmonic mean, and how many of
the random draws are as good or better."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
from scipy.stats import hmean

import qv_lens as qv
from qv_lens.attribution.locate import Layers as Located
from qv_lens.evaluation.known_cases import known_edits

METRICS = ("efficacy_success", "paraphrase_success", "specificity_success", "efficacy_acc")
SCORED = METRICS[:3]
LOCATED_OVER, DRAWS = 50, 20
Layers = dict[str, tuple[int, ...]]


def known(lens: qv.Lens, file: str, count: int) -> list[qv.EditCase]:
    """So many edits of facts that the model knows, in the file's order."""
    cases = [case for case in qv.read(file).cases if isinstance(case, qv.EditCase)]
    edits: list[qv.EditCase] = []
    for begin in range(0, len(cases), 64):
        edits += known_edits(lens, cases[begin : begin + 64])
        if len(edits) >= count:
            break
    return edits[:count]


def choices(
    lens: qv.Lens, effects: Located, paper: Located, name: str, editor
) -> Iterator[tuple[str, Layers]]:
    """The layers of each choice, as settings of the editor: located by effects, as the paper has
    it, the preset's own, and random ones."""
    pool = range(lens.backend_adapter.first_editable, lens.n_layers - 1)
    if name == "ACE":
        values, queries = len(editor.value_layers), len(editor.query_layers)
        for chosen, located in (("effects", effects), ("Eq. 9 and 10", paper)):
            value, query = located.editable(values, queries, pool[0])
            yield chosen, {"value_layers": value, "query_layers": query}
    else:
        count = len(editor.layers)
        for chosen, ranked in (
            ("effects", effects.value),
            ("Eq. 9", paper.value),
            ("Eq. 10", paper.query),
        ):
            best = [layer for layer in ranked if layer in pool][:count]
            yield chosen, {"layers": tuple(sorted(best))}
    yield "preset", {}
    for draw in range(DRAWS):
        rng = random.Random(f"layers:{name}:{draw}")
        if name == "ACE":
            drawn = sorted(rng.sample(pool, values + queries))
            chosen = {
                "value_layers": tuple(drawn[queries:]),
                "query_layers": tuple(drawn[:queries]),
            }
        else:
            chosen = {"layers": tuple(sorted(rng.sample(pool, count)))}
        yield f"random {draw}", chosen


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a choice: the metrics' means and the harmonic mean of the three."""
    table = frame.pivot_table(
        index=["editor", "choice"], columns="metric", values="after", sort=False
    )
    table = table[list(METRICS)]
    return table.assign(score=hmean(table[list(SCORED)].clip(lower=1e-9), axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--presets", help="whose settings (default: the model's)")
    arguments = parser.parse_args()
    lens = qv.load(arguments.model)
    table = qv.presets(arguments.presets or lens.name)
    cases = known(lens, arguments.data, arguments.facts + LOCATED_OVER)
    edited, others = cases[: arguments.facts], cases[arguments.facts :]
    facts = [case.request.fact for case in others]
    print(f"{arguments.model}: {len(edited)} edits, located over {len(others)}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    statistics = qv.corpus_statistics(lens, modules=("ffn",))
    effects = qv.locate(lens, facts, "subject_last", by="effects")
    paper = qv.locate(lens, facts)
    parts = []
    for name in ("MEMIT", "ACE"):
        editor = table[name].editor
        for chosen, layers in choices(lens, effects, paper, name, editor):
            file = arguments.out / f"{name} {chosen}.csv"
            if not file.exists():
                changed = replace(editor, **layers)
                frame = qv.evaluate(
                    lens, edited, METRICS, changed, statistics=statistics, batch_size=1,
                    cache=arguments.out / "kept",
                )  # fmt: skip
                frame.assign(editor=name, choice=chosen, layers=str(layers)).to_csv(file)
            parts.append(pd.read_csv(file))
            print(measured(parts[-1]).round(3).to_string(header=len(parts) == 1), flush=True)
    whole = measured(pd.concat(parts))
    print(f"\n{whole.round(3).to_string()}")
    for name, of in whole.groupby(level="editor", sort=False):
        scores = of.droplevel("editor")["score"]
        drawn = scores[[choice for choice in scores.index if choice.startswith("random")]]
        print(f"\n{name}: random {drawn.mean():.3f} ({drawn.min():.3f} to {drawn.max():.3f})")
        for choice in scores.index.difference(drawn.index, sort=False):
            better = int((drawn >= scores[choice]).sum())
            p = (1 + better) / (1 + len(drawn))
            print(
                f"  {choice} {scores[choice]:.3f}: {better} of {len(drawn)} draws as good, p {p:.2f}"
            )


if __name__ == "__main__":
    main()
