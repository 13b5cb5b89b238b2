"""The ledger's numbers, redone by hand from the committed rows: plain loops and the textbook's
formulas, none of the project's code."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pyarrow.parquet

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
LEDGER = (EXPERIMENTS / "LEDGER.md").read_text()
COMPARISON = (EXPERIMENTS / "COMPARISON.md").read_text()
SCORES = (EXPERIMENTS / "SCORES.md").read_text()
README = (EXPERIMENTS.parent / "README.md").read_text()
#: Student's t at 97.5% by degrees of freedom (a printed table's)
T = {9: 2.262, 18: 2.101, 49: 2.010, 99: 1.984}
SMOLLM2 = "smollm2-135m"
COUNTERFACT = "counterfact-edit-10k.json"
#: ACE's NN, CT, LG, CP and LS
SIMILAR = {"nationality", "continent", "language", "capital", "leadership"}


def rows(name: str, model: str = SMOLLM2) -> list[dict]:
    table = pyarrow.parquet.read_table(EXPERIMENTS / "results" / f"{name}.parquet").to_pylist()
    return [row for row in table if row["model"] == model and row["status"] == "finished"]


def cell(source: str, words: str) -> str:
    """The row of a claim."""
    (line,) = (
        line for line in LEDGER.splitlines() if line.startswith(f"| {source} |") and words in line
    )
    return line


def single(metric: str, data: str = COUNTERFACT) -> dict[str, dict[int, float]]:
    """After single edits of these data: the metric by method and case."""
    found: dict[str, dict[int, float]] = {}
    for row in rows("single"):
        if row["metric"] == metric and row["data"] == data and row["after"] is not None:
            found.setdefault(row["method"], {})[row["case"]] = row["after"]
    return found


def of_student(gaps: list[float]) -> tuple[float, float]:
    """Their mean, and half of its 95% interval."""
    mean = sum(gaps) / len(gaps)
    spread = (sum((each - mean) ** 2 for each in gaps) / (len(gaps) - 1)) ** 0.5
    return mean, T[len(gaps) - 1] * spread / len(gaps) ** 0.5


def test_table_3_of_ace():
    """Each editor's share, the best of the others, and ACE's difference from it over the cases."""
    for words, metric in (("efficacy: ACE", "efficacy_acc"), ("paraphrase: ACE", "paraphrase_acc")):
        told = cell("ACE, Table 3", words)
        values = {
            m: v for m, v in single(metric).items() if m in ("FT", "ROME", "MEMIT", "PMET", "ACE")
        }
        assert len(values) == 5
        means = {method: sum(by.values()) / len(by) for method, by in values.items()}
        for method, mean in means.items():
            assert f"{method} {100 * mean:.1f}%" in told
        other = re.search(r"\(ACE − (\w+) ", told).group(1)
        assert means[other] == max(mean for method, mean in means.items() if method != "ACE")
        gaps = [values["ACE"][case] - values[other][case] for case in values["ACE"]]
        gap, half = of_student(gaps)
        assert f"{100 * gap:+.1f} ± {100 * half:.1f} points, {len(gaps)} cases" in told
        assert "**fails**" in told
        assert gap + half < 0


def test_table_1_of_kne():
    """Each editor's mean over the facts with such probes, the best of the others, and KNE's
    difference from it."""
    for words, metric, rivals in (
        ("portability", "portability", ("ROME", "MEMIT")),
        ("locality", "locality", ("FT", "FTL", "AdaLoRA", "ROME", "MEMIT")),
    ):
        told = cell("KNE, Table 1", words)
        values = {m: v for m, v in single(metric, "facts").items() if m in ("KNE", *rivals)}
        assert len(values) == 1 + len(rivals)
        means = {method: sum(by.values()) / len(by) for method, by in values.items()}
        for method, mean in means.items():
            assert f"{method} {100 * mean:.1f}%" in told
        other = max(rivals, key=means.__getitem__)
        gaps = [values["KNE"][case] - values[other][case] for case in values["KNE"]]
        gap, half = of_student(gaps)
        numbers = f"{100 * gap:+.1f} ± {100 * half:.1f} points, {len(gaps)} cases"
        assert f"(KNE − {other} {numbers})" in told
        assert "**undecided**" in told
        assert gap - half < 0 < gap + half


def test_table_1_of_ctp():
    """Of every fact the mean of the three parts of the score, each editor's mean, the best of the
    others, and CTP's difference from it."""
    parts: dict[str, dict[int, list[float]]] = {}
    for row in rows("ctp_table1"):
        if row["metric"] in ("edit_success", "generality", "ctp_locality"):
            parts.setdefault(row["method"], {}).setdefault(row["case"], []).append(row["after"])
    assert len(parts) == 7
    assert {len(three) for by in parts.values() for three in by.values()} == {3}
    values = {m: {case: sum(three) / 3 for case, three in by.items()} for m, by in parts.items()}
    means = {method: sum(by.values()) / len(by) for method, by in values.items()}
    told = cell("CTP, Table 1", "best score")
    for method, mean in means.items():
        assert f"{method} {100 * mean:.1f}%" in told
    other = max(set(means) - {"CTP"}, key=means.__getitem__)
    gaps = [values["CTP"][case] - values[other][case] for case in values["CTP"]]
    gap, half = of_student(gaps)
    numbers = f"{100 * gap:+.1f} ± {100 * half:.1f} points, {len(gaps)} cases"
    assert f"(CTP − {other} {numbers})" in told
    assert gap < -half  # and all the same: one batch is one edit
    assert "**undecided**" in told
    assert "; of one batch" in told


def test_scores_of_single_neurons_and_of_thirty():
    """The README's table, and its nats: means over fifty facts of SmolLM2."""
    rhos: dict[str, list[float]] = {}
    for row in rows("scores_single"):
        rhos.setdefault(row["score"], []).append(row["spearman"])
    table = re.search(r"\| SmolLM2-135M \|(.*)\|", README).group(1).split("|")
    names = ("gradient", "integrated", "RelP", "Eq. 9", "Eq. 10")
    for name, told in zip(names, table, strict=True):
        mean, half = of_student(rhos[name])
        assert len(rhos[name]) == 50
        assert abs(mean - float(told)) <= 0.5 * 10 ** -len(told.strip().split(".")[1]) + 1e-9
        assert f"| {name} | {mean:.3f} ± {half:.3f} |" in SCORES
    lost: dict[str, list[float]] = {}
    for row in rows("scores_sets"):
        if row["k"] == 30 and not row["keep"] and row["data"] == "facts":
            lost.setdefault(row["ranking"], []).append(row["clean"] - row["logprob"])
    named = re.search(
        r"loses most: (\d+) nats on SmolLM2 \(50 facts\), against (\d+) for RelP in as many rounds, "
        r"(\d+) for RelP's thirty of one pass and (\d+) for",
        README,
    )
    rankings = ("gradient, rounds of 1", "RelP, rounds of 1", "RelP", "Eq. 9")
    for name, told in zip(rankings, named.groups(), strict=True):
        mean, _ = of_student(lost[name])
        assert (len(lost[name]), round(mean)) == (50, int(told))
    named = re.search(r"on Qwen2.5-Coder \((\d+) facts\) (\d+), (\d+) and (\d+)\.", README).groups()
    for name, told in zip(("gradient, rounds of 1", "RelP", "Eq. 9"), named[1:], strict=True):
        losses = [
            row["clean"] - row["logprob"]
            for row in rows("scores_sets", "qwen2.5-coder-0.5b")
            if row["k"] == 30 and row["ranking"] == name and not row["keep"]
        ]
        assert (len(losses), round(sum(losses) / len(losses))) == (int(named[0]), int(told))


def test_comparison_of_editors():
    """Mean and Wilson's interval of a share, as the table has them."""
    z = 1.959964
    for method, by in single("efficacy_gen").items():
        if method not in ("MEMIT", "ACE", "KN", "UltraEdit"):
            continue
        n, p = len(by), sum(by.values()) / len(by)
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        low, high = (round(100 * (middle + side * half)) for side in (-1, 1))
        table = COMPARISON.split("## Single edits, each taken back: SmolLM2-135M, CounterFact")[
            1
        ].split("##")[0]
        assert f"| {method} | {n} | {100 * p:.0f} [{low}, {high}] |" in table


def test_table_1_of_ace():
    """The ten best FFN layers of each category (9 of 28, scaled to 30), their overlaps, and the
    share of all choices of five categories whose overlap stands out as much."""
    best: dict[str, set[int]] = {}
    scores: dict[str, list[tuple[float, int]]] = {}
    for row in rows("ace_table1"):
        if row["part"] == "ffn":
            scores.setdefault(row["category"], []).append((row["score"], row["layer"]))
    for category, of in scores.items():
        assert len(of) == 30
        best[category] = {layer for _, layer in sorted(of, reverse=True)[: round(9 / 28 * 30)]}

    def gap(similar: set[str]) -> float:
        inside, outside = [], []
        for a, b in itertools.combinations(best, 2):
            overlap = len(best[a] & best[b]) / len(best[a] | best[b])
            (inside if {a, b} <= similar else outside).append(overlap)
        return sum(inside) / len(inside) - sum(outside) / len(outside)

    real = gap(SIMILAR)
    choices = [gap(set(chosen)) for chosen in itertools.combinations(best, len(SIMILAR))]
    p = sum(other >= real - 1e-12 for other in choices) / len(choices)
    told = cell("ACE, Table 1, Takeaway 1", "similar semantics")
    assert f"gap {real:+.2f}, p = {p:.2f} (7 categories, 10 layers each)" in told
