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
from deciding import FAILS, HOLDS, OPEN, interval

from qv_lens.sweeps.config import read_config
from qv_lens.sweeps.store import load_run

HERE = Path(__file__).parent
RESULTS, LEDGER, COMPARISON = HERE / "results", HERE / "LEDGER.md", HERE / "COMPARISON.md"
TOYS, REAL = ("toy-gptj", "toy-qwen3"), ("EleutherAI/gpt-j-6B", "Qwen/Qwen3-8B")
DROPPED = ("task", "subject", "text", "metrics", "blocks", "documents", "editor", "written", "skipped")
#: parts of the comparison: which data and protocol, and the papers' files whose rows belong there
PARTS = {
    "single": ("facts", "single", ("ace_table3", "kne_table1")),
    "batch": ("facts", "batch", ()),
    "consecutive": ("facts", "consecutive", ("ctp_table2",)),
    "multihop": ("multihop", "single", ("ace_table2",)),
}


def collect(runs: Path) -> None:
    """Gather the rows of the run folders named after a result, or after it and a model (layers, layers-toy-gptj, layers-toy-gptj-more)."""
    for name in sorted({claim.data for claim in CLAIMS} | set(PARTS)):
        data, protocol, files = PARTS.get(name, ("", "", ()))
        tails = ("", *(f"-{model.split('/')[-1]}" for model in (*TOYS, *REAL)))
        begins = {f"{part}{tail}" for part in (name, *files) for tail in tails}
        folders = [
            path for path in sorted(runs.iterdir()) if (path / "shards").is_dir() and path.name.removesuffix("-more") in begins
        ]
        parts = [part for folder in folders if len(part := load_run(folder))]
        if not parts:
            continue
        frame = pd.concat(parts, ignore_index=True)
        if protocol:  # a file of one's own, in the place of the world's facts, counts as they do
            frame = frame[(frame["protocol"] == protocol) & ((frame["data"] == "multihop") == (data == "multihop"))]
        if "editor" in frame:
            told = [{} if value in (None, "null") or value != value else json.loads(value) for value in frame["editor"]]
            varied = pd.json_normalize(told).set_axis(frame.index)
            frame = pd.concat([frame, varied.map(str) if "parameters" in varied else varied], axis=1)
        frame = frame.drop(columns=[c for c in DROPPED if c in frame])
        if "layer" in frame and frame["layer"].dtype == object:
            frame["layer"] = frame["layer"].astype(str)
        measured = [c for c in ("before", "after", "relative_norm", "seconds", "count", "batch_size", "curve") if c in frame]
        if protocol:  # the same case asked in two files is one case
            frame = frame.drop_duplicates([c for c in frame if c not in measured])
        RESULTS.mkdir(exist_ok=True)
        frame.to_parquet(RESULTS / f"{name}.parquet", compression="zstd", index=False)
        print(f"{name}: {len(frame)} rows of {len(folders)} runs")


def command(claim: Claim) -> str:
    """How the claim's rows are made on another model."""
    file = HERE / f"{claim.file or claim.data}.toml"
    facts = "data" if read_config(file).recipe == "editors" else "facts"
    return f"`qv-lens run experiments/{file.name} --model MODEL --set {facts}=FILE --out runs/{file.stem}-NAME`"


def written() -> str:
    """The ledger as text."""
    lines = [
        "# The ledger", "",
        "Claims of ACE, CTP and KNE that can be put as a number, against what was measured. Written by `python "
        "experiments/ledger.py` from `experiments/results/`; made on 2 CPU cores with the bundled models, which are small (12 layers) "
        "and were trained on an invented world: a claim that fails on them need not fail on GPT-J-6B or Qwen3-8B, and the other way "
        "round. A real model's cells are empty until somebody has run the row's command (MODEL `EleutherAI/gpt-j-6B` or `Qwen/Qwen3-8B`, "
        "NAME what follows its slash, FILE a dataset of facts or edits; edits also want `--set text=`, a corpus) and "
        "`python experiments/ledger.py --collect runs`. ± is half a 95% interval over cases; the cases of one batch and of one row of "
        "consecutive edits share one edit, so there it is too narrow. `single`, `batch`, `consecutive` and `multihop` come from "
        "`editors.toml`, or from the papers' own files named in the row.",
        "", "| source | claim | statistic | toy-gptj | toy-qwen3 | GPT-J-6B | Qwen3-8B | release and set-up | data and command |", "|" + "---|" * 9,
    ]  # fmt: skip
    count = {HOLDS: 0, FAILS: 0, OPEN: 0}
    for claim in CLAIMS:
        path = RESULTS / f"{claim.data}.parquet"
        frame = pd.read_parquet(path) if path.exists() else pd.DataFrame({"model": []})
        cells = []
        for model in (*TOYS, *REAL):
            mine = frame[frame["model"] == model]
            if mine.empty:
                cells.append("" if model in REAL else "not run")
                continue
            told, verdict = claim.decide(mine)
            count[verdict] += model in TOYS
            cells.append(f"**{verdict}**: {told}")
        row = [claim.source, claim.words, claim.statistic, *cells, claim.release, f"`{claim.data}`: {command(claim)}"]
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        f"On the two bundled models together: {count[HOLDS]} hold, {count[FAILS]} fail, {count[OPEN]} are undecided.",
        "",
    ]
    return "\n".join(lines)


#: the comparison's tables: results, heading, metrics
TABLES = (
    ("single", "Single edits, each taken back", ("efficacy_acc", "efficacy_gen", "paraphrase_acc", "specificity_acc", "portability", "locality", "multihop_acc", "fluency")),
    ("batch", "One batch of 32", ("efficacy_acc", "paraphrase_acc", "specificity_acc", "portability", "locality", "multihop_acc")),
    ("consecutive", "100 consecutive edits, all asked at the end", ("efficacy_acc", "paraphrase_acc", "specificity_acc", "portability", "locality", "multihop_acc")),
    ("multihop", "MQuAKE's chains of 2 to 4 hops, chain of thought", ("efficacy_acc", "instance_wise", "multihop_cot", "multihop_cot_1", "multihop_cot_2", "multihop_cot_3", "multihop_cot_4")),
)  # fmt: skip


def comparison() -> str:
    """Every editor on both bundled models, as text."""
    lines = [
        "# The comparison of editors", "",
        "Written by `python experiments/ledger.py` from `experiments/results/` (runs of `experiments/editors.toml`; settings: the "
        "presets of `qv_lens/editing/presets.py`, chosen on 8 other facts). Percent, mean ± half a 95% interval over the cases; "
        "fluency is n-gram entropy times 100; ‖dW‖/‖W‖ the largest of any case; median seconds per fact on one CPU thread with another "
        "job beside it. `_acc`: every token of the answer is the argmax. `multihop_cot_2`: cases with two edits. Only what is "
        "printed here was run.",
    ]  # fmt: skip
    for name, title, metrics in TABLES:
        path = RESULTS / f"{name}.parquet"
        if not path.exists():
            continue
        for model, frame in pd.read_parquet(path).groupby("model"):
            if "edits" in frame:
                chains = frame[frame["metric"] == "multihop_cot"]
                frame = pd.concat([frame, chains.assign(metric="multihop_cot_" + chains["edits"].astype(str))])
            frame = frame[frame["step"] == frame.groupby(["method", "seed", "case"])["step"].transform("max")]
            count = frame.drop_duplicates(["method", "seed", "case"]).groupby("method").size()
            lines += [
                "",
                f"## {title}: {model}",
                "",
                "| method | cases | " + " | ".join(metrics) + " | ‖dW‖/‖W‖ | s |",
                "|" + "---|" * (len(metrics) + 4),
            ]
            for method, rows in frame.groupby("method", sort=False):
                cells = []
                for metric in metrics:
                    values = rows.loc[rows["metric"] == metric, "after"].dropna()
                    half = f" ± {100 * interval(values):.0f}" if len(values) >= 10 else ""  # of fewer an interval means little
                    cells.append(f"{100 * values.mean():.0f}{half}" if len(values) else "")
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
