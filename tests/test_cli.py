"""The command line as a person meets it, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

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
        str(tmp_path / "new"),
    )
    result = run("-m", "qv_lens", "attribute", *words)
    assert result.returncode == 0, result.stderr
    value, query = (
        NeuronSet.load(tmp_path / "new" / f"{kind}.parquet") for kind in ("value", "query")
    )
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


def test_the_shell_completes_editors():
    said = run("-m", "qv_lens", "__complete", "tune", "toy-gptj", "--editor", "").stdout.split()
    assert {"MEMIT", "ACE", "UltraEdit"} <= set(said)


#: runs a command in a Python that refuses to import PyTorch, and everything that needs it
LIGHT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "transformer_lens", "plotly"):
            raise RuntimeError("imported " + name)
sys.meta_path.insert(0, Refuse())
from qv_lens.cli import main
main(sys.argv[1:])
"""
CAPITAL = ("The capital of {} is", "--subject", "France", "--answer", "Paris")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("edit", *CAPITAL, "--new", "Rome", "--editor", "foo"), "Editor 'foo' not found."),
        (("edit", *CAPITAL, "--new", "Paris"), "The new answer of"),
        (("edit", *CAPITAL, "--new", "Rome", "--save", "."), ". is there already."),
        (("edit", *CAPITAL, "--new", "Rome", "--set", "lr"), "--set takes key=value"),
        (("edit", *CAPITAL, "--new", "Rome", "--save", "a", "--lora", "./a"), "--save and --lora both name a"),
        (("edit", *CAPITAL, "--new", "Rome", "--out", "a/b", "--save", "a/b"), "--out and --save both name a/b"),
        (("edit", *CAPITAL, "--new", "Rome", "--lora", "/dev/null/a"), "Cannot write to /dev/null/a"),
        (("edit", "no subject", *CAPITAL[1:], "--new", "Rome"), "The prompt 'no subject' has no {}"),
        (("evaluate", "nowhere.json"), "data: there is no file nowhere.json."),
        (("evaluate", "--count", "-1"), "--count must be at least 0"),
        (("evaluate", "--editor", "foo"), "Editor 'foo' not found."),
        (("tune", "toy-gptj", "--editor", "foo"), "Editor 'foo' not found."),
        (("attribute", "nowhere.json"), "facts: there is no file nowhere.json."),
        (("attribute", "The capital of {} is"), "A prompt needs --subject and --answer"),
        (("ablate", *CAPITAL, "--out", "a.html"), "--out takes the picture of the curve"),
        (("ablate", *CAPITAL, "--keep"), "--keep says what the curve is of"),
        (("ablate", *CAPITAL, "--mean-over", "a.json"), "--mean-over says what the curve is of"),
        (("ablate", *CAPITAL, "--curve", "--mean-over", "nowhere.json"), "facts: there is no file nowhere.json."),
        (("ablate", *CAPITAL, "--curve", "--mean-over", "nowhere"), "--mean-over takes a file of facts (.json,"),
        (("study", *CAPITAL, "--new", "Rome", "--text", "a.txt"), "--text goes with --facts"),
        (("attribute", *CAPITAL, "--out", "."), ". is there already."),
        (("stats", "--text", "nowhere.txt"), "text: there is no file nowhere.txt."),
        (("run", "nowhere.toml"), "Cannot read the run file nowhere.toml"),
        (("report", "nowhere"), "nowhere is not a run folder"),
        (("patch", "apply", "a", "--model", "b", "--out", "."), ". is there already."),
        (("models", "get", "foo"), "Model to fetch 'foo' not found."),
        (("nope",), 'Unknown command "nope".'),
        (("edit", "a {}"), 'Command "edit" parameter --subject requires an argument.'),
        (("evaluate", "--dtype", "int8"), 'Invalid value "int8" for --dtype.'),
        (("models", "check", "foo"), "Bundled model 'foo' not found."),
        (("patch", "show", "nowhere"), "There is no folder nowhere"),
        (("patch", "apply", "nowhere", "--model", "b", "--out", "c"), "There is no folder nowhere"),
        (("patch", "export", "nowhere", "--out", "c"), "There is no folder nowhere"),
        (("evaluate", "--metric", "efficacy"), "Metric 'efficacy' not found."),
        (("demo", "--out", "/proc/nowhere/a.html"), "Cannot write to /proc/nowhere/a.html"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_refusals_import_no_torch(words, says):
    result = run("-c", LIGHT, *words)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"qv-lens: {says}")
    assert result.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_ends_it_without_a_word():
    """`qv-lens models list | head -1`: the pipe is closed before all is written."""
    command = [sys.executable, "-c", "from qv_lens.cli import main; main(['models', 'list'])"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141
