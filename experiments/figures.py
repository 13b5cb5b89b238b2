"""The figures of the committed results: light HTML (plotly.js stored once beside them) and PNG for
the README.

python -m experiments.figures                # experiments/results/*.parquet -> figures/EXPERIMENT-MODEL.html
python -m experiments.figures --png          # and those of the README as PNG (kaleido and a Chromium), figures/demo.html too
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import plotly.graph_objects as go

from experiments import sequence, single
from experiments.ledger import RESULTS, experiments, results_of
from experiments.models import COLUMNS

FIGURES = Path(__file__).parents[1] / "figures"
#: in the README and the docs
SHOWN = (
    "ace-table_1-smollm2-135m",
    "scores-sets-smollm2-135m",
    "sequence-smollm2-135m",
    "single-smollm2-135m",
)


def drawn() -> Iterator[tuple[str, go.Figure]]:
    """Every figure by its file's name, one for each model."""
    for module in (*experiments(), single, sequence):
        path = RESULTS / f"{results_of(module)}.parquet"
        if not path.exists():
            continue
        name = module.__name__.removeprefix("experiments.").replace(".", "-")
        for model, frame in pd.read_parquet(path).groupby("model", sort=False):
            rows = _of(module, frame)
            if rows.empty:
                continue
            figure = module.figure(rows)
            called = COLUMNS.get(str(model), model)
            figure.update_layout(title=f"{called}: {figure.layout.title.text}")
            yield f"{name}-{str(model).split('/')[-1]}", figure


def _of(module: ModuleType, frame: pd.DataFrame) -> pd.DataFrame:
    """The editors and metrics that the experiment asks for, where it shares its results with
    others."""
    settings = getattr(module, "SETTINGS", {})
    wanted = {"method": module.GRID.get("method"), "metric": settings.get("metrics")}
    for column, values in wanted.items():
        if values is not None and column in frame:
            frame = frame[frame[column].isin(values)]
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--png", action="store_true")
    png = parser.parse_args().png
    FIGURES.mkdir(exist_ok=True)
    for name, figure in drawn():
        file = FIGURES / f"{name}.html"
        figure.write_html(
            file, include_plotlyjs="directory", div_id=name, config={"displaylogo": False}
        )
        if png and name in SHOWN:
            figure.write_image(file.with_suffix(".png"), width=1000, scale=1.5)
        print(file)
    page = FIGURES / "demo.html"
    if png and page.exists():  # written by `qv-lens demo`
        print(photographed(page))


def photographed(page: Path) -> Path:
    """A picture of a page, as a browser shows it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    options = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        "--window-size=1240,2050",
        "--virtual-time-budget=15000",
    ]
    target = page.with_suffix(".png")
    subprocess.run(
        [chromium, *options, f"--screenshot={target}", page.as_uri()],
        check=True,
        capture_output=True,
    )
    return target


if __name__ == "__main__":
    main()
