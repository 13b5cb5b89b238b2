"""Every claim of ACE, KNE and CTP that the ledger holds, with what decides it (`deciding.py` has what several share)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from deciding import (
    FAILS,
    HOLDS,
    NOT_MEASURED,
    OPEN,
    Decide,
    Told,
    ahead,
    beats,
    curve,
    decided,
    difference,
    groups,
    per_case,
    points,
    share,
    together,
)  # fmt: skip

from qv_lens.facts.categories import RELATED


@dataclass(frozen=True)
class Claim:
    """`source`, the paper's `words` and number, the `statistic`, the results it reads (`data`), what decides it, what the
    official release or the paper's own set-up does to it (`release`), and its run file where that is not named like the data."""

    source: str
    words: str
    statistic: str
    data: str
    decide: Decide
    release: str = ""
    file: str = ""


# ------------------------------------------------------------------ ACE: layers


def best_layers(frame: pd.DataFrame, part: str, of_28: int) -> dict[str, set[int]]:
    """The best layers of each category: as many of the model's as `of_28` of GPT-J's 28."""
    count = max(1, round(of_28 * frame["layer"].nunique() / 28))
    chosen = frame[(frame["part"] == part) & (frame["rank"] <= count)]
    return {name: set(rows["layer"]) for name, rows in chosen.groupby("category")}


def overlap(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def mean_overlap(sets: dict[str, set[int]]) -> float:
    return float(np.mean([overlap(a, b) for a, b in itertools.combinations(sets.values(), 2)]))


def takeaway_1(frame: pd.DataFrame) -> Told:
    """Overlap within the similar categories, less that of all other pairs; p over every choice of as many categories."""
    sets = best_layers(frame, "ffn", 9)
    pairs = {frozenset(pair): overlap(sets[pair[0]], sets[pair[1]]) for pair in itertools.combinations(sorted(sets), 2)}

    def gap(similar: frozenset[str]) -> float:
        inside = [value for pair, value in pairs.items() if pair <= similar]
        return float(np.mean(inside) - np.mean([value for pair, value in pairs.items() if not pair <= similar]))

    similar = RELATED & set(sets)
    if not 1 < len(similar) < len(sets):
        return NOT_MEASURED
    gaps = [gap(frozenset(chosen)) for chosen in itertools.combinations(sorted(sets), len(similar))]
    p = float(np.mean([value >= gap(similar) - 1e-12 for value in gaps]))
    verdict = HOLDS if p < 0.05 else FAILS if gap(similar) < 0 else OPEN
    return f"gap {gap(similar):+.2f}, p = {p:.2f} ({len(sets)} categories, {len(next(iter(sets.values())))} layers each)", verdict


def attention_is_general(frame: pd.DataFrame) -> Told:
    """Overlap of attention's layers less that of FFN's; the interval leaves one category out at a time (jackknife)."""
    attn, ffn = best_layers(frame, "attn", 9), best_layers(frame, "ffn", 9)
    gap = mean_overlap(attn) - mean_overlap(ffn)
    left = [
        mean_overlap({k: v for k, v in attn.items() if k != out}) - mean_overlap({k: v for k, v in ffn.items() if k != out})
        for out in attn
    ]
    half = 1.96 * float(np.sqrt((len(left) - 1) * np.var(left)))
    told = f"overlap of attention {mean_overlap(attn):.2f}, of FFN {mean_overlap(ffn):.2f} (difference {gap:+.2f} ± {half:.2f})"
    return told, decided(gap, half)


def attention_first(frame: pd.DataFrame) -> Told:
    scores = frame.groupby(["part", "layer"])["score"].mean()
    peaks = {part: int(scores[part].idxmax()) for part in ("attn", "ffn")}
    falls = {part: max(layer for layer, v in scores[part].items() if v >= 0.5 * scores[part].max()) for part in peaks}
    told = "; ".join(f"{part}'s last layer above half its peak: {falls[part]} (peak {peaks[part]})" for part in peaks)
    return told, HOLDS if falls["attn"] < falls["ffn"] else FAILS


def last_layers_low(frame: pd.DataFrame) -> Told:
    scores = frame[frame["part"] == "ffn"].groupby("layer")["score"].mean()
    ratio = float(scores.iloc[-1] / scores.max())
    return f"last FFN layer at {share(ratio)} of the peak (layer {scores.idxmax()})", HOLDS if ratio < 0.5 else FAILS


def figure_2(frame: pd.DataFrame) -> Told:
    """In either scope: more than half is lost in category, and more than at random and than off category."""
    lines, good = [], []
    for layer, rows in frame.groupby("layer"):
        table = rows.pivot_table(index=["category", "seed"], columns=["neurons", "group"], values="drop_relative")
        top, drawn, off = (table[key] for key in (("top", "in category"), ("random", "in category"), ("top", "off category")))
        where = "whole model" if layer == "all" else "each category's best layer" if layer == "top" else f"layer {layer}"
        lines.append(
            f"{where}: {share(top.mean())} in category, {share(drawn.mean())} at random, {share(off.mean())} off category"
        )
        surer = [decided(*difference(top, other)[:2]) == HOLDS for other in (drawn, off)]
        good.append(top.mean() > 0.5 and all(surer))
    return "; ".join(lines), HOLDS if any(good) else FAILS


def figure_3(frame: pd.DataFrame) -> Told:
    chains = frame.groupby(["part", "layer"])["score"].mean()
    raw, count = chains["query"].to_numpy(), chains["count"].to_numpy()
    query, count = (raw - raw.mean()) / raw.std(), (count - count.mean()) / count.std()
    n = len(query)
    lags = {lag: float((query[: n - lag] * count[lag:]).mean()) for lag in range(n // 3 + 1)}
    back = {-lag: float((query[lag:] * count[: n - lag]).mean()) for lag in range(1, n // 3 + 1)}
    lag, best = max({**lags, **back}.items(), key=lambda item: item[1])
    told = f"largest correlation {best:.2f} at lag {lag} (value counts behind query scores); Eq. 10 is positive in {(raw > 0).sum()} of {n} layers"
    return told, HOLDS if lag in (1, 2) and best > 0.5 else FAILS if lag <= 0 else OPEN


def late_values(frame: pd.DataFrame) -> Told:
    count = frame[frame["part"] == "count"].groupby("layer")["score"].mean()
    peak, last = int(count.idxmax()), float(count.iloc[-1] / count.max())
    told = f"most of the best value neurons in layer {peak} of {len(count)}; the last layer has {share(last)} of that"
    return told, HOLDS if peak >= len(count) / 3 and last < 0.5 else FAILS


def suppression_drop(frame: pd.DataFrame) -> Told:
    rows = frame[(frame["category"] == "all") & frame["condition"].str.startswith("Zero")].drop_duplicates("condition")
    told = "; ".join(
        f"layer {row.suppressed:.0f} ({row.neurons:.0f} neurons): {share(row.drop_relative)}" for row in rows.itertuples()
    )
    if rows.empty or rows["drop_relative"].isna().any():
        return told, OPEN
    return told, HOLDS if (rows["drop_relative"] > 0.3).all() else FAILS


def suppression_counts(frame: pd.DataFrame) -> Told:
    here = frame[frame["category"] == "all"]
    clean = here[here["condition"] == "clean"].set_index("layer")["count"]
    lines, good = [], []
    for condition, rows in here[here["condition"].str.startswith("Zero")].groupby("condition"):
        now, layer = rows.set_index("layer")["count"], int(rows["suppressed"].iloc[0])
        near = (clean.index > layer) & (clean.index <= layer + 3)
        lost = [1 - now[index].sum() / max(1e-9, clean[index].sum()) for index in (clean.index[near], clean.index[~near])]
        lines.append(f"{condition}: {share(lost[0])} lost in the three layers after, {share(lost[1])} in all others")
        good.append(lost[0] > 0.3 and lost[0] > 3 * abs(lost[1]))
    return "; ".join(lines), OPEN if not good else HOLDS if all(good) else FAILS


def invariance(frame: pd.DataFrame) -> Told:
    told = {name: mean_overlap(best_layers(frame, part, 3)) for name, part in (("query", "query"), ("value", "ffn"))}
    fixed = min(told.values()) > 0.8
    same = HOLDS if fixed else FAILS  # that they shift is no more than that: chance would move them as well
    verdict = same if "gpt" in str(frame["model"].iloc[0]).lower() else FAILS if fixed else OPEN
    return ", ".join(f"best {k} layers overlap {v:.2f}" for k, v in told.items()), verdict


# ------------------------------------------------------------------ ACE: tokens and neurons


def converging_tokens(frame: pd.DataFrame) -> Told:
    """The token behind the subject and the last one, each against the mean of all other tokens."""
    whole = frame.assign(total=frame["ffn"] + frame["attn"])
    named = whole["place"].where(whole["place"].isin(("first behind it", "last")), "others")
    table = whole.pivot_table(index="prompt", columns=named, values="total", aggfunc="mean")
    lines, verdicts = [], []
    for place in ("first behind it", "last"):
        mean, half, count = difference(table[place], table["others"])
        lines.append(f"{'behind the subject' if place != 'last' else 'last token'} − others {mean:+.2f} ± {half:.2f} nats")
        verdicts.append(decided(mean, half))
    return f"{'; '.join(lines)} ({count} prompts)", together(verdicts)


def readable(one: str) -> Decide:
    def decide(frame: pd.DataFrame) -> Told:
        table = frame.pivot_table(index="prompt", columns="role", values="interpretable", aggfunc="mean")
        mean, half, pairs = difference(table[one], table["query"])
        told = ", ".join(f"{role} {share(value)}" for role, value in table.mean().items())
        return f"{told} of the ten best hold the answer ({one} − query {points(mean, half, pairs)})", decided(mean, half)

    return decide


def neurons_27(frame: pd.DataFrame) -> Told:
    table = frame.groupby("set")[["sampled", "zeroed"]].mean()
    told = ", ".join(f"{name} {share(table.loc[name, 'sampled'])}" for name in ("none", "interpretable", "important", "random"))
    a, b = (frame[frame["set"] == name].set_index(["category", "prompt"])["sampled"] for name in ("important", "interpretable"))
    mean, half, pairs = difference(a, b)
    told = (
        f"{told} (mean {table.loc['interpretable', 'zeroed']:.0f} neurons; important − interpretable {points(mean, half, pairs)})"
    )
    return told, HOLDS if table.loc["interpretable", "sampled"] < 0.5 and mean - half > 0 else FAILS


# ------------------------------------------------------------------ ACE: edits


def table_2(from_edits: int) -> Decide:
    """ACE against PMET, on cases of at least so many edits."""

    def decide(frame: pd.DataFrame) -> Told:
        table = per_case(frame[frame["edits"] >= from_edits], "multihop_cot", "method")
        if not {"ACE", "PMET"} <= set(table):
            return NOT_MEASURED
        table = table.dropna(subset=["ACE", "PMET"])
        edits = frame.drop_duplicates(["seed", "case"]).set_index(["seed", "case"])["edits"].reindex(table.index)
        by = table.groupby(edits)[["ACE", "PMET"]].mean()
        told = ", ".join(f"{k}: {share(v['ACE'])} / {share(v['PMET'])}" for k, v in by.iterrows())
        mean, half, pairs = difference(table["ACE"], table["PMET"])
        return f"ACE − PMET {points(mean, half, pairs)}; ACE / PMET by edits {told}", decided(mean, half)

    return decide


def base(frame: pd.DataFrame) -> Told:
    value = frame.loc[frame["metric"] == "multihop_cot", "before"].mean()
    return share(value), HOLDS if value > 0.95 else FAILS


def tuning_fails(frame: pd.DataFrame) -> Told:
    value = per_case(frame, "multihop_cot", "method")["FT"].mean()
    return f"FT {share(value)}", HOLDS if value < 0.1 else FAILS


def skipping(letter: str) -> Decide:
    """What half of a kind of layers left out costs, and all of them, in multi-hop accuracy (which decides) and efficacy."""

    def decide(frame: pd.DataFrame) -> Told:
        frame, lines, verdicts = frame.assign(skip=frame["skip"].fillna("")), [], []
        for metric in ("multihop_acc", "efficacy_acc"):
            table = per_case(frame, metric, "skip")
            for letters in (letter, 2 * letter):
                if not {"", letters} <= set(table):
                    return NOT_MEASURED
                mean, half, pairs = difference(table[""], table[letters])
                lines.append(f"{metric} without {letters} {share(table[letters].mean())} ({points(-mean, half, pairs)})")
                verdicts.append(decided(mean, half))
            lines[-2] = f"{metric} {share(table[''].mean())}; {lines[-2]}"
        return "; ".join(lines), verdicts[0]

    return decide


def bottleneck(frame: pd.DataFrame) -> Told:
    """ACE against the better of MEMIT and PMET at as many layers as 9 of GPT-J's 28 (8 of Qwen3-8B's 36)."""
    count = 4 if "gpt" in str(frame["model"].iloc[0]).lower() else 3
    lines = []
    for edited, rows in frame.groupby("edited"):
        means = per_case(rows, "multihop_acc", "method").mean()
        lines.append(f"{edited} layers: " + ", ".join(f"{name} {share(value)}" for name, value in means.items()))
    told, verdict = ahead("multihop_acc", "ACE", ("MEMIT", "PMET"))(frame[frame["edited"] == count])
    return f"at {count} layers {told}; {'; '.join(lines)}", verdict


def chance(frame: pd.DataFrame) -> Told:
    """Located layers among the random draws of their own seed; p over all seeds' draws together."""
    table = per_case(frame, "efficacy_acc", "layers")
    seeds = table.groupby("seed").mean()
    drawn = seeds[[name for name in seeds if str(name).startswith("random")]]
    better, draws = int(drawn.ge(seeds["located"], axis=0).to_numpy().sum()), drawn.size
    p = (1 + better) / (1 + draws)
    named = ", ".join(f"{name} {share(table[name].mean())}" for name in ("located", "value", "query", "all") if name in table)
    told = f"{named}, random {share(drawn.to_numpy().mean())} (from {share(drawn.to_numpy().min())} to {share(drawn.to_numpy().max())})"
    verdict = HOLDS if p < 0.05 else FAILS if p > 0.5 else OPEN
    return f"{told}; {better} of {draws} draws are as good or better, p = {p:.2f} ({len(table)} cases)", verdict


# ------------------------------------------------------------------ CTP


def seconds(one: str, others: tuple[str, ...], sign: int) -> Decide:
    """`one` takes less time than each of the others (sign 1), or more (-1)."""

    def decide(frame: pd.DataFrame) -> Told:
        alone = frame[frame["case"] > 0]  # a seed's first case samples the contexts as well
        each = alone.groupby(["seed", "case", "method"], sort=False)["seconds"].first().unstack()
        if not {one, *others} <= set(each):
            return NOT_MEASURED
        told = "medians: " + ", ".join(f"{name} {value:.2f} s" for name, value in each.median().items())
        gaps = {other: difference(each[other], each[one]) for other in others}
        told += "; " + ", ".join(f"{other} − {one} {mean:+.2f} ± {half:.2f} s" for other, (mean, half, _) in gaps.items())
        return told, together([decided(sign * mean, half) for mean, half, _ in gaps.values()])

    return decide


def nodes_by_layer(frame: pd.DataFrame) -> pd.Series:
    """Mean importance of T+ by layer, as a share of the largest layer's, each kind of node counting the same."""
    rows = frame[(frame["path"] == "T+") & (frame["category"] == "all") & (frame["score"] == "norm")]
    table = rows.pivot_table(index="layer", columns="kind", values="importance")
    return (table / table.max()).mean(axis=1)


def all_layers(frame: pd.DataFrame) -> Told:
    shares = nodes_by_layer(frame)
    told = f"smallest layer {shares.idxmin()} at {share(shares.min())}, largest {shares.idxmax()} at {share(shares.max())} of the largest of its kind"
    return told, HOLDS if shares.min() > 0.1 else FAILS


def early_over_late(frame: pd.DataFrame) -> Told:
    shares = nodes_by_layer(frame)
    third = len(shares) // 3
    early, middle, late = (float(part.mean()) for part in (shares[:third], shares[third:-third], shares[-third:]))
    told = f"first third {share(early)}, middle {share(middle)}, last third {share(late)} of the largest layer's"
    return told, HOLDS if middle > early > late else FAILS


# ------------------------------------------------------------------ the claims

NO_CODE = "the official release holds no code for this"
KNE_RIVALS = ("FT", "FTL", "AdaLoRA", "ROME", "MEMIT")
FFN = ("['W_in']", "['W_gate']", "['W_out']")
SLOWER = ("MEMIT", "PMET", "AlphaEdit")
CLAIMS = (
    Claim("ACE, Table 1, Takeaway 1", "FFN layers of similar semantics (NN, CT, LG, CP, LS) lie close, dissimilar ones (AT, ST, CF) apart", "overlap (Jaccard) of the top layers (9 of 28), similar pairs minus all others; exact permutation p", "ace_table1", takeaway_1, NO_CODE),
    Claim("ACE, Table 1", "attention's top layers are the same for all knowledge (a27, a26, a7), FFN's its own", "mean overlap of top layers between categories, attention minus FFN, jackknife over categories", "ace_table1", attention_is_general, NO_CODE),
    Claim("ACE, Figure 2", "zeroing 1% important neurons costs over 90% of accuracy; 1% at random 9.47% and 8.19%", "share of right answers lost: above half in category, and more than at random and off category", "ace_figure2", figure_2, NO_CODE),
    Claim("ACE, Figure 3", "value neurons accumulate one or two layers behind peaks of the query layers", "lag of the largest cross-correlation between query scores and value-neuron counts, two-hop prompts", "ace_figure3", figure_3),
    Claim("ACE, Figure 3", "value neurons lie in middle to deep layers and grow few at the end", "layer with most of the 300 best, and the last layer against it", "ace_figure3", late_values),
    Claim("ACE, section 4.2", "zeroing the top 100 query neurons of a peak layer costs 46.2% and 61.9%", "share of right two-hop answers lost (neurons scaled to the model)", "ace_suppression", suppression_drop, NO_CODE),
    Claim("ACE, section 4.2", "activated value neurons in the layers after fall from (28, 16, 33) to (6, 4, 7), others by 12 in all", "share of activated value neurons lost, three layers after against all others", "ace_suppression", suppression_counts, NO_CODE),
    Claim("ACE, Table 2", "Base 98.42 / 99.17", "multi-hop accuracy of the unedited model, chain of thought", "multihop", base, "", "ace_table2"),
    Claim("ACE, Table 2", "ACE beats PMET by 9.44 (GPT-J) and 37.46 (Qwen3-8B) points", "difference per case, any of three questions", "multihop", table_2(1), "cases of several edits share one z* and are not fully reverted there; value layers 23 to 25 (the paper: 26 to 28); attention is written, which the paper denies", "ace_table2"),
    Claim("ACE, Table 2", "ACE's lead is largest at 3 and 4 edits (43.29 against 17.01)", "the same, cases of 3 and 4 edits", "multihop", table_2(3), "as above", "ace_table2"),
    Claim("ACE, Table 2", "ACE is the best of all editors", "against the best of FT, ROME, MEMIT, PMET", "multihop", ahead("multihop_cot", "ACE", ("FT", "ROME", "MEMIT", "PMET")), "as above", "ace_table2"),
    Claim("ACE, Table 2", "fine-tuning reaches 3.54 / 2.18", "below 10%", "multihop", tuning_fails, "", "ace_table2"),
    Claim("ACE, Table 3", "efficacy: ACE 99.8 / 99.4, PMET 81.6 / 75.6", "difference per case, argmax at each token", "single", beats("efficacy_acc", "ACE", "PMET"), "the prompts of Table 3 are not released", "ace_table3"),
    Claim("ACE, Table 3", "paraphrase: ACE 91.2 / 94.2, PMET 65.8 / 68.9", "difference per case", "single", beats("paraphrase_acc", "ACE", "PMET"), "as above", "ace_table3"),
    Claim("ACE, Table 3", "specificity: ACE 79.2 / 81.8, PMET 74.6 / 64.4", "difference per case", "single", beats("specificity_acc", "ACE", "PMET"), "as above", "ace_table3"),
    Claim("ACE, Table 4", "leaving out the three best of six query layers costs 16.51%, all three of Qwen3's 22.29%", "multi-hop cloze and efficacy without the best of two query layers (decides), and without both", "ace_table4", skipping("q")),
    Claim("ACE, Table 4", "leaving out the two best of three (five) value layers costs 26.87% / 40.45%", "without the best of two value layers (decides), and without both", "ace_table4", skipping("v")),
    Claim("ACE, Table 4", "value layers matter more than query layers", "without the best query layer minus without the best value layer", "ace_table4", beats("multihop_acc", "q", "v", "skip")),
    Claim("ACE, project page", "at an equal number of layers (9 and 8) ACE is ahead of ROME, MEMIT and PMET", "multi-hop cloze at 4 and 3 layers; ROME has one layer and is left out", "ace_bottleneck", bottleneck),
    Claim("ACE, section 6.4", "GPT-J's query and value layers are the same for all domains, Qwen3's shift", "mean overlap of the best layers (3 of 28) between categories; above 0.8: the same", "ace_figure3", invariance),
    Claim("ACE, Appendix E", "attention's increase falls (layer 25) before FFN's (27)", "last layer above half the peak", "ace_table1", attention_first),
    Claim("ACE, Appendix E", "the final layers hold little", "FFN importance of the last layer against the peak, below half", "ace_table1", last_layers_low),
    Claim("ACE, Table 5", "importance rises most where semantics converge ('plays' 0.99, 'of' 0.85), not in between", "importance behind the subject and at the last token, each minus the mean of all other tokens", "ace_table5", converging_tokens, NO_CODE),
    Claim("ACE, Tables 6 and 7", "query neurons are not interpretable, value neurons are", "share of the ten best whose promoted tokens hold the answer, value minus query", "ace_table67", readable("value"), NO_CODE),
    Claim("ACE, Appendix D", "neurons that are both are highly interpretable", "the same, shared minus query", "ace_table67", readable("shared"), NO_CODE),
    Claim("ACE, section 6.4", "27 interpretable neurons zeroed leave 3.2%, 27 important others 59.4%", "share of 1,000 draws that give the answer", "ace_neurons27", neurons_27, NO_CODE),
    Claim("ours", "attribution chooses better layers than chance", "efficacy of ACE at located layers among random layers of the same number, ten draws per seed", "layers", chance),
    Claim("KNE, Table 1", "KNE has the best edit success (99.02 on wiki counterfact)", "against the best of FT, FT-L, AdaLoRA, ROME, MEMIT", "single", ahead("edit_success", "KNE", KNE_RIVALS), "", "kne_table1"),
    Claim("KNE, Table 1", "KNE's portability is above ROME's and MEMIT's", "against the better of them", "single", ahead("portability", "KNE", ("ROME", "MEMIT")), "", "kne_table1"),
    Claim("KNE, Table 1", "KNE has the best locality on ZsRE (76.85)", "against the best of the five", "single", ahead("locality", "KNE", KNE_RIVALS), "second on wiki counterfact, fifth on wiki recent", "kne_table1"),
    Claim("KNE, Table 1", "KNE has the best fluency", "n-gram entropy times 100, against the best of the five", "single", ahead("fluency", "KNE", KNE_RIVALS, unit=""), "", "kne_table1"),
    Claim("KNE, Figure 2", "FFN parameters give better edit success and portability than attention's", "mean over W_in and W_out, minus that over W_Q, W_K, W_V, W_O", "kne_figure2", groups(("edit_success", "portability"), FFN)),
    Claim("KNE, section 4.3", "W_out is the best of all modules", "W_out minus the mean of all others", "kne_figure2", groups(("edit_success", "portability"), ("['W_out']",))),
    Claim("KNE, section 4.3", "mapping layers (gate, up, queries) give better locality than the others", "mean over W_in and W_Q minus that over W_out, W_K, W_V, W_O", "kne_figure2", groups(("locality",), ("['W_in']", "['W_gate']", "['W_Q']"))),
    Claim("KNE, Figure B.3", "located on a quarter of the facts: better locality than located on all", "100 facts in one batch, located on 25 against 100", "kne_figureB3", beats("locality", 25, 100, "located")),
    Claim("KNE, Figure B.4", "more parameters: better edit success and portability, worse locality", "smallest against largest share", "kne_figureB4", curve("share", ("edit_success", None, None, True), ("portability", None, None, True), ("locality", None, None, False))),
    Claim("KNE, Figure B.5", "larger batches: edit success falls, locality rises at first", "edit success from batches of 1 to 100, locality from 1 to 5", "kne_figureB5", curve("batch_size", ("edit_success", 1, 100, False), ("locality", 1, 5, True))),
    Claim("CTP, Table 1", "batches of 100: CTP has the best score", "mean of efficacy, generality, locality; against the best of six", "ctp_table1", ahead("ctp_score", "CTP", ("FT", "ROME", "MEMIT", "PRUNE", "RECT", "AlphaEdit")), "baselines there are from AlphaEdit's paper, with other metrics"),
    Claim("CTP, Table 2", "consecutive edits (3,000): CTP has the best score", "100 edits; against the best of nine", "consecutive", ahead("ctp_score", "CTP", ("FT", "ROME", "KN", "MEMIT", "PMET", "AlphaEdit", "LoRA", "EMMET", "RROME")), "CTP goes over each fact 12 times, its baselines once", "ctp_table2"),
    Claim("CTP, Figure 3", "CTP needs less time per edit than MEMIT, PMET and AlphaEdit", "seconds per fact, single edits one by one (batch_size 1), 1 CPU thread", "ctp_figure3", seconds("CTP", SLOWER, 1)),
    Claim("CTP, section 4.3", "FT-C takes slightly longer than CTP", "the same", "ctp_figure3", seconds("CTP", ("FTL",), 1)),
    Claim("CTP, section 4.3", "KN takes longest of all", "the same", "ctp_figure3", seconds("KN", ("FT", "FTL", "ROME", *SLOWER, "CTP"), -1)),
    Claim("CTP, Figure 4", "nodes of all layers contribute", "importance of T+ (norm of the gradient, not z-scored) by layer: each above a tenth of the largest", "ctp_figure4", all_layers, "the code's z-scores are scaled within each layer, by which no layer can be far below another"),
    Claim("CTP, Figure 4", "middle layers contribute most, early ones more than late ones", "mean over thirds of the layers", "ctp_figure4", early_over_late, "as above"),
    Claim("CTP, Figure 5", "larger T+: better efficacy, worse locality", "smallest against largest", "ctp_figure5", curve("top", ("edit_success", None, None, True), ("specificity_acc", None, None, False))),
    Claim("CTP, Figure 6", "a larger lambda lowers efficacy", "lambda 0.1 to 1", "ctp_figure6", curve("lam", ("edit_success", 0.1, 1.0, False)), "Adam divides lambda's scale out of step B"),
    Claim("CTP, section 4.5", "contrastive rectification raises efficacy by about 4%", "lambda 0.1 against 0, difference per case", "ctp_figure6", beats("edit_success", 0.1, 0.0, "lam"), "lambda = 0 skips step B, and with it a step of momentum"),
    Claim("CTP, section 4.5", "too large a T- lowers efficacy and generality", "one node to fifteen", "ctp_tminus", curve("bottom", ("edit_success", 1, 15, False), ("paraphrase_acc", 1, 15, False))),
)  # fmt: skip
