"""How single claims of ACE and CTP are decided (`deciding.py` has what several share)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from deciding import (
    FAILS,
    HOLDS,
    NOT_MEASURED,
    OPEN,
    Decide,
    Estimate,
    Told,
    ahead,
    averaged,
    beats,
    compared,
    decided,
    difference,
    lost,
    minus,
    multihop,
    nearer,
    per_case,
    points,
    share,
    together,
    two_samples,
)

from qv_lens.editing.presets import presets
from qv_lens.evaluation.intervals import DIFFERENCE, UNBOUNDED, student
from qv_lens.facts.categories import RELATED
from qv_lens.plots import VECTORS

#: layers left out of ACE's: three of GPT-J's six query layers and all three of Qwen3-8B's, two of three and of five value layers
LEFT_OUT = {
    "q": {"toy-gptj": "q", "toy-qwen3": "qq", "EleutherAI/gpt-j-6B": "qqq", "Qwen/Qwen3-8B": "qqq"},
    "v": {"toy-gptj": "v", "toy-qwen3": "v", "EleutherAI/gpt-j-6B": "vv", "Qwen/Qwen3-8B": "vv"},
}

#: editors that CTP is faster than, and that consecutive edits ruin
SLOWER = ("MEMIT", "PMET", "AlphaEdit")

# ------------------------------------------------------------------ ACE: layers


def best_layers(frame: pd.DataFrame, part: str, number: int, of: int = 28) -> dict[str, set[int]]:
    """The best layers of each category: as many of the model's as `number` of the paper's model (GPT-J's 28)."""
    count = max(1, round(number * frame["layer"].nunique() / of))
    chosen = frame[(frame["part"] == part) & (frame["rank"] <= count)]
    return {name: set(rows["layer"]) for name, rows in chosen.groupby("category")}


def _is_gptj(frame: pd.DataFrame) -> bool:
    """Which of the paper's two models the rows' model stands for."""
    return "gpt" in str(frame["model"].iloc[0]).lower()


def _depth(frame: pd.DataFrame) -> int:
    return 28 if _is_gptj(frame) else 36


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
    found = Estimate.around(gap, float(student(np.sqrt((len(left) - 1) * np.var(left)), len(left))), len(left))
    told = f"overlap of attention {mean_overlap(attn):.2f}, of FFN {mean_overlap(ffn):.2f}"
    return f"{told} (difference {gap:+.2f} {found.spread(digits=2)})", decided(found)


def attention_first(frame: pd.DataFrame) -> Told:
    """By the layers' whole outputs, as Figure 5 is drawn."""
    scores = frame[frame["part"].isin(VECTORS)].groupby(["part", "layer"])["score"].mean()
    scores = scores.rename({part: part.removesuffix("_vector") for part in VECTORS}, level="part")
    peaks = {part: int(scores[part].idxmax()) for part in ("attn", "ffn")}
    falls = {part: max(layer for layer, v in scores[part].items() if v >= 0.5 * scores[part].max()) for part in peaks}
    told = "; ".join(f"{part}'s last layer above half its peak: {falls[part]} (peak {peaks[part]})" for part in peaks)
    return told, HOLDS if falls["attn"] < falls["ffn"] else FAILS


def last_layers_low(frame: pd.DataFrame) -> Told:
    scores = averaged(frame, "ffn_vector")
    last, peak = scores.iloc[-1], scores.loc[scores["score"].idxmax()]
    told = f"last FFN layer {last['score']:.2f} ± {last['interval']:.2f} nats, the largest (layer {peak.name}) {peak['score']:.2f} ± {peak['interval']:.2f}"
    half = (last["interval"] ** 2 + (peak["interval"] / 2) ** 2) ** 0.5
    return told, decided(Estimate.around(peak["score"] / 2 - last["score"], half))


def figure_2(frame: pd.DataFrame) -> Told:
    """In either scope: more than half is lost in category, and more than at random and than off category. Seeds ask facts
    again: the intervals are over as many prompts as one seed asks."""
    lines, verdicts = [], []
    for (layer, apart), rows in frame.groupby(["layer", "held_out"]):
        table = rows.pivot_table(index=["category", "seed"], columns=["neurons", "group"], values="drop_relative")
        top, drawn, off = (table[key] for key in (("top", "in category"), ("random", "in category"), ("top", "off category")))
        where = {"all": "whole model", "top": "each category's best layer"}.get(str(layer), f"layer {layer}")
        right = rows["clean"] * rows["prompts_asked"]
        sums = rows.assign(right=right, gone=right * rows["drop_relative"]).groupby(["neurons", "group"])[["gone", "right"]].sum()
        sums /= rows["seed"].nunique()
        named = {
            "in category": ("top", "in category"),
            "at random": ("random", "in category"),
            "off category": ("top", "off category"),
        }
        where += ", other prompts than rank" if apart else ", the prompts that rank"
        lines.append(f"{where}: " + ", ".join(f"{lost(*sums.loc[key])} {name}" for name, key in named.items()))
        large = HOLDS if top.mean() > 0.5 else FAILS
        verdicts.append(together([large, *(decided(difference(top, other)) for other in (drawn, off))]))
    return "; ".join(lines), HOLDS if HOLDS in verdicts else OPEN if OPEN in verdicts else FAILS


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
    count = averaged(frame, "count")
    peak, most, last = int(count["score"].idxmax()), count.loc[count["score"].idxmax()], count.iloc[-1]
    told = f"most of the 300 best value neurons in layer {peak} of {len(count)}: {most['score']:.1f} ± {most['interval']:.1f}; in the last {last['score']:.1f} ± {last['interval']:.1f}"
    return told, HOLDS if peak >= len(count) / 3 and last["score"] < most["score"] / 2 else FAILS


def separation(frame: pd.DataFrame) -> Told:
    """Mean distance of the best value layers from the best query layers (3 of 28 each), as a share of the model's depth:
    far apart (GPT-J: f_q16 to 18, f_v28 to 30), or next to each other and overlapping (Qwen3-8B: 27 to 29, 30 to 32)."""
    value, query = (best_layers(frame, part, 3, _depth(frame)) for part in ("ffn", "query"))
    depth = frame["layer"].nunique()
    gaps = [(np.mean(list(value[name])) - np.mean(list(query[name]))) / depth for name in value]
    found = Estimate.of(gaps, DIFFERENCE)
    told = (
        f"value layers lie {share(found.mean)} {found.spread(100)} of the depth above the query layers ({len(gaps)} categories)"
    )
    return told, decided(found.shifted(-0.2) if _is_gptj(frame) else nearer(found, 0.2))


def suppression_drop(frame: pd.DataFrame) -> Told:
    rows = frame[(frame["category"] == "all") & frame["condition"].str.startswith("Zero")].drop_duplicates("condition")
    right = rows["clean"] * rows["prompts_asked"]
    told = "; ".join(
        f"layer {row.suppressed:.0f} ({row.neurons:.0f} neurons): {lost(row.drop_relative * n, n)}"
        for row, n in zip(rows.itertuples(), right, strict=True)
    )
    if rows.empty or rows["drop_relative"].isna().any():
        return told, OPEN
    return told, HOLDS if (rows["drop_relative"] > 0.3).all() else FAILS


def suppression_counts(frame: pd.DataFrame) -> Told:
    here = frame[frame["category"] == "all"]
    clean = here[here["condition"] == "clean"].set_index("layer")
    lines, good = [], []
    for condition, rows in here[here["condition"].str.startswith("Zero")].groupby("condition"):
        now, layer = rows.set_index("layer"), int(rows["suppressed"].iloc[0])
        near = (clean.index > layer) & (clean.index <= layer + 3)
        told, fallen = [], []
        for where in (clean.index[near], clean.index[~near]):
            (was, half), (is_now, other) = (
                (f["count"][where].sum(), (f["interval"][where] ** 2).sum() ** 0.5) for f in (clean, now)
            )
            told.append(
                f"{was:.1f} ± {half:.1f} to {is_now:.1f} ± {other:.1f} ({now['original'][where].sum():.1f} of them the same)"
            )
            fallen.append(1 - is_now / max(1e-9, was))
        lines.append(f"{condition}: {told[0]} in the three layers after, {told[1]} in all others")
        good.append(fallen[0] > 0.3 and fallen[0] > 3 * abs(fallen[1]))
    return "; ".join(lines), OPEN if not good else HOLDS if all(good) else FAILS


def invariance(frame: pd.DataFrame) -> Told:
    parts = (("query", "query"), ("value", "ffn"))
    told = {name: mean_overlap(best_layers(frame, part, 3, _depth(frame))) for name, part in parts}
    fixed = min(told.values()) > 0.8
    same = HOLDS if fixed else FAILS  # that they shift is no more than that: chance would move them as well
    verdict = same if _is_gptj(frame) else FAILS if fixed else OPEN
    return ", ".join(f"best {k} layers overlap {v:.2f}" for k, v in told.items()), verdict


# ------------------------------------------------------------------ ACE: tokens and neurons


def converging_tokens(frame: pd.DataFrame) -> Told:
    """The token behind the subject and the last one, each against the mean of all other tokens."""
    whole = frame.assign(total=frame["ffn"] + frame["attn"])
    named = whole["place"].where(whole["place"].isin(("first behind it", "last")), "others")
    table = whole.pivot_table(index="prompt", columns=named, values="total", aggfunc="mean")
    lines, verdicts = [], []
    for place in ("first behind it", "last"):
        gap = difference(table[place], table["others"], UNBOUNDED)
        where = "last token" if place == "last" else "behind the subject"
        lines.append(f"{where} − others {gap.mean:+.2f} {gap.spread(digits=2)} nats")
        verdicts.append(decided(gap))
    return f"{'; '.join(lines)} ({gap.cases} prompts)", together(verdicts)


def readable(one: str) -> Decide:
    def decide(frame: pd.DataFrame) -> Told:
        table = frame.pivot_table(index="prompt", columns="role", values="interpretable", aggfunc="mean")
        gap = difference(table[one], table["query"])
        told = ", ".join(f"{role} {share(value)}" for role, value in table.mean().items())
        return f"{told} of the ten best hold the answer ({one} − query {points(gap)})", decided(gap)

    return decide


def neurons_27(frame: pd.DataFrame) -> Told:
    """Less than half is left without the interpretable ones, and less than without as many important others."""
    table = frame.groupby("set")[["sampled", "zeroed"]].mean()
    told = ", ".join(f"{name} {share(table.loc[name, 'sampled'])}" for name in ("none", "interpretable", "important", "random"))
    a, b = (frame[frame["set"] == name].set_index(["category", "prompt"])["sampled"] for name in ("important", "interpretable"))
    gap = difference(a, b)
    told = f"{told} (mean {table.loc['interpretable', 'zeroed']:.0f} neurons; important − interpretable {points(gap)})"
    return told, together([HOLDS if table.loc["interpretable", "sampled"] < 0.5 else FAILS, decided(gap)])


# ------------------------------------------------------------------ ACE: edits


def table_2(frame: pd.DataFrame) -> Told:
    table = per_case(frame, "multihop_cot", "method")
    if not {"ACE", "PMET"} <= set(table):
        return NOT_MEASURED
    table = table.dropna(subset=["ACE", "PMET"])
    edits = frame.drop_duplicates(table.index.names).set_index(table.index.names)["edits"].reindex(table.index)
    by = table.groupby(edits)[["ACE", "PMET"]].mean()
    told = ", ".join(f"{k}: {share(v['ACE'])} / {share(v['PMET'])}" for k, v in by.iterrows())
    gap = difference(table["ACE"], table["PMET"])
    return f"ACE − PMET {points(gap)}; ACE / PMET by edits {told}", decided(gap)


def base(frame: pd.DataFrame) -> Told:
    value = frame.loc[frame["metric"] == "multihop_cot", "before"].mean()
    return (share(value), HOLDS if value > 0.95 else FAILS) if value == value else NOT_MEASURED


def tuning_fails(frame: pd.DataFrame) -> Told:
    table = per_case(frame, "multihop_cot", "method")
    if "FT" not in table:
        return NOT_MEASURED
    return f"FT {share(table['FT'].mean())}", HOLDS if table["FT"].mean() < 0.1 else FAILS


def _skips(frame: pd.DataFrame) -> tuple[pd.DataFrame, str, str]:
    """One model's rows with '' where nothing is left out, and the letters of as many query and value layers as in Table 4."""
    model = str(frame["model"].iloc[0])
    query, value = (LEFT_OUT[letter].get(model, letter) for letter in "qv")
    return frame.assign(skip=frame["skip"].fillna("")), query, value


def skipping(letter: str) -> Decide:
    """What layers of a kind left out cost in multi-hop accuracy (as many as in Table 4: these decide) and efficacy."""

    def decide(frame: pd.DataFrame) -> Told:
        frame, query, value = _skips(frame)
        decisive, hops, lines, verdicts = query if letter == "q" else value, multihop(frame), [], {}
        for metric in (hops, "efficacy_acc"):
            table = per_case(frame, metric, "skip")
            if not {"", decisive} <= set(table):
                return NOT_MEASURED
            parts = []
            for letters in (name for name in table if name and set(name) == {letter}):
                loss = difference(table[""], table[letters])
                less = f", {100 * loss.mean / table[''].mean():.0f}% less" if loss.mean > 0 else ""  # as Table 4 counts
                parts.append(f"without {letters} {share(table[letters].mean())} ({points(-loss)}{less})")
                verdicts[metric, letters] = decided(loss)
            lines.append(f"{metric} {share(table[''].mean())}, {', '.join(parts)}")
        return "; ".join(lines), verdicts[hops, decisive]

    return decide


def values_matter_more(frame: pd.DataFrame) -> Told:
    """Without query layers more is right than without value layers: as many as in Table 4, and all of the bundled models'."""
    frame, query, value = _skips(frame)
    pairs = {(query, value), *([("q", "v"), ("qq", "vv")] if query != "qqq" else [])}
    told = [beats(multihop(frame), a, b, "skip")(frame) for a, b in sorted(pairs)]
    return "; ".join(words for words, _ in told), together([verdict for _, verdict in told])


def more_sensitive(frame: pd.DataFrame) -> Told:
    """Of both models: without as many layers of a kind as in Table 4 the second (by name: Qwen3) loses more than the first (GPT-J)."""
    lines, verdicts, lost_by = [], [], {"query": [], "value": []}
    for _, rows in frame.groupby("model"):
        rows, *left_out = _skips(rows)
        table = per_case(rows, multihop(rows), "skip")
        if not {"", *left_out} <= set(table):
            return NOT_MEASURED
        for losses, letters in zip(lost_by.values(), left_out, strict=True):
            losses.append((table[""] - table[letters]).dropna())
    for kind, (gptj, qwen) in lost_by.items():
        gap = two_samples(qwen, gptj, DIFFERENCE)
        lines.append(
            f"{kind} layers: {share(gptj.mean())} and {share(qwen.mean())} lost ({100 * gap.mean:+.1f} {gap.spread(100)} points, "
            f"{len(gptj)} and {len(qwen)} cases)"
        )
        verdicts.append(decided(gap))
    return "; ".join(lines), together(verdicts)


def _own_layers(frame: pd.DataFrame, method: str) -> int:
    """How many layers the preset of the rows' model edits."""
    editor = presets(str(frame["model"].iloc[0]))[method].editor
    return sum(len(getattr(editor, name, ())) for name in ("query_layers", "value_layers", "layers"))


def bottleneck(frame: pd.DataFrame) -> Told:
    """ACE against the better of MEMIT and PMET at the number of layers that ACE edits in Table 2."""
    count, metric, lines = _own_layers(frame, "ACE"), multihop(frame), []
    for edited, rows in frame.groupby("edited"):
        means = per_case(rows, metric, "method").mean()
        lines.append(f"{edited} layers: " + ", ".join(f"{name} {share(value)}" for name, value in means.items()))
    told, verdict = ahead(metric, "ACE", ("MEMIT", "PMET"))(frame[frame["edited"] == count])
    return f"at {count} layers {told}; {'; '.join(lines)}", verdict


def marginal(frame: pd.DataFrame) -> Told:
    """What MEMIT and PMET gain in multi-hop accuracy from their own number of layers to the most: each less than ten points."""
    metric, lines, verdicts = multihop(frame), [], []
    for method in ("MEMIT", "PMET"):
        table, own = per_case(frame[frame["method"] == method], metric, "edited"), _own_layers(frame, method)
        if own not in table or table.columns[-1] == own:
            return NOT_MEASURED
        gain = difference(table[table.columns[-1]], table[own])
        values = ", ".join(f"{k:g}: {share(v)}" for k, v in table.mean().items())
        lines.append(f"{method} {values} ({own} to {table.columns[-1]:g}: {points(gain)})")
        verdicts.append(decided((-gain).shifted(0.1)))
    return "; ".join(lines), together(verdicts)


def by_edits(frame: pd.DataFrame) -> Told:
    """Multi-hop accuracy of cases of one edit, less that of three and four: above 0 for ROME and MEMIT, larger than ACE's."""
    table = per_case(frame, "multihop_cot", "method")
    if not {"ACE", "ROME", "MEMIT"} <= set(table):
        return NOT_MEASURED
    edits = frame.drop_duplicates(table.index.names).set_index(table.index.names)["edits"].reindex(table.index)
    lines, falls = [], {}
    for method in ("ROME", "MEMIT", "ACE"):
        few, many = table.loc[edits == 1, method].dropna(), table.loc[edits >= 3, method].dropna()
        fall = falls[method] = two_samples(few, many)
        lines.append(f"{method} {share(few.mean())} to {share(many.mean())} ({100 * fall.mean:+.1f} {fall.spread(100)} points)")
    mine = falls.pop("ACE")
    verdicts = [v for fall in falls.values() for v in (decided(fall), decided(minus(fall, mine)))]
    return f"one edit to three and four: {'; '.join(lines)} ({len(few)} and {len(many)} cases)", together(verdicts)


def worse_on_qwen(frame: pd.DataFrame) -> Told:
    """Of both models: ROME, MEMIT and PMET reach less on the second (by name: Qwen3) than on the first (GPT-J)."""
    lines, verdicts = [], []
    tables = [per_case(rows, "multihop_cot", "method") for _, rows in frame.groupby("model")]
    for method in ("ROME", "MEMIT", "PMET"):
        if not all(method in table for table in tables):
            return NOT_MEASURED
        gptj, qwen = (table[method].dropna() for table in tables)
        gap = two_samples(qwen, gptj)
        lines.append(f"{method} {share(gptj.mean())} and {share(qwen.mean())} ({100 * gap.mean:+.1f} {gap.spread(100)} points)")
        verdicts.append(decided(-gap))
    return "; ".join(lines), together(verdicts)


def chance(frame: pd.DataFrame) -> Told:
    """Located layers among the random draws of their own seed; p over all seeds' draws together."""
    table = per_case(frame, "efficacy_acc", "layers")
    seeds = table.groupby("seed").mean()
    drawn = seeds[[name for name in seeds if str(name).startswith("random")]]
    if "located" not in seeds or drawn.empty:
        return NOT_MEASURED
    better, draws = int(drawn.ge(seeds["located"], axis=0).to_numpy().sum()), drawn.size
    p = (1 + better) / (1 + draws)
    named = ", ".join(f"{name} {share(table[name].mean())}" for name in ("located", "value", "query", "all") if name in table)
    told = f"{named}, random {share(drawn.to_numpy().mean())} (from {share(drawn.to_numpy().min())} to {share(drawn.to_numpy().max())})"
    verdict = HOLDS if p < 0.05 else FAILS if p > 0.5 else OPEN
    return f"{told}; {better} of {draws} draws are as good or better, p = {p:.2f} ({len(table)} cases)", verdict


# ------------------------------------------------------------------ KNE


def quarter(metrics: Sequence[str], within: float | None = None) -> Decide:
    """An ensemble located on a quarter of the facts against one located on all: better by each metric, or no further from
    it than `within`."""

    def decide(frame: pd.DataFrame) -> Told:
        counts = sorted(frame["located"].dropna().unique())
        if len(counts) < 2:
            return NOT_MEASURED
        some = min(counts, key=lambda count: abs(count - counts[-1] / 4))
        return compared(metrics, some, counts[-1], "located", within)(frame)

    return decide


# ------------------------------------------------------------------ CTP


def seconds(one: str, others: tuple[str, ...], sign: int) -> Decide:
    """`one` takes less time than each of the others (sign 1), or more (-1)."""

    def decide(frame: pd.DataFrame) -> Told:
        alone = frame[frame["case"] > 0]  # a seed's first case samples the contexts as well
        each = alone.groupby(["seed", "case", "method"], sort=False)["seconds"].first().unstack()
        if not {one, *others} <= set(each):
            return NOT_MEASURED
        told = "medians: " + ", ".join(f"{name} {value:.2f} s" for name, value in each.median().items())
        gaps = {other: difference(each[other], each[one], UNBOUNDED) for other in others}
        told += "; " + ", ".join(f"{other} − {one} {gap.mean:+.2f} {gap.spread(digits=2)} s" for other, gap in gaps.items())
        return told, together([decided(gap if sign > 0 else -gap) for gap in gaps.values()])

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
    edges = [round(layer * len(shares) / 32) for layer in (4, 18, 27)]  # the paper's 1 to 4, 4 to 18 and 28 to 32 of 32
    parts = {"early": shares[: edges[0]], "middle": shares[edges[0] : edges[1]], "late": shares[edges[2] :]}
    told = ", ".join(f"{name} ({part.index[0]} to {part.index[-1]}) {share(part.mean())}" for name, part in parts.items())
    early, middle, late = (part.mean() for part in parts.values())
    return f"{told} of the largest layer's", HOLDS if middle > early > late else FAILS


def all_fall(frame: pd.DataFrame) -> Told:
    """After all edits of a row MEMIT, PMET and AlphaEdit have less than a tenth of the score."""
    table = per_case(frame, "ctp_score", "method")
    if not {*SLOWER, "CTP"} <= set(table):
        return NOT_MEASURED
    told = ", ".join(f"{name} {share(table[name].mean())}" for name in ("CTP", *SLOWER))
    return told, together([decided((-Estimate.of(table[name])).shifted(0.1)) for name in SLOWER])
