"""The command line as a person meets it, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
import time

from qv_lens.neurons import NeuronSet


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_import_loads_no_torch():
    result = run(
        "-c",
        (
            "import sys, qv_lens; print(any(m in sys.modules for m in ('torch', 'transformers', "
            "'pandas', 'plotly')))"
        ),
    )
    assert result.stdout.strip() == "False"


def test_help_is_quick_and_names_the_verbs():
    start = time.monotonic()
    result = run("-m", "qv_lens", "--help")
    assert time.monotonic() - start < 10  # only an import of torch would take so long
    for verb in ("demo", "study", "models"):
        assert verb in result.stdout
    assert "torch" not in run("-X", "importtime", "-m", "qv_lens", "--help").stderr


def test_models_are_listed():
    assert "EleutherAI/gpt-j-6B" in run("-m", "qv_lens", "models", "list").stdout


def test_attribute_prints_neurons_and_keeps_them(tmp_path):
    words = (
        "{} plays the sport of",
        "--subject",
        "Elena Morefeld",
        "--answer",
        "fencing",
        "--out",
        str(tmp_path),
    )
    result = run("-m", "qv_lens", "attribute", *words)
    assert result.returncode == 0, result.stderr
    value, query = (NeuronSet.load(tmp_path / f"{kind}.parquet") for kind in ("value", "query"))
    printed = result.stdout.split("Value neurons")[1].split("Query neurons")
    for text, neurons in zip(printed, (value, query), strict=True):
        lines = [line.split()[:3] for line in text.splitlines() if line.startswith("  f")]
        best = neurons.frame.head(10)
        assert lines == [
            [f"f{row.layer}-{row.neuron}", f"{row.coefficient:.3f}", f"{row.score:.4f}"]
            for row in best.itertuples()
        ]
    assert value.frame["score"].iloc[0] > value.frame["score"].iloc[-1]
    assert len(value) == len(query) == 300
    assert value.settings["norm"] == "frozen"


def test_our_errors_are_one_line():
    result = run(
        "-m",
        "qv_lens",
        "study",
        "no braces",
        "--subject",
        "a",
        "--answer",
        "b",
        "--new",
        "c",
        "--out",
        "/tmp/x.html",
    )
    assert result.returncode == 2
    assert result.stderr.startswith("qv-lens: The prompt 'no braces' has no {}")
    assert "Traceback" not in result.stderr
