"""Which reading of "layer importance" made the lists that the ACE release publishes?

    python -m experiments.ace.published_layers sample_data.json --model EleutherAI/gpt-j-6B --dtype float32 --device cuda
    python -m experiments.ace.published_layers sample_data.json                                # a bundled model: shows that it works

The release's sample carries the ten highest FFN layers, with scores, of 24 hops x {question, cloze}
on the real GPT-J. For every reading (how, norm, base, target) this computes `qv.layer_scores` on
the same 48 texts and prints how well it agrees: share of the ten published layers among ours,
Spearman's rho of the ten scores, and the ratio of the sizes. Twelve layers of a bundled model
cannot agree with lists of layers 10 to 27: for it, layers are scaled to 28, and the figures mean
nothing."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import pandas as pd

import qv_lens as qv
from qv_lens.attribution.layers import How
from qv_lens.attribution.projection import NORM_MODES
from qv_lens.errors import ConfigError

READINGS: tuple[How, ...] = ("neuron_sum", "neuron_sum_positive", "layer_vector", "count")


def published(path: Path) -> list[tuple[str, str, pd.Series]]:
    """(text, answer, scores by layer) of the lists."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        hops = [hop for record in records for hop in record["new_single_hops"]]
        return [
            (
                hop[form],
                hop["answer"],
                pd.Series({entry["layer"]: entry["score"] for entry in hop[f"{form}_ffn"]}),
            )
            for hop in hops
            for form in ("question", "cloze")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the ACE release's sample_data.json: {type(error).__name__}: {error}."
        ) from error


def as_fact(text: str, answer: str) -> qv.Fact:
    """The text with its answer; the subject plays no part, the first word stands in for it."""
    first, _, rest = text.partition(" ")
    return qv.Fact(f"{{}} {rest}", first, answer)


def agreement(
    frame: pd.DataFrame, lists: list[tuple[str, str, pd.Series]], n_layers: int
) -> dict[str, float]:
    """Means over the lists. `frame`: prompt, layer, score."""
    rows = []
    for prompt, (_, _, theirs) in enumerate(lists):
        ours = frame[frame["prompt"] == prompt].set_index("layer")["score"]
        if n_layers != 28:
            ours.index = [round(layer * 27 / (n_layers - 1)) for layer in ours.index]
            ours = ours.reindex(range(28), method="nearest")
        top = set(ours.nlargest(len(theirs)).index)
        same = ours.reindex(theirs.index)
        rows.append(
            (
                len(top & set(theirs.index)) / len(theirs),
                same.rank().corr(theirs.rank()),
                same.sum() / theirs.sum(),
            )
        )
    overlap, rho, size = (pd.Series(column) for column in zip(*rows, strict=True))
    return {"overlap": overlap.mean(), "spearman": rho.mean(), "size_ratio": size.median()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sample", type=Path)
    parser.add_argument("--model", default="toy-gptj")
    parser.add_argument("--dtype")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lists", type=int, default=48, help="only the first so many")
    arguments = parser.parse_args()
    lists = published(arguments.sample)[: arguments.lists]
    lens = qv.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    rows = []
    facts = [as_fact(text, answer) for text, answer, _ in lists]
    trace = lens.trace(facts)
    for target, how, norm, base in itertools.product(
        ("answer", "predicted"), READINGS, NORM_MODES, ("mid", "pre")
    ):
        frame = qv.layer_scores(lens, trace, how=how, norm=norm, base=base, target=target)
        rows.append(
            {
                "how": how,
                "norm": norm,
                "base": base,
                "target": target,
                **agreement(frame, lists, lens.n_layers),
            }
        )
    table = pd.DataFrame(rows).sort_values(["spearman", "overlap"], ascending=False, kind="stable")
    print(f"{lens.name}, {len(lists)} lists; best reading first")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
