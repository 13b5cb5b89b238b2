"""The comparison of editors: its cells, layers and refusals, on few cases."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

import qv_lens as qv
from experiments import compare, ledger
from experiments.ace import bottleneck, table_4
from experiments.compare import Cases, Choice, Protocol, Task
from qv_lens.cli import main
from qv_lens.editing.presets import presets
from qv_lens.evaluation.selection import usual_metrics
from qv_lens.runs.run import Shelf
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.evaluation import cases_of, examples_of

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
QUICK = 2  # cases
FEW = 300  # documents for C0


def cell(
    model="toy-gptj",
    method="ACE",
    *,
    protocol="single",
    metrics=(),
    data="facts",
    count=QUICK,
    seed=0,
    known=False,
    blocks="",
    **choice,
):
    """A task by the names of its fields, quick unless they say otherwise."""
    cases = Cases(data, count, seed, known, blocks, metrics)
    return Task(model, Choice(method, documents=FEW, **choice), Protocol(protocol), cases)


@pytest.fixture(scope="module")
def shelf():
    return Shelf()


@pytest.fixture(scope="module")
def rows(shelf):
    """The rows of a cell, on models that are loaded once."""
    return lambda task: compare.rows(task, shelf.lens(task.model), shelf.once)


def test_a_cell_is_the_evaluation_of_its_preset(rows, shelf):
    """Against edits made by hand with the same preset, contexts and cases."""
    frame = rows(cell(method="MEMIT", metrics=("efficacy_acc", "efficacy_success")))
    lens = shelf.lens("toy-gptj")
    cases = world_cases.edit_cases(generator.build(0), 2, 2000)
    statistics = shelf.once(compare.statistics_of, lens, "", FEW)
    for i, case in enumerate(cases):
        patch = qv.edit(
            lens, case.request, presets("toy-gptj")["MEMIT"].editor, statistics=statistics
        )
        with lens.patched(patch):
            right = (
                lens.next_token_logits(case.request.fact)[0].argmax()
                == lens.answer_ids(case.request.target)[0]
            )
        # so that the metric is what the next token says
        assert len(lens.answer_ids(case.request.target)) == 1
        assert frame.set_index(["case", "metric"]).loc[(i, "efficacy_acc"), "after"] == float(right)
        assert frame.loc[frame["case"] == i, "relative_norm"].iloc[0] == pytest.approx(
            max(patch.info["relative_norm"].values()), rel=1e-6
        )
    assert frame["written"].iloc[0] == str(
        {"layers": list(presets("toy-gptj")["MEMIT"].editor.layers)}
    )
    whole = compare.table(
        frame.assign(model="toy-gptj", data="facts", protocol="single", method="MEMIT", seed=0)
    )
    assert whole.set_index("metric").loc["efficacy_acc", "cases"] == 2


def test_layers_are_chosen_as_the_task_says(rows):
    def written(**fields):
        frame = rows(cell(metrics=("efficacy_acc",), editor={"steps": 2}, **fields))
        return ast.literal_eval(frame["written"].iloc[0])

    preset = presets("toy-gptj")["ACE"].editor  # value layers 4 and 5, query layers 2 and 3
    for skip, kind, left in (("q", "query_layers", 1), ("v", "value_layers", 1)):
        got = written(skip=skip)
        assert len(got[kind]) == left
        assert set(got[kind]) < set(getattr(preset, kind))
        other = "value_layers" if kind == "query_layers" else "query_layers"
        assert tuple(got[other]) == getattr(preset, other)
    assert written(skip="qq") == {"value_layers": list(preset.value_layers)}
    assert written(skip="vv") == {"value_layers": list(preset.query_layers)}
    memit = rows(cell(method="MEMIT", metrics=("efficacy_acc",), edited=2))
    assert memit["written"].iloc[0] == str({"layers": [4, 5]})
    assert sum(map(len, written(edited=6).values())) == 6


def test_bad_cells_say_what_is_wrong(rows):
    for fields, text in (
        ({"method": "MEMITT"}, "Method"),
        ({"protocol": "twice"}, "Protocol"),
        ({"data": "none.json"}, "none.json"),
    ):
        with pytest.raises(qv.QVLensError, match=text):
            rows(cell(**fields))
    with pytest.raises(qv.QVLensError, match="some of ACE's layers"):
        rows(cell(method="MEMIT", skip="q"))
    with pytest.raises(qv.QVLensError, match="leaves ACE no layer"):
        rows(cell(skip="vvqq"))
    assert compare.MEASURES[0] == "before"


SWEEPS = [
    (module, key)
    for module in ledger.experiments()
    for key in module.GRID
    if key.startswith("editor.")
]


@pytest.mark.parametrize(
    ("module", "key"), SWEEPS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_sweep_over_a_setting_is_drawn_from_the_rows_of_its_run(module, key):
    """As `load_run` gives them: the changed settings as JSON in one column."""
    name, values = key.removeprefix("editor."), module.GRID[key]
    frame = pd.DataFrame([
        {
            "model": "toy-gptj", "method": "CTP", "editor": json.dumps({name: value}), "layers": "preset",
            "data": "facts", "protocol": "batch", "batch_size": 20, "seed": 0, "case": case, "step": 20,
            "edits": 1, "hops": 1, "metric": "edit_success", "before": 0.0, "relative_norm": 0.1, "after": 0.5 + 0.1 * case, "seconds": 1.0,
        }
        for value in values for case in range(3)
    ])  # fmt: skip
    drawn = {str(bar) for trace in module.figure(frame).data for bar in trace.x}
    assert drawn == {str(value).strip("[]'") for value in values}
    results, settings = ledger.plain(frame)
    assert settings == [name]
    assert sorted(map(str, results[name].unique())) == sorted(map(str, values))
    assert len(results) == len(frame)


def test_layers_are_not_located_on_no_prompts():
    lens = qv.load("toy-gptj")
    with pytest.raises(
        qv.QVLensError, match=r"no two-hop prompts over the cases' relations \(P999\)"
    ):
        compare._known_chains(lens, {"P999", None}, set())


def test_chains_of_a_file(rows, tmp_path):
    """Those that the model knows, in the file's format; of facts without questions multi-hop
    accuracy is not a silent NaN."""
    records = world_cases.mquake(generator.build(0), 6, 5)
    for hop in records[0]["single_hops"]:
        hop["answer"] = "Nowhere"  # not what the model says
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(records))
    frame = rows(cell(protocol="none", data=str(file), count=6, known=True))
    assert frame["case"].nunique() == 5
    assert (frame["unknown"] == 1).all()
    assert frame.loc[frame["metric"] == "multihop_cot", "before"].mean() == 1
    with pytest.warns(UserWarning, match="no prompt to measure multihop_cot by"):
        rows(cell(protocol="none", metrics=("multihop_cot",)))


def test_edits_of_a_file_that_the_model_knows(rows, tmp_path):
    """Those whose old answer it gives; the others, and those that do not tokenise, are passed over
    and counted."""
    records = world_cases.counterfact(generator.build(0), 6, 5)
    records[0]["requested_rewrite"]["target_true"]["str"] = "Nowhere"
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(records))
    frame = rows(cell(protocol="none", data=str(file), count=5, known=True))
    assert frame["case"].nunique() == 5
    assert (frame["unknown"] == 1).all()
    assert (frame["prompts_known"] == frame["prompts_asked"]).all()
    with pytest.raises(
        qv.QVLensError,
        match=r"5 edits whose facts \(of a chain all its hops\) toy-gptj answers, none",
    ):
        rows(cell(protocol="none", data=str(file), count=5, seed=1, known=True))


def test_worked_examples(shelf, tmp_path):
    """A file's, the world's own for its models, else the five of ACE's Appendix G.1, which no model
    of the world knows."""
    lens = shelf.lens("toy-gptj")
    other = SimpleNamespace(name="other", tokenizer=SimpleNamespace(get_vocab=dict))
    cases = cases_of(lens, "facts", 3).cases
    own = tmp_path / "blocks.txt"
    own.write_text("Question: a?\nThoughts: b\nAnswer: c\n\nQuestion: d?\nThoughts: e\nAnswer: f\n")
    named = examples_of(lens, cases, file=str(own))
    assert [block.split("\n")[2] for block in named] == ["Answer: c", "Answer: f"]
    assert all(block.endswith("\n\n") for block in named)
    assert len(examples_of(lens, cases)) == 4
    blocks = examples_of(other, cases)
    assert [block.split("Answer: ")[1].strip() for block in blocks] == [
        "Washington, D.C.", "Japan", "Asia", "Jill Biden", "General Motors",
    ]  # fmt: skip
    assert "multihop_cot" in usual_metrics(cases_of(lens, "multihop", 3).cases)


def test_seeds_take_different_cases_of_a_file(shelf, tmp_path):
    records, file = world_cases.mquake(generator.build(0), 7, 5), tmp_path / "cases.json"
    for number, record in enumerate(records):
        record["case_id"] = number
    file.write_text(json.dumps([*records, {**records[0], "answer": None}]))
    found = []
    for seed in range(3):
        with pytest.warns(UserWarning, match="1 records are left out"):
            found.append(cases_of(shelf.lens("toy-gptj"), str(file), 3, seed))
    taken = [case.case_id for one in found for case in one.cases]
    assert sorted(taken) == list(range(7))
    assert [one.refused for one in found] == [1, 1, 1]
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(qv.QVLensError, match="holds 7 edits, none of them for seed 3"),
    ):
        cases_of(shelf.lens("toy-gptj"), str(file), 3, 3)


def test_every_comparison_decides_on_a_file_too(rows, tmp_path):
    """The metrics that the ledger's claims read are there for chains of a file as the run files'
    first lines ask for them."""
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(world_cases.mquake(generator.build(0), 4, 5)))
    for module in (table_4, bottleneck):
        head = " ".join(module.__doc__.replace("\\", "").split())
        assert '--set known=true --set \'metrics=[["efficacy_acc", "multihop_cot"]]\'' in head
    frame = rows(
        cell(protocol="none", data=str(file), count=4, metrics=("efficacy_acc", "multihop_cot"))
    )
    assert frame.loc[frame["metric"] == "multihop_cot", "before"].notna().all()
    assert rows(cell(protocol="none", metrics="fluency"))["metric"].eq("fluency").all()


@pytest.fixture
def call(capsys):
    """A command in this process: exit code, output, errors."""

    def run(*words):
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return run


def test_evaluate_on_the_command_line(call, tmp_path):
    out = tmp_path / "rows.csv"
    metrics = ("--metric", "specificity_acc", "--metric", "efficacy_acc")
    code, printed, errors = call("evaluate", "facts", "--count", "2", *metrics, "--out", out)
    assert code == 0, errors
    assert out.read_text().startswith("case,case_id,subject,edits,hops")
    rows = pd.read_csv(out)
    assert rows.groupby("metric").size().to_dict() == {"efficacy_acc": 2, "specificity_acc": 2}
    for metric, values in rows.groupby("metric"):
        lines = [line.split() for line in printed.splitlines()]
        (words,) = [line for line in lines if line[:1] == [metric]]
        means = {f"{values[column].mean():g}" for column in ("before", "after")}
        assert means <= {f"{float(word):g}" for word in words[1:]}


def test_settings_of_another_model(rows, shelf, tmp_path):
    """A model of one's own takes a known model's presets, or is told so."""
    shelf.lens("toy-gptj").save(tmp_path / "mine")
    mine = str(tmp_path / "mine")
    own = rows(cell(method="FT", metrics=("efficacy_acc",)))
    taken = rows(cell(mine, "FT", preset="toy-gptj", metrics=("efficacy_acc",)))
    assert taken["after"].tolist() == own["after"].tolist()
    with pytest.raises(qv.QVLensError, match="--preset"):
        cell(mine, "FT")


def test_ablate_and_report_on_the_command_line(call, tmp_path):
    fact = ("{} plays the sport of", "--subject", "Elena Morefeld", "--answer", "fencing")
    code, printed, _ = call("ablate", *fact, "--top", "5", "--draws", "1")
    assert code == 0
    assert "random 0" in printed
    code, _, errors = call("ablate", *fact, "--top", "100000")
    assert code == 2
    assert "between 1 and" in errors
    file = tmp_path / "small.toml"
    file.write_text(
        f'experiment = "{EXPERIMENTS}/ace/table_1.py"\n[settings]\nprompts = 2\n'
        'model = "toy-gptj"\n[grid]\ncategory = ["sport", "capital"]\n'
    )
    assert call("run", file, "--out", tmp_path / "run")[0] == 0
    assert call("report", tmp_path / "run")[0] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count(">capital</td>") > 10
    assert '"prompts": 2' in page.replace("&#34;", '"')
