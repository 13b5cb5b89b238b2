"""Every claim of ACE, KNE and CTP that can be put as a number, and what decides it.

A claim's `decide` is a function of the rows of one model: it returns the statistic as text, and whether the claim holds, fails or is
undecided on it. Differences are paired by case, with a 95% interval.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from qv_lens.facts.categories import RELATED

HOLDS, FAILS, OPEN = "holds", "fails", "undecided"
Told = tuple[str, str]  # the statistic, the verdict


@dataclass(frozen=True)
class Claim:
    """`source`, the paper's `words` and number, the `statistic`, the results it reads, what decides it, and what the
    official release says where it differs."""

    source: str
    words: str
    statistic: str
    data: str
    decide: Callable[[pd.DataFrame], Told]
    release: str = ""


# ------------------------------------------------------------------ statistics


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean."""
    values = np.asarray(values, float)
    return float(1.96 * values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def difference(a: pd.Series, b: pd.Series) -> tuple[float, float]:
    """Mean of paired differences and its 95% half interval."""
    paired = (a - b).dropna()
    return float(paired.mean()), interval(paired)


def decided(mean: float, half: float) -> str:
    """Whether a difference that should be positive is."""
    return HOLDS if mean - half > 0 else FAILS if mean + half < 0 else OPEN


def per_case(frame: pd.DataFrame, metric: str, by: str) -> pd.DataFrame:
    """Values of `after` per case, one column per value of `by`; of a curve its last step."""
    chosen = frame[frame["metric"] == metric]
    chosen = chosen[chosen["step"] == chosen.groupby([by, "seed", "case"])["step"].transform("max")]
    return chosen.pivot_table(index=["seed", "case"], columns=by, values="after", aggfunc="mean")


def ahead(table: pd.DataFrame, name: str, unit: str = "%") -> Told:
    """Whether one column is above every other: against the best of them, on the cases that both have; told times 100."""
    means = table.mean().sort_values(ascending=False)
    if name not in means:
        return "not measured", OPEN
    shown = list(dict.fromkeys([*means.index[:5], name]))
    told = ", ".join(f"{method} {100 * means[method]:.1f}{unit}" for method in shown)
    rival = means.drop(name).index[0]
    mean, half = difference(table[name], table[rival])
    return f"{told} ({name} − {rival} {100 * mean:+.1f} ± {100 * half:.1f}, {len(table)} cases)", decided(mean, half)


def best_layers(frame: pd.DataFrame, part: str, count: int) -> dict[str, set[int]]:
    chosen = frame[(frame["part"] == part) & (frame["rank"] <= count)]
    return {name: set(rows["layer"]) for name, rows in chosen.groupby("category")}


def overlaps(sets: dict[str, set[int]]) -> dict[tuple[str, str], float]:
    return {(a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in itertools.combinations(sorted(sets), 2)}


def related_gap(found: dict[tuple[str, str], float], groups: Sequence[frozenset[str]]) -> float:
    inside = [v for pair, v in found.items() if any(set(pair) <= group for group in groups)]
    outside = [v for pair, v in found.items() if not any(set(pair) <= group for group in groups)]
    return float(np.mean(inside) - np.mean(outside)) if inside and outside else float("nan")


def permutation(found: dict[tuple[str, str], float], names: list[str], rounds: int = 2000) -> tuple[float, float]:
    """The gap in overlap of related over unrelated categories, and p: how often shuffled names reach it."""
    groups = [group & set(names) for group in RELATED]
    real, rng, reached = related_gap(found, groups), random.Random(0), 0
    for _ in range(rounds):
        shuffled = dict(zip(names, rng.sample(names, len(names)), strict=True))
        moved = {tuple(sorted((shuffled[a], shuffled[b]))): v for (a, b), v in found.items()}
        reached += related_gap(moved, groups) >= real - 1e-12
    return real, (reached + 1) / (rounds + 1)


# ------------------------------------------------------------------ ACE


def takeaway_1(frame: pd.DataFrame) -> Told:
    single, count = frame[frame["hops"] == 1], max(1, round(9 * frame["layer"].nunique() / 28))
    sets = best_layers(single, "ffn", count)
    gap, p = permutation(overlaps(sets), sorted(sets))
    return (
        f"gap {gap:+.2f}, p = {p:.2f} (top {count} layers, {len(sets)} categories)",
        HOLDS if gap > 0 and p < 0.05 else OPEN if gap > 0 else FAILS,
    )


def attention_is_general(frame: pd.DataFrame) -> Told:
    single, count = frame[frame["hops"] == 1], max(1, round(9 * frame["layer"].nunique() / 28))
    attn, ffn = (np.mean(list(overlaps(best_layers(single, part, count)).values())) for part in ("attn", "ffn"))
    return f"overlap of attention {attn:.2f}, of FFN {ffn:.2f}", HOLDS if attn > ffn else FAILS


def figure_2(frame: pd.DataFrame) -> Told:
    table = frame.groupby(["layer", "neurons", "group"])["drop_relative"].mean()
    lines, verdict = [], FAILS
    for layer in frame["layer"].unique():
        top, drawn, off = (
            table.get((layer, *key), float("nan"))
            for key in (("top", "in category"), ("random", "in category"), ("top", "off category"))
        )
        lines.append(
            f"{'whole model' if layer == 'all' else f'layer {layer}'}: {share(top)} in category, {share(drawn)} at random, {share(off)} off category"
        )
        verdict = HOLDS if top > 0.5 and top > 2 * drawn else verdict
    return "; ".join(lines), verdict


def suppression_drop(frame: pd.DataFrame) -> Told:
    rows = frame[(frame["category"] == "all") & frame["condition"].str.startswith("Zero")].drop_duplicates("condition")
    told = "; ".join(
        f"layer {row.suppressed:.0f} ({row.neurons:.0f} neurons): {share(row.drop_relative)}" for row in rows.itertuples()
    )
    return told, OPEN if rows.empty or rows["drop_relative"].isna().any() else HOLDS if (
        rows["drop_relative"] > 0.3
    ).all() else FAILS


def suppression_counts(frame: pd.DataFrame) -> Told:
    here = frame[frame["category"] == "all"]
    clean = here[here["condition"] == "clean"].set_index("layer")["count"]
    lines, good = [], []
    for condition, rows in here[here["condition"].str.startswith("Zero")].groupby("condition"):
        now, layer = rows.set_index("layer")["count"], int(rows["suppressed"].iloc[0])
        after, others = (
            clean.index[(clean.index > layer) & (clean.index <= layer + 3)],
            clean.index[(clean.index < layer) | (clean.index > layer + 3)],
        )
        lost = [1 - now[index].sum() / max(1e-9, clean[index].sum()) for index in (after, others)]
        lines.append(f"{condition}: {share(lost[0])} lost in the three layers after, {share(lost[1])} in all others")
        good.append(lost[0] > 0.3 and lost[0] > 3 * abs(lost[1]))
    return "; ".join(lines), OPEN if not good else HOLDS if all(good) else FAILS


def figure_3(frame: pd.DataFrame) -> Told:
    chains = frame[frame["hops"] == 2].groupby(["part", "layer"])["score"].mean()
    query, count = chains["query"].to_numpy(), chains["count"].to_numpy()
    query, count = (query - query.mean()) / query.std(), (count - count.mean()) / count.std()
    n = len(query)
    lags = {lag: float((query[: n - lag] * count[lag:]).mean()) for lag in range(n // 3 + 1)}
    back = {-lag: float((query[lag:] * count[: n - lag]).mean()) for lag in range(1, n // 3 + 1)}
    best = max({**lags, **back}.items(), key=lambda item: item[1])
    return f"largest correlation {best[1]:.2f} at lag {best[0]} (value counts behind query scores)", HOLDS if best[
        0
    ] > 0 and best[1] > 0.5 else FAILS if best[0] <= 0 else OPEN


def table_2(frame: pd.DataFrame) -> Told:
    table = per_case(frame, "multihop_cot", "method")
    if not {"ACE", "PMET"} <= set(table):
        return "not measured", OPEN
    table = table.dropna(subset=["ACE", "PMET"])
    edits = frame.drop_duplicates(["seed", "case"]).set_index(["seed", "case"])["edits"].reindex(table.index)
    by = ", ".join(
        f"{k}: {share(v['ACE'])} / {share(v['PMET'])}" for k, v in table.groupby(edits)[["ACE", "PMET"]].mean().iterrows()
    )
    mean, half = difference(table["ACE"], table["PMET"])
    return f"ACE − PMET {100 * mean:+.1f} ± {100 * half:.1f} points over {len(table)} cases; ACE / PMET by edits {by}", decided(
        mean, half
    )


def table_2_best(frame: pd.DataFrame) -> Told:
    return ahead(per_case(frame, "multihop_cot", "method"), "ACE")


def base(frame: pd.DataFrame) -> Told:
    value = frame.loc[frame["metric"] == "multihop_cot", "before"].mean()
    return share(value), HOLDS if value > 0.95 else FAILS


def beats(
    metric: str, other: str | float = "PMET", one: str | float = "ACE", by: str = "method"
) -> Callable[[pd.DataFrame], Told]:
    def decide(frame: pd.DataFrame) -> Told:
        table = per_case(frame, metric, by)
        if not {one, other} <= set(table):
            return "not measured", OPEN
        table = table[[one, other]].dropna()
        mean, half = difference(table[one], table[other])
        return (
            f"{one} {share(table[one].mean())}, {other} {share(table[other].mean())}: {100 * mean:+.1f} ± {100 * half:.1f} points ({len(table)} cases)",
            decided(mean, half),
        )

    return decide


def skipping(letters: str) -> Callable[[pd.DataFrame], Told]:
    def decide(frame: pd.DataFrame) -> Told:
        frame = frame.assign(skip=frame["skip"].fillna(""))
        lines, verdicts = [], []
        for metric in ("multihop_acc", "efficacy_acc"):
            table = per_case(frame, metric, "skip")
            if letters not in table or "" not in table:
                return "not measured", OPEN
            mean, half = difference(table[""], table[letters])
            lines.append(
                f"{metric} {share(table[''].mean())} → {share(table[letters].mean())} ({-100 * mean:+.1f} ± {100 * half:.1f})"
            )
            verdicts.append(decided(mean, half))
        return "; ".join(lines), verdicts[0]

    return decide


def bottleneck(frame: pd.DataFrame) -> Told:
    table = per_case(frame, "multihop_acc", "edited").mean()
    return ", ".join(f"{k} layers {share(v)}" for k, v in table.items()), HOLDS if table.is_monotonic_increasing else FAILS


def invariance(frame: pd.DataFrame) -> Told:
    chains = frame[frame["hops"] == 2]
    parts = {name: overlaps(best_layers(chains, part, 3)) for name, part in (("query", "query"), ("value", "ffn"))}
    told = {name: float(np.mean(list(values.values()))) for name, values in parts.items()}
    fixed = min(told.values()) > 0.8
    wants_fixed = "gpt" in str(frame["model"].iloc[0]).lower()
    return ", ".join(f"{k} layers overlap {v:.2f}" for k, v in told.items()), HOLDS if fixed == wants_fixed else FAILS


def attention_first(frame: pd.DataFrame) -> Told:
    scores = frame[frame["hops"] == 1].groupby(["part", "layer"])["score"].mean()
    peaks = {part: int(scores[part].idxmax()) for part in ("attn", "ffn")}
    falls = {
        part: int(max(layer for layer, v in scores[part].items() if v >= 0.5 * scores[part].max())) for part in ("attn", "ffn")
    }
    return (
        f"attention's last layer above half its peak: {falls['attn']} (peak {peaks['attn']}), FFN's: {falls['ffn']} (peak {peaks['ffn']})",
        HOLDS if falls["attn"] < falls["ffn"] else FAILS,
    )


def last_layers_low(frame: pd.DataFrame) -> Told:
    scores = frame[(frame["hops"] == 1) & (frame["part"] == "ffn")].groupby("layer")["score"].mean()
    ratio = float(scores.iloc[-1] / scores.max())
    return f"last FFN layer at {share(ratio)} of the peak (layer {scores.idxmax()})", HOLDS if ratio < 0.5 else FAILS


def converging_tokens(frame: pd.DataFrame) -> Told:
    whole = frame.assign(total=frame["ffn"] + frame["attn"])
    best = whole.loc[whole.groupby("index")["total"].idxmax()]
    last = [
        int(row.position == whole.loc[whole["index"] == row.index_, "position"].max())
        for row in best.rename(columns={"index": "index_"}).itertuples()
    ]
    return (
        f"largest increase at {', '.join(repr(t.strip()) for t in best['token'])}; at the last token in {sum(last)} of {len(last)} prompts",
        HOLDS if all(last) else FAILS,
    )


def readable(frame: pd.DataFrame) -> Told:
    table = frame.groupby("role")["interpretable"].mean()
    return ", ".join(f"{role} {share(v)}" for role, v in table.items()) + " of the ten best hold the answer", HOLDS if table.get(
        "query", 0
    ) < table.get("value", 0) else FAILS


def neurons_27(frame: pd.DataFrame) -> Told:
    table = frame.groupby("set")[["sampled", "zeroed"]].mean()
    told = ", ".join(f"{name} {share(table.loc[name, 'sampled'])}" for name in ("none", "interpretable", "important", "random"))
    a, b = (frame[frame["set"] == name].set_index(["category", "prompt"])["sampled"] for name in ("important", "interpretable"))
    mean, half = difference(a, b)
    return (
        f"{told} (mean {table.loc['interpretable', 'zeroed']:.0f} neurons; important − interpretable {100 * mean:+.1f} ± {100 * half:.1f})",
        HOLDS if table.loc["interpretable", "sampled"] < 0.5 and mean - half > 0 else FAILS,
    )


def chance(frame: pd.DataFrame) -> Told:
    table = per_case(frame, "efficacy_acc", "layers")
    drawn = table[[name for name in table if str(name).startswith("random")]]
    named = ", ".join(f"{name} {share(table[name].mean())}" for name in ("located", "value", "query", "all") if name in table)
    better = int((drawn.mean() >= table["located"].mean()).sum())
    p = (1 + better) / (1 + drawn.shape[1])
    told = f"{named}, random {share(drawn.mean().mean())} (from {share(drawn.mean().min())} to {share(drawn.mean().max())})"
    verdict = HOLDS if p < 0.1 else OPEN if p <= 0.5 else FAILS
    return f"{told}; {better} of {drawn.shape[1]} draws are as good or better, p = {p:.2f} ({len(table)} cases)", verdict


# ------------------------------------------------------------------ KNE and CTP


def modules(frame: pd.DataFrame) -> Told:
    tables = {metric: per_case(frame, metric, "parameters") for metric in ("edit_success", "portability")}
    inside = [name for name in tables["edit_success"] if "W_out" in name or "W_in" in name]
    won, port = (table.mean() for table in tables.values())
    told = "; ".join(f"{name} {share(won[name])} (portability {share(port[name])})" for name in won.index)
    verdicts = {decided(*difference(t[inside].mean(axis=1), t.drop(columns=inside).mean(axis=1))) for t in tables.values()}
    return told, verdicts.pop() if len(verdicts) == 1 else FAILS if FAILS in verdicts else OPEN


def mapping(frame: pd.DataFrame) -> Told:
    table = per_case(frame, "locality", "parameters")
    maps = [name for name in table if "W_in" in name or "W_Q" in name]
    mean, half = difference(table[maps].mean(axis=1), table.drop(columns=maps).mean(axis=1))
    told = "; ".join(f"{name} {share(value)}" for name, value in table.mean().items())
    return f"{told} (difference {100 * mean:+.1f} ± {100 * half:.1f})", decided(mean, half)


def trade(column: str) -> Callable[[pd.DataFrame], Told]:
    return curve(column, ("edit_success", "locality"), (True, False))


def curve(column: str, metrics: tuple[str, ...], rises: tuple[bool, ...]) -> Callable[[pd.DataFrame], Told]:
    """First against last value of what is varied: each metric should rise, or fall."""

    def decide(frame: pd.DataFrame) -> Told:
        lines, verdicts = [], set()
        for metric, up in zip(metrics, rises, strict=True):
            table = per_case(frame, metric, column)
            first, last = table[table.columns[0]], table[table.columns[-1]]
            lines.append(f"{metric} " + ", ".join(f"{k:g}: {share(v)}" for k, v in table.mean().items()))
            verdicts.add(decided(*(difference(last, first) if up else difference(first, last))))
        cases = frame.drop_duplicates(["seed", "case"])
        return f"{'; '.join(lines)} ({len(cases)} cases)", verdicts.pop() if len(
            verdicts
        ) == 1 else FAILS if FAILS in verdicts else OPEN

    return decide


def best_of(metric: str, method: str, protocol: str = "single", unit: str = "%") -> Callable[[pd.DataFrame], Told]:
    return lambda frame: ahead(per_case(frame[frame["protocol"] == protocol], metric, "method"), method, unit)


def seconds(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Seconds per fact, a column per method, and their medians in words."""
    alone = frame[frame["case"] > 0]  # a seed's first case samples the contexts as well
    each = alone.groupby(["seed", "case", "method"], sort=False)["seconds"].first().unstack()
    return each, "medians: " + ", ".join(f"{name} {value:.2f} s" for name, value in each.median().items())


def fastest(frame: pd.DataFrame) -> Told:
    each, told = seconds(frame)
    verdicts = {decided(*difference(each[other], each["CTP"])) for other in ("MEMIT", "PMET", "AlphaEdit")}
    return told, verdicts.pop() if len(verdicts) == 1 else FAILS if FAILS in verdicts else OPEN


def slowest(frame: pd.DataFrame) -> Told:
    each, told = seconds(frame)
    if "KN" not in each:
        return "not measured", OPEN
    rival = each.drop(columns="KN").median().idxmax()
    mean, half = difference(each["KN"], each[rival])
    return f"{told} (KN − {rival} {mean:+.2f} ± {half:.2f} s)", decided(mean, half)


def all_layers(frame: pd.DataFrame) -> Told:
    shown = frame[(frame["path"] == "T+") & (frame["category"] == "all")].groupby("layer")["score"].mean()
    return (
        f"smallest layer mean {shown.min():.2f} (layer {shown.idxmin()}), largest {shown.max():.2f} (layer {shown.idxmax()})",
        HOLDS if shown.min() > 0.5 * shown.max() else FAILS,
    )


NO_CODE = "the official release holds no code for this"
CLAIMS = (
    Claim("ACE, Table 1, Takeaway 1", "FFN layers of similar semantics lie close, of dissimilar ones apart", "overlap (Jaccard) of the top layers, related minus unrelated categories; permutation p", "ace_table1", takeaway_1, NO_CODE),
    Claim("ACE, Table 1", "attention's top layers are the same for all knowledge (a27, a26, a7), FFN's its own", "mean overlap of top layers between categories, attention against FFN", "ace_table1", attention_is_general, NO_CODE),
    Claim("ACE, Figure 2", "zeroing 1% important neurons costs over 90% of accuracy; 1% at random 9.47% and 8.19%", "share of right answers lost in category, at random, off category", "ace_figure2", figure_2, NO_CODE),
    Claim("ACE, Figure 3", "value neurons accumulate behind peaks of the query layers", "lag of the largest cross-correlation between query scores and value-neuron counts, two-hop prompts", "ace_table1", figure_3),
    Claim("ACE, section 4.2", "zeroing the top 100 query neurons of a peak layer costs 46.2% and 61.9%", "share of right two-hop answers lost (neurons scaled to the model)", "ace_suppression", suppression_drop, NO_CODE),
    Claim("ACE, section 4.2", "activated value neurons in the layers after fall from (28, 16, 33) to (6, 4, 7), others by 12 in all", "share of activated value neurons lost, three layers after against all others", "ace_suppression", suppression_counts, NO_CODE),
    Claim("ACE, Table 2", "Base 98.42 / 99.17", "multi-hop accuracy of the unedited model, chain of thought", "multihop", base),
    Claim("ACE, Table 2", "ACE beats PMET by 9.44 (GPT-J) and 37.46 (Qwen3-8B) points", "difference per case, any of three questions", "multihop", table_2, "cases of several edits share one z* and are not fully reverted there; value layers 23 to 25 (the paper: 26 to 28); attention is written, which the paper denies"),
    Claim("ACE, Table 2", "ACE is the best of all editors", "multi-hop accuracy, the five best", "multihop", table_2_best),
    Claim("ACE, Table 3", "efficacy: ACE 99.8 / 99.4, PMET 81.6 / 75.6", "difference per case, argmax at each token", "single", beats("efficacy_acc"), "the prompts of Table 3 are not released"),
    Claim("ACE, Table 3", "paraphrase: ACE 91.2 / 94.2, PMET 65.8 / 68.9", "difference per case", "single", beats("paraphrase_acc"), "as above"),
    Claim("ACE, Table 3", "specificity: ACE 79.2 / 81.8, PMET 74.6 / 64.4", "difference per case", "single", beats("specificity_acc"), "as above"),
    Claim("ACE, Table 4", "leaving out the three best query layers costs 16.51% / 22.29%", "multi-hop cloze and efficacy, nothing against 'qqq' left out", "ace_table4", skipping("qqq")),
    Claim("ACE, Table 4", "leaving out the two best value layers costs 26.87% / 40.45%", "nothing against 'vv' left out", "ace_table4", skipping("vv")),
    Claim("ACE, project page", "the more of the located layers are edited, the better", "multi-hop cloze by number of edited layers", "ace_bottleneck", bottleneck),
    Claim("ACE, section 6.4", "GPT-J's query and value layers are the same for all domains, Qwen3's shift", "mean overlap of the three best layers between categories (holds: above 0.8 for GPT-J, below for Qwen3)", "ace_table1", invariance),
    Claim("ACE, Appendix E", "attention's increase falls (layer 25) before FFN's (27)", "last layer above half the peak", "ace_table1", attention_first),
    Claim("ACE, Appendix E", "the final layers hold little", "FFN importance of the last layer against the peak", "ace_table1", last_layers_low),
    Claim("ACE, Table 5", "importance rises most where semantics converge ('plays', 'of')", "the token with the largest increase", "ace_table5", converging_tokens, NO_CODE),
    Claim("ACE, Tables 6 and 7", "query neurons are not interpretable, value neurons are", "share of the ten best whose promoted tokens hold the answer", "ace_table67", readable, NO_CODE),
    Claim("ACE, section 6.4", "27 interpretable neurons zeroed leave 3.2%, 27 important others 59.4%", "share of 1,000 draws that give the answer", "ace_neurons27", neurons_27, NO_CODE),
    Claim("ours", "attribution chooses better layers than chance", "efficacy of ACE at located layers minus random layers of the same number", "layers", chance),
    Claim("KNE, Table 1", "KNE has the best edit success (99.02 on wiki counterfact)", "edit success, the best five", "single", best_of("edit_success", "KNE")),
    Claim("KNE, Table 1", "KNE's portability is above ROME's and MEMIT's", "difference per case, KNE minus MEMIT", "single", beats("portability", "MEMIT", "KNE")),
    Claim("KNE, Table 1", "KNE has the best fluency", "fluency (n-gram entropy)", "single", best_of("fluency", "KNE", unit="")),
    Claim("KNE, Figure 2", "FFN parameters give better edit success and portability than attention's", "mean edit success, FFN against attention", "kne_figure2", modules),
    Claim("KNE, section 4.3", "mapping layers (W_in, queries) give better locality than the others", "mean locality, W_in and W_Q, W_K, W_V against W_out and W_O", "kne_figure2", mapping),
    Claim("KNE, Figure B.3", "located on a quarter of the facts: better locality than located on all", "100 facts in one batch, located on 25 against 100", "kne_figureB3", beats("locality", 100, 25, "located")),
    Claim("KNE, Figure B.4", "more parameters: better edit success, worse locality", "smallest against largest share", "kne_figureB4", trade("share")),
    Claim("KNE, Figure B.5", "larger batches: edit success falls, locality rises at first", "by batch size", "kne_figureB5", curve("batch_size", ("edit_success", "locality"), (False, True))),
    Claim("CTP, Table 1", "batches: CTP has the best score", "mean of efficacy, generality, locality", "ctp_table1", best_of("ctp_score", "CTP", "batch"), "baselines there are from AlphaEdit's paper, with other metrics"),
    Claim("CTP, Table 2", "100 consecutive edits: CTP has the best score", "the same", "ctp_table1", best_of("ctp_score", "CTP", "consecutive")),
    Claim("CTP, Figure 3", "CTP needs less time per edit than MEMIT, PMET and AlphaEdit", "seconds per fact, single edits one by one (batch_size 1), 1 CPU thread", "ctp_figure3", fastest),
    Claim("CTP, section 4.3", "KN takes longest of all", "the same", "ctp_figure3", slowest),
    Claim("CTP, Figure 4", "nodes of all layers contribute", "mean score of T+ nodes by layer", "ctp_figure4", all_layers),
    Claim("CTP, Figure 5", "larger T+: better efficacy, worse locality", "smallest against largest", "ctp_figure5", curve("top", ("edit_success", "specificity_acc"), (True, False))),
    Claim("CTP, Figure 6", "a larger lambda lowers efficacy", "smallest against largest", "ctp_figure6", curve("lam", ("edit_success",), (False,))),
    Claim("CTP, section 4.5", "contrastive rectification raises efficacy by about 4%", "lambda 0.1 against 0, difference per case", "ctp_figure6", beats("edit_success", 0.0, 0.1, "lam")),
    Claim("CTP, section 4.5", "too large a T- lowers efficacy and generality", "one node against fifteen", "ctp_tminus", curve("bottom", ("edit_success", "paraphrase_acc"), (False, False))),
)  # fmt: skip
