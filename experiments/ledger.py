"""The ledger: every claim of the three papers (`claims.py`) against what was measured here; and the comparison of editors.

    python experiments/ledger.py                     # experiments/results/*.parquet -> LEDGER.md and COMPARISON.md
    python experiments/ledger.py --collect runs      # first gather the run folders' rows into experiments/results/
    python experiments/ledger.py --check             # fail if the committed ledger is not what this writes

A real model's column fills itself once its rows are among the results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
from claims import CLAIMS, Claim
from deciding import FAILS, HOLDS, OPEN

from qv_lens.evaluation.intervals import bounds, interval
from qv_lens.sweeps.config import read_config
from qv_lens.sweeps.recipes import editors
from qv_lens.sweeps.store import load_run

HERE = Path(__file__).parent
RESULTS, LEDGER, COMPARISON = HERE / "results", HERE / "LEDGER.md", HERE / "COMPARISON.md"
TOYS, REAL = ("toy-gptj", "toy-qwen3"), ("EleutherAI/gpt-j-6B", "Qwen/Qwen3-8B")
DROPPED = ("task", "subject", "text", "metrics", "blocks", "documents", "preset", "editor", "written", "skipped")
#: parts of the comparison: whether of chains, the protocol, and the papers' files whose rows belong there
PARTS = {
    "single": (False, "single", ("editors", "ace_table3", "kne_table1")),
    "batch": (False, "batch", ("editors",)),
    "consecutive": (False, "consecutive", ("editors", "ctp_table2")),
    "multihop": (True, "single", ("editors", "ace_table2")),
    "multihop_batch": (True, "batch", ("editors",)),
    "multihop_consecutive": (True, "consecutive", ("editors",)),
}
#: what more a run on a file sets: of the bundled world's facts multi-hop accuracy is asked with cloze prompts, of a file's
#: chains behind worked examples
CHAINS = ("known=true",)
BEHIND = (*CHAINS, """'metrics=[["efficacy_acc", "multihop_cot"]]'""")
MORE = {"multihop": CHAINS, "ace_table4": BEHIND, "ace_bottleneck": (*BEHIND, "'edited=[5, 6, 8, 9]'")}
#: what makes a row another row
KEY = ("model", "method", "protocol", "data", "count", "seed", "layers", "skip", "edited", "case", "step", "metric")


def collect(runs: Path) -> None:
    """Gather the rows of the run folders named after a result, or after it and a model (layers, layers-toy-gptj,
    layers-toy-gptj-more). Rows of models that are not among them stay."""
    unused = {path for path in runs.iterdir() if (path / "shards").is_dir()}
    for name in sorted({claim.data for claim in CLAIMS} | set(PARTS)):
        folders = [path for path in sorted(runs.iterdir()) if (path / "shards").is_dir() and is_of(path.name, name)]
        unused -= set(folders)
        parts = [of_part(load_run(folder), name, folder.name) for folder in folders]
        frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
        if failed := 0 if frame.empty else int((frame["status"] != "finished").sum()):
            print(f"{name}: {failed} failed tasks left out")
            frame = frame[frame["status"] == "finished"].infer_objects()
        if frame.empty:
            continue
        frame = plain(frame.reset_index(drop=True))
        path = RESULTS / f"{name}.parquet"
        if path.exists():
            old = pd.read_parquet(path)
            frame = pd.concat([old[~old["model"].isin(frame["model"])], frame], ignore_index=True)
        RESULTS.mkdir(exist_ok=True)
        frame.to_parquet(path, compression="zstd", index=False)
        print(f"{name}: {len(frame)} rows, those of {', '.join(folder.name for folder in folders)} new")
    if unused:
        print(f"of no result, left alone: {', '.join(sorted(path.name for path in unused))}")


def of_part(frame: pd.DataFrame, name: str, folder: str) -> pd.DataFrame:
    """The rows that belong to a result: all of a paper's own file; of the comparison's those of the part."""
    chains, protocol, files = PARTS.get(name, (False, "", ()))
    if not protocol or folder.startswith(files[1:]) or "hops" not in frame:  # no hops: all its tasks failed
        return frame
    wanted = (frame["protocol"] == protocol) & ((frame["hops"] > 1) == chains)
    return frame[wanted | (frame["status"] != "finished")]


def is_of(folder: str, name: str) -> bool:
    """Whether a run folder holds rows of a result, by its name."""
    tails = ("", *(f"-{model.split('/')[-1]}" for model in (*TOYS, *REAL)))
    files = (name, *(PARTS[name][2] if name in PARTS else ()))
    return folder.removesuffix("-more") in {f"{file}{tail}" for file in files for tail in tails}


def plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows as results keep them: an editor's changed settings as columns, no long texts, no row twice."""
    if "editor" in frame:
        told = [{} if value in (None, "null") or value != value else json.loads(value) for value in frame["editor"]]
        varied = pd.json_normalize(told)
        frame = pd.concat([frame, varied.map(str) if "parameters" in varied else varied], axis=1)
        frame = frame.drop_duplicates([name for name in (*KEY, *varied, "batch_size") if name in frame and name != "editor"])
        frame = frame.astype({name: int for name in ("edits", "hops", "case", "step") if name in frame})
    if "layer" in frame and frame["layer"].dtype == object:
        frame["layer"] = frame["layer"].astype(str)
    return frame.drop(columns=[name for name in DROPPED if name in frame])


def command(claim: Claim) -> str:
    """How the claim's rows are made on another model."""
    file = HERE / f"{claim.file or claim.data}.toml"
    edits = read_config(file).recipe == "editors"
    sets = ["data=FILE", "text=TEXT"] if edits else ["facts=FILE"]
    said = " ".join(f"--set {one}" for one in (*sets, *MORE.get(claim.data, ())))
    return f"`qv-lens run experiments/{file.name} --model MODEL {said} --out runs/{file.stem}-NAME`"


def written() -> str:
    """The ledger as text."""
    lines = [
        "# The ledger", "",
        "Claims of ACE, CTP and KNE that can be put as a number, against what was measured. Written by `python "
        "experiments/ledger.py` from `experiments/results/`; made on 2 CPU cores with the bundled models, which are small (12 layers) "
        "and were trained on an invented world: a claim that fails on them need not fail on GPT-J-6B or Qwen3-8B, and the other way "
        "round. Editors are run as the presets say, ACE at layers that a grid on 8 facts chose, not at those that attribution locates "
        "(the row on chance compares both). A real model's cells are empty until somebody has run the row's command (MODEL `EleutherAI/gpt-j-6B` or `Qwen/Qwen3-8B`, "
        "NAME what follows its slash, FILE a dataset of facts or edits, TEXT a corpus for C0; layer "
        "numbers and letters of the paper's own model are in the file's first lines) and `python experiments/ledger.py --collect runs`. Intervals are 95% ones over cases (± half of it where both sides are as long): Wilson's of shares of 0 and 1, Student's t of paired differences, Newcombe's way of putting two together where there are no pairs; the cases of one batch and of one row of "
        "consecutive edits share one edit, so there it is too narrow. `single`, `batch`, `consecutive` and `multihop` come from "
        "`editors.toml`, or from the papers' own files named in the row.",
        "", "| source | claim | statistic | toy-gptj | toy-qwen3 | GPT-J-6B | Qwen3-8B | release and set-up | data and command |", "|" + "---|" * 9,
    ]  # fmt: skip
    count = {HOLDS: 0, FAILS: 0, OPEN: 0}
    for claim in CLAIMS:
        path = RESULTS / f"{claim.data}.parquet"
        frame = pd.read_parquet(path) if path.exists() else pd.DataFrame({"model": []})
        cells = []
        for models in (TOYS, REAL):
            for asked in (models,) if claim.both else ((model,) for model in models):
                mine = frame[frame["model"].isin(asked)]
                if mine["model"].nunique() < len(asked):
                    cells += ["" if models == REAL else "not run"] * len(asked)
                    continue
                try:
                    told, verdict = claim.decide(mine)
                except KeyError as missing:  # rows of a run that was stopped, or that varied something else
                    told, verdict = f"not measured: {missing}", OPEN
                count[verdict] += models == TOYS
                cells += [*(["against the next column"] if claim.both else []), f"**{verdict}**: {told}"]
        row = [claim.source, claim.words, claim.statistic, *cells, claim.release, f"`{claim.data}`: {command(claim)}"]
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        f"On the two bundled models together: {count[HOLDS]} hold, {count[FAILS]} fail, {count[OPEN]} are undecided.",
        "",
    ]
    return "\n".join(lines)


#: the comparison's tables: results, heading, metrics (`@50`: when 50 facts had been edited)
OF_FACTS = (
    "efficacy_acc", "efficacy_success", "efficacy_gen", "paraphrase_acc", "paraphrase_success", "specificity_acc", "specificity_success",
    "portability", "locality", "multihop_acc", "fluency",
)  # fmt: skip
OF_CHAINS = (
    "efficacy_acc",
    "instance_wise",
    "multihop_cot",
    "multihop_cot_1",
    "multihop_cot_2",
    "multihop_cot_3",
    "multihop_cot_4",
    "multihop_cot_2h",
    "multihop_cot_3h",
    "multihop_cot_4h",
)
TABLES = (
    ("single", "Single edits, each taken back", OF_FACTS),
    ("batch", "One batch of 32", OF_FACTS),
    (
        "consecutive",
        "100 consecutive edits, all asked at the end",
        ("efficacy_acc@25", "efficacy_acc@50", "efficacy_acc@75", *OF_FACTS),
    ),
    ("multihop", "MQuAKE's chains of 2 to 4 hops, chain of thought", OF_CHAINS),
    ("multihop_batch", "The chains' edits in one batch of 32 chains", OF_CHAINS),
    ("multihop_consecutive", "The chains' edits of 100 chains one after another", OF_CHAINS),
)


def comparison() -> str:
    """Every editor on both bundled models, as text."""
    lines = [
        "# The comparison of editors", "",
        "Written by `python experiments/ledger.py` from `experiments/results/` (runs of `experiments/editors.toml`; settings: the "
        "presets of `qv_lens/editing/presets.py`, chosen for single edits on 8 facts, one of which the seeds have drawn again; "
        "CTP's learning rate of batches by hand). Percent, mean and in square brackets its 95% interval "
        "over the cases (Wilson's of shares of 0 and 1, Student's t of other values); seeds draw anew, so of 102 single edits 99 and of 96 in batches 93 are different facts; "
        "fluency is n-gram entropy times 100; ‖dW‖/‖W‖ the largest of any case; median seconds per fact on one CPU thread with another "
        "job beside it. `_acc`: every token of the answer is the argmax. `multihop_cot_2`: cases with two edits, `multihop_cot_2h`: of two hops. In round brackets: of how many cases (behind a metric: for every method), where not all have such "
        "prompts. Only what is "
        "printed here was run.",
    ]  # fmt: skip
    for name, title, metrics in TABLES:
        path = RESULTS / f"{name}.parquet"
        if not path.exists():
            continue
        for model, frame in pd.read_parquet(path).groupby("model"):
            frame = pd.concat([frame, *editors.by_chain(frame)])
            last = frame["step"] == frame.groupby(["method", "seed", "case"])["step"].transform("max")
            count = frame[last].drop_duplicates(["method", "seed", "case"]).groupby("method").size()
            frame.loc[~last, "metric"] += "@" + frame.loc[~last, "step"].astype(str)  # along the way
            shown = [metric for metric in metrics if (frame["metric"] == metric).any()]
            asked = frame.dropna(subset="after").groupby(["metric", "method"]).size()
            same = {metric: int(n.iloc[0]) for metric in shown if (n := asked[metric]).nunique() == 1 and n.iloc[0] < count.min()}
            lines += [
                "",
                f"## {title}: {model}",
                "",
                "| method | cases | " + " | ".join(f"{m} ({same[m]})" if m in same else m for m in shown) + " | ‖dW‖/‖W‖ | s |",
                "|" + "---|" * (len(shown) + 4),
            ]
            for method, rows in frame.groupby("method", sort=False):
                cells = []
                for metric in shown:
                    values = rows.loc[rows["metric"] == metric, "after"].dropna()
                    ends = interval(values, bounds(metric.partition("@")[0]))
                    known = len(values) and ends.low == ends.low
                    half = f" [{100 * ends.low:.0f}, {100 * ends.high:.0f}]" if known else ""
                    few = f" ({len(values)})" if metric not in same and len(values) < count[method] else ""
                    cells.append(f"{100 * values.mean():.0f}{half}{few}" if len(values) else "")
                norm = f"{rows['relative_norm'].max():.1f}"
                each = rows.groupby(["seed", "case"])["seconds"].first().median()
                lines.append(f"| {method} | {count[method]} | {' | '.join(cells)} | {norm} | {each:.2f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="RUNS")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect)
    for path, text in ((LEDGER, written()), (COMPARISON, comparison())):
        if args.check and path.read_text() != text:
            raise SystemExit(f"{path} is not what this command writes.")
        if not args.check:
            path.write_text(text)
            print(path)


if __name__ == "__main__":
    main()
