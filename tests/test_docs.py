"""What the README, the pages of docs/ and the docstrings show, run: nothing in them is out of
date."""

from __future__ import annotations

import ast
import doctest
import itertools
import json
import re
from pathlib import Path

import pytest

import qv_lens as qv
from qv_lens.runs.config import read_config
from qv_lens.runs.run import run
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

ROOT = Path(__file__).parents[1]
#: pages that docs/site.py makes; mkdocs build --strict finds them
MADE = ("editors/index.md", "api/index.md", "gallery.md")
#: the verbs of the README that have an example in their docstring
VERBS = (
    "load", "Fact", "value_neurons", "query_neurons", "neuron_effects", "layer_scores", "vocabulary", "faithfulness", "locate", "edit",
    "evaluate", "presets", "atlas", "known",
)  # fmt: skip


def python_blocks(page: Path) -> list[str]:
    """The Python code of a page, on the toy that needs no network."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [block.replace("smollm2-135m", "toy-gptj") for block in blocks]


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_verb_runs(verb):
    documented = getattr(qv, verb)
    (test,) = doctest.DocTestFinder(recurse=False).find(documented, verb, globs={})
    assert test.examples
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0


def test_the_readme_and_its_pages_run(tmp_path, monkeypatch):
    """Each page by itself, as a reader would type it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counterfact.json").write_text(
        json.dumps(world_cases.counterfact(generator.build(0), 2))
    )
    pages = ("attribution", "editing", "evaluation", "index", "proof")
    for page in ("README.md", *(f"docs/{name}.md" for name in pages)):
        names: dict = {}
        for block in python_blocks(ROOT / page):
            exec(compile(block, page, "exec"), names)  # the repository's own pages
    assert (tmp_path / "patch" / "patch.json").exists()


def test_the_experiment_of_ones_own_runs(tmp_path):
    (block,) = python_blocks(ROOT / "docs/running.md")
    (tmp_path / "mine.py").write_text(block)
    run(read_config(tmp_path / "mine.py", ["layer=[2, 3]"]), tmp_path / "run")
    frame = qv.load_run(tmp_path / "run")
    assert frame["status"].eq("finished").all()
    assert frame[["before", "after"]].notna().all(axis=None)


def test_every_link_leads_somewhere():
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and target not in MADE:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def literals(node):
    """The texts that a piece of code holds, what is filled in left open."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            part.value if isinstance(part, ast.Constant) else "\0" for part in node.values
        )
    for child in ast.iter_child_nodes(node):
        yield from literals(child)


def test_the_page_of_errors_quotes_messages_that_there_are():
    said = [
        text
        for file in (ROOT / "qv_lens").rglob("*.py")
        for text in literals(ast.parse(file.read_text(encoding="utf-8")))
        if "\n" not in text  # no docstrings
    ]
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    quoted = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    assert len(quoted) >= 14
    for message in re.findall(r"`([^`]+)`", " ".join(quoted)):
        pieces = [piece.strip() for piece in message.split("...") if piece.strip()]
        assert any(all(piece in text for piece in pieces) for text in said), message


def test_the_readme_is_short_and_its_names_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for name in set(re.findall(r"qv\.(\w+)", text)):
        assert hasattr(qv, name), name


def test_the_counts_of_the_pages_are_the_ledgers():
    ledger = (ROOT / "experiments/LEDGER.md").read_text(encoding="utf-8")
    counted = re.search(
        r"SmolLM2-135M: of the papers' (\d+) claims (\d+) were tested on it: (\d+) held, (\d+) failed, "
        r"(\d+) could not",
        ledger,
    )
    assert counted is not None
    claims, tested, holds, fails, undecided = counted.groups()
    for name in ("README.md", "docs/results.md"):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        assert f"Of {claims} claims of the papers {tested} were tested on SmolLM2" in text, name
        assert f"{holds} held, {fails} failed, {undecided} could not be decided" in text, name


def test_every_field_of_a_dataclass_has_a_line():
    missing = []
    for file in sorted((ROOT / "qv_lens").rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
                continue
            for field, line in itertools.pairwise([*node.body, ast.Pass()]):
                is_text = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not is_text:
                    missing.append(f"{file.name}: {node.name}.{ast.unparse(field.target)}")
    assert missing == []
