"""How many tokens of text C0 needs: edits with C0 of 1, 3, 10 and 30 times d_mlp tokens, of two
texts.

    python benchmarks/c0.py smollm2-135m --text wikitext2-valid.txt --held-out wikitext2-test.txt

1. Edits: facts of the atlas that the model knows, each to a false answer of its kind
   (`atlas.edit_case`), one at a time. z* does not depend on C0: it is searched once per editor and
   fact.
2. For each editor, text and number of tokens: efficacy, paraphrase and specificity over the edits.
3. Perplexity of a text that was not used for C0, of the unedited model and with the sum of the
first ten edits. The second text is `pydoc_data.topics`, which every Python installation has."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

import qv_lens as qv
from qv_lens.editing.layer_by_layer import search_ahead
from qv_lens.editing.statistics import Statistics, covariance, enough
from qv_lens.evaluation.perplexity import perplexity
from qv_lens.evaluation.protocols import evaluate, total
from qv_lens.evaluation.summary import summary
from qv_lens.facts.atlas import edit_case
from qv_lens.facts.corpora import python_reference
from qv_lens.facts.files import read_texts
from qv_lens.tuning.grids import LLAMA

METRICS = (
    "efficacy_acc",
    "efficacy_success",
    "paraphrase_acc",
    "paraphrase_success",
    "specificity_acc",
    "specificity_success",
)
EDITORS = {
    "MEMIT": qv.MEMIT(layers=(3, 4, 5, 6, 7), lam=1500.0, **LLAMA),
    "ROME": qv.ROME(layer=5, **LLAMA),
    "ACE": qv.ACE(
        value_layers=(10, 11, 12),
        query_layers=(3, 4, 5, 6, 7),
        lam=600.0,
        steps=25,
        lr=0.5,
        clamp=4.0,
    ),
}
MULTIPLES = (1, 3, 10, 30)
SUMMED = 10


def known_cases(lens: qv.Lens, count: int, seed: int) -> list[qv.EditCase]:
    """Edits of atlas facts that the model knows, of all relations."""
    facts = list(qv.atlas())
    random.Random(seed).shuffle(facts)
    known, _ = qv.known(lens, facts[: 12 * count])
    return [edit_case(fact, seed) for fact in known[:count]]


def texts_of(path: Path) -> dict[str, list[str]]:
    return {
        path.stem: list(read_texts(path, qv.QVLensError)),
        "pydoc_data.topics": list(python_reference()),
    }


def statistics_of(
    lens: qv.Lens, texts: dict[str, list[str]]
) -> Iterator[tuple[str, int, Statistics]]:
    for name, lines in texts.items():
        for multiple in MULTIPLES:
            layers = range(3, 13)
            yield (
                name,
                multiple,
                covariance(lens, enough(lens, lines, multiple * lens.d_mlp), layers),
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lens = qv.load(arguments.model)
    cases = known_cases(lens, arguments.facts, arguments.seed)
    held_out = enough(lens, list(read_texts(arguments.held_out, qv.QVLensError)), 8_000)
    print(
        f"{lens.name}: {len(cases)} edits; perplexity {perplexity(lens, held_out):.3f} before",
        flush=True,
    )
    results = []
    with TemporaryDirectory() as folder:
        for name, multiple, C0 in statistics_of(lens, texts_of(arguments.text)):
            for method, editor in EDITORS.items():
                frame = evaluate(lens, cases, METRICS, editor, statistics=C0, cache=folder)
                requests = [case.request for case in cases[:SUMMED]]
                ahead = search_ahead(lens, requests, editor, folder=Path(folder))
                patches = [
                    qv.edit(lens, request, editor, statistics=C0, ahead=ahead)
                    for request in requests
                ]
                with lens.patched(total(patches)):
                    after = perplexity(lens, held_out)
                means = summary(frame).set_index("metric")["after"]
                results.append(
                    {
                        "text": name,
                        "x d_mlp": multiple,
                        "tokens": C0.tokens,
                        "editor": method,
                        **means,
                        "perplexity": after,
                    }
                )
                print(
                    pd.DataFrame(results[-1:])
                    .round(3)
                    .to_string(index=False, header=len(results) == 1),
                    flush=True,
                )
    print(pd.DataFrame(results).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
