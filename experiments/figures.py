"""The figures of the committed results: light HTML (plotly.js stored once beside them) and PNG for the README.

python experiments/figures.py                # experiments/results/*.parquet -> figures/*.html
python experiments/figures.py --png          # and those of the README as PNG (kaleido and a Chromium), figures/demo.html too
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from qv_lens import plots
from qv_lens.sweeps.recipes import ablation, editors

HERE = Path(__file__).parent
RESULTS, FIGURES = HERE / "results", HERE.parent / "figures"
#: figures of one varied setting: file -> results, the column varied
VARIED = {
    "kne-figure2": ("kne_figure2", "parameters"), "kne-figureB3": ("kne_figureB3", "located"), "kne-figureB4": ("kne_figureB4", "share"),
    "kne-figureB5": ("kne_figureB5", "batch_size"), "ctp-figure5": ("ctp_figure5", "top"), "ctp-figure6": ("ctp_figure6", "lam"),
    "ctp-tminus": ("ctp_tminus", "bottom"),
}  # fmt: skip
SHOWN = ("table1-toy-gptj", "editors-toy-gptj", "layers-toy-gptj")  # in the README


def rows(name: str, model: str | None = None) -> pd.DataFrame:
    frame = pd.read_parquet(RESULTS / f"{name}.parquet")
    return frame if model is None else frame[frame["model"] == model]


def drawn() -> dict[str, go.Figure]:
    """Every figure by its file's name."""
    found = {}
    for model in ("toy-gptj", "toy-qwen3"):
        layers = rows("ace_table1", model)
        found[f"table1-{model}"] = plots.category_heatmap(
            layers, f"{model}: FFN and attention importance by category (ACE, Table 1)"
        )
        found[f"figure3-{model}"] = plots.category_heatmap(
            rows("ace_figure3", model), f"{model}: two-hop prompts (ACE, Figure 3)"
        )
        heads = layers[layers["part"] == "head"]
        found[f"figure6-{model}"] = plots.head_heatmap(heads, f"{model}: attention heads, all categories (ACE, Figure 6)")
        found[f"editors-{model}"] = bars("single", model, ("efficacy_acc", "paraphrase_acc", "specificity_acc", "multihop_acc"))
        found[f"layers-{model}"] = by_layers(model)
        found[f"suppression-{model}"] = plots.counts(
            rows("ace_suppression", model).query("category == 'all'"), f"{model}: activated value neurons (ACE, section 4.2)"
        )
        found[f"figure2-{model}"] = ablation.figure(rows("ace_figure2", model).query("not held_out")).update_layout(
            title=f"{model}: accuracy lost without 1% of the neurons, asked of the prompts that rank them (ACE, Figure 2)"
        )
        found[f"ctp-figure3-{model}"] = plots.seconds_bars(
            rows("ctp_figure3", model), f"{model}: seconds per edit (CTP, Figure 3)"
        )
    for name, (result, column) in VARIED.items():
        found[name] = varied(result, column)
    found["figure5"] = plots.layer_lines(rows("ace_table1"), "What whole layers add to the answer (ACE, Figure 5)")
    found["table5"] = plots.token_bars(rows("ace_table5"), "Importance by token (ACE, Table 5)")
    found["ctp-figure4"] = plots.node_lines(rows("ctp_figure4").query("category == 'all'"), "T+ nodes by layer (CTP, Figure 4)")
    found["neurons27"] = plots.set_bars(rows("ace_neurons27"), "The answer when neurons are zeroed (ACE, section 6.4)")
    return found


def bars(name: str, model: str, metrics: tuple[str, ...]) -> go.Figure:
    frame = rows(name, model)
    table = editors.table(frame[frame["metric"].isin(metrics)], ("method",))
    return plots.method_bars(table, f"{model}: single edits, mean and 95% interval")


def varied(name: str, column: str) -> go.Figure:
    """Shares of both models along one setting; fluency, which is none, is in the results."""
    frame = rows(name)
    frame = frame[frame["metric"].isin(editors.SHOWN)].sort_values(["model", column])
    frame = frame.assign(what=frame["model"] + " · " + frame[column].astype(str).str.strip("[]'"))
    return plots.method_bars(editors.table(frame, ("what",)), f"{name}: by {column}, mean and 95% interval", by="what")


def by_layers(model: str) -> go.Figure:
    frame = rows("layers", model)
    frame = frame[frame["metric"].isin(("efficacy_acc", "paraphrase_acc", "multihop_acc"))]
    return plots.method_bars(
        editors.table(frame, ("layers",)), f"{model}: ACE at layers located, of one kind, all, at random", by="layers"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", action="store_true")
    png = parser.parse_args().png
    FIGURES.mkdir(exist_ok=True)
    for name, figure in drawn().items():
        figure.write_html(FIGURES / f"{name}.html", include_plotlyjs="directory", div_id=name, config={"displaylogo": False})
        if png and name in SHOWN:
            figure.write_image(FIGURES / f"{name}.png", width=1000, scale=1.5)
        print(FIGURES / f"{name}.html")
    page = FIGURES / "demo.html"
    if png and page.exists():  # written by `qv-lens demo`
        chromium = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1100,2300", "--virtual-time-budget=15000"]
        target = page.with_suffix(".png")
        subprocess.run([chromium, *options, f"--screenshot={target}", page.as_uri()], check=True, capture_output=True)
        print(target)


if __name__ == "__main__":
    main()
