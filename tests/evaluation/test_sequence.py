"""Edits in a row: the same as `evaluate`'s consecutive protocol, killed or not."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from filelock import FileLock

import qv_lens as qv
from qv_lens.editing.keys import contexts
from qv_lens.editing.statistics import covariance
from qv_lens.errors import EditError
from qv_lens.evaluation import sequence as sequences
from qv_lens.evaluation.sequence import sequence
from qv_lens.facts.benchmarks import parse
from qv_lens.facts.records import EditCase
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

WORLD = generator.build(0)
CASES = list(parse(world_cases.counterfact(WORLD, 6)).cases)
TEXTS = ["Elena Morefeld plays the sport of fencing.", "The capital of a country is a city."]
OPTIONS = {
    "checkpoints": (1, 3),
    "sample": 2,
    "held_out": TEXTS,
    "save_every": 2,
    "metrics": ("efficacy_acc", "efficacy_gen", "specificity_acc"),
}
EDITOR = qv.FT(layer=4, lr=1e-3, steps=6)


@pytest.fixture(scope="module")
def lens():
    return qv.load("toy-gptj")


@pytest.fixture(scope="module")
def whole(lens, tmp_path_factory):
    return sequence(lens, CASES, EDITOR, tmp_path_factory.mktemp("whole"), **OPTIONS)


def value(frame, step, group, metric, column="after"):
    rows = frame[(frame["step"] == step) & (frame["group"] == group) & (frame["metric"] == metric)]
    return rows[column].item()


def test_the_rows_are_those_of_edits_made_by_hand(lens, whole):
    """evaluate's consecutive protocol shares no loop with it."""
    state = lens.state()
    for step in (1, 3, 6):
        frame = qv.evaluate(
            lens, CASES[:step], OPTIONS["metrics"], EDITOR, "consecutive", held_out=TEXTS
        )
        wide = frame.pivot_table(index="case", columns="metric", values="after", dropna=False)
        for group, index in (
            ("first", range(min(2, step))),
            ("newest", range(max(0, step - 2), step)),
        ):
            for metric in OPTIONS["metrics"]:
                wanted = wide.loc[list(index), metric].mean()
                assert value(whole, step, group, metric) == pytest.approx(wanted, nan_ok=True)
        assert value(whole, step, "model", "perplexity") == pytest.approx(
            wide["perplexity"][0], rel=1e-4
        )
        norm = frame["relative_norm"].iloc[-1]
        assert value(whole, step, "model", "relative_norm") == pytest.approx(norm, rel=1e-4)
    assert value(whole, 6, "model", "perplexity", "before") == value(
        whole, 0, "model", "perplexity"
    )
    assert lens.state() == state


@pytest.mark.parametrize("wrapped", [False, True])
def test_edits_in_a_row_have_the_contexts_of_their_editor(lens, tmp_path, wrapped):
    """ROME samples twenty of its own, MEMIT five; SimIE has those of the editor that it wraps."""
    rome = qv.ROME(layer=2, steps=2, mom2_adjustment=False)
    editor = qv.SimIE(editor=rome, lam=1.0) if wrapped else rome
    row = sequence(lens, CASES[:1], editor, tmp_path, metrics=("efficacy_acc",), sample=1)
    frame = qv.evaluate(lens, CASES[:1], ["efficacy_acc"], editor, "consecutive")
    alone = frame["relative_norm"].iloc[-1]
    assert value(row, 1, "model", "relative_norm") == pytest.approx(alone, rel=1e-6)


def test_seconds_are_an_edits_and_drawn_ones_are_drawn(lens, tmp_path, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(sequences.time, "perf_counter", lambda: next(clock))
    frame = sequence(lens, CASES, EDITOR, tmp_path, **{**OPTIONS, "checkpoints": (3,)})
    # every edit takes as many ticks
    assert value(frame, 3, "model", "seconds") == value(frame, 6, "model", "seconds") > 0
    drawn = sorted(random.Random("0:6").sample(range(6), 2))
    told = qv.evaluate(lens, CASES, ["efficacy_gen"], EDITOR, "consecutive")
    after = told.set_index("case")["after"]
    assert value(frame, 6, "drawn", "efficacy_gen") == after.loc[drawn].mean()


@pytest.mark.parametrize("killed", [1, 2, 5])
def test_killed_at_any_moment_it_goes_on_and_gives_the_same(
    lens, whole, tmp_path, monkeypatch, killed
):
    made, edit = [], sequences.edit

    def dying(*words, **options):
        if len(made) == killed:
            raise KeyboardInterrupt
        made.append(1)
        return edit(*words, **options)

    monkeypatch.setattr(sequences, "edit", dying)
    state = lens.state()
    with pytest.raises(KeyboardInterrupt):
        sequence(lens, CASES, EDITOR, tmp_path, **OPTIONS)
    assert lens.state() == state
    monkeypatch.setattr(sequences, "edit", lambda *w, **o: made.append(1) or edit(*w, **o))
    frame = sequence(lens, CASES, EDITOR, tmp_path, **OPTIONS)
    assert len(made) <= len(CASES) + 1  # at most one edit is made twice: save_every is 2
    seconds = frame["metric"] == "seconds"
    pd.testing.assert_frame_equal(frame[~seconds], whole[~seconds])
    assert len(list(tmp_path.glob("patch-*"))) == 1


def test_a_patch_without_its_record_is_written_anew(lens, whole, tmp_path):
    """What a process leaves that is killed between the two."""
    qv.edit(lens, CASES[0].request, EDITOR).save(tmp_path / "patch-6")
    frame = sequence(lens, CASES, EDITOR, tmp_path, **OPTIONS)
    seconds = frame["metric"] == "seconds"
    pd.testing.assert_frame_equal(frame[~seconds], whole[~seconds])
    again = sequence(lens, CASES, EDITOR, tmp_path, **OPTIONS)
    pd.testing.assert_frame_equal(again, frame)


def test_a_folder_holds_the_patch_in_force_alone(lens, tmp_path):
    """One that a killed process left goes; where its own is gone, what to do is told."""
    frame = sequence(lens, CASES[:2], EDITOR, tmp_path, **OPTIONS)
    (tmp_path / "patch-1").mkdir()
    again = sequence(lens, CASES[:2], EDITOR, tmp_path, **OPTIONS)
    pd.testing.assert_frame_equal(again, frame)
    assert [folder.name for folder in tmp_path.glob("patch-*")] == ["patch-2"]
    shutil.rmtree(tmp_path / "patch-2")
    with pytest.raises(qv.QVLensError, match=r"cannot be read: .* Remove the folder"):
        sequence(lens, CASES[:2], EDITOR, tmp_path, **OPTIONS)


def test_a_folder_in_which_another_process_is_at_work_is_refused(lens, tmp_path):
    (tmp_path / ".sequence.json.1.partial").touch()  # of one that was killed
    with FileLock(tmp_path / "lock"), pytest.raises(qv.QVLensError, match="Another process edits"):
        sequence(lens, CASES[:1], EDITOR, tmp_path, **OPTIONS)
    sequence(lens, CASES[:1], EDITOR, tmp_path, **OPTIONS)
    assert {file.name for file in tmp_path.iterdir()} == {"lock", "patch-1", "sequence.json"}


def test_another_sequences_folder_is_refused(lens, tmp_path):
    sequence(lens, CASES[:2], EDITOR, tmp_path, **OPTIONS)
    with pytest.raises(qv.QVLensError, match="holds another sequence"):
        sequence(lens, CASES[:3], EDITOR, tmp_path, **OPTIONS)
    ends = [covariance(lens, TEXTS, [4], max_tokens=most) for most in (4, None)]
    assert ends[0].corpus == ends[1].corpus  # the same text, cut elsewhere
    sequence(lens, CASES[:2], EDITOR, tmp_path / "cut", statistics=ends[0], **OPTIONS)
    with pytest.raises(qv.QVLensError, match="holds another sequence"):
        sequence(lens, CASES[:2], EDITOR, tmp_path / "cut", statistics=ends[1], **OPTIONS)
    with pytest.raises(qv.QVLensError, match="nothing to sequence"):
        sequence(lens, [], EDITOR, tmp_path)


def test_cases_edited_together_are_those_of_edits_made_by_hand(lens, whole, tmp_path):
    """Batches end at the checkpoints: 1, then 2 and 3, then 4 and 5, then 6."""
    frame = sequence(lens, (case for case in CASES), EDITOR, tmp_path, **OPTIONS, batch=2)
    patches = []
    for index in ([0], [1, 2], [3, 4], [5]):
        with lens.patched(*patches):
            requests = [CASES[i].request for i in index]
            patches.append(qv.edit(lens, requests, EDITOR, templates=contexts(lens)))
    with lens.patched(*patches):
        wanted = qv.evaluate(lens, CASES[4:], ["efficacy_acc"])["before"].mean()
    assert value(frame, 6, "newest", "efficacy_acc") == pytest.approx(wanted)
    assert value(frame, 6, "model", "relative_norm") != value(whole, 6, "model", "relative_norm")
    with pytest.raises(qv.QVLensError, match="holds another sequence"):
        sequence(lens, CASES, EDITOR, tmp_path, **OPTIONS, batch=3)


def test_of_cases_that_conflict_each_is_edited_alone(lens, tmp_path):
    fact = CASES[0].request.fact
    twice = [CASES[0], CASES[1], EditCase(fact.to("chess")), EditCase(fact.to(fact.answer))]
    options = {**OPTIONS, "checkpoints": (), "metrics": ("efficacy_acc",)}
    frame = sequence(lens, twice, EDITOR, tmp_path, **options, batch=4)
    assert value(frame, 4, "model", "refused") == 1  # the one that asks for the old answer
    # as `evaluate` has it: of the three that could be edited, before and after of the same cases
    wanted = qv.evaluate(lens, twice[:3], ["efficacy_acc"], EDITOR, "consecutive")
    assert value(frame, 4, "newest", "efficacy_acc") == wanted["after"].iloc[-2:].mean()
    assert value(frame, 4, "newest", "efficacy_acc", "cases") == 2
    assert value(frame, 4, "first", "efficacy_acc", "before") == wanted["before"].iloc[:2].mean()
    assert value(frame, 4, "model", "relative_norm") > 0


def test_a_case_that_does_not_tokenise_is_left_out(lens, tmp_path):
    """A blank at the end of a prompt, or of a paraphrase: the others are edited and asked."""
    case = CASES[1]
    fact, paraphrase = case.request.fact, case.paraphrases[0]
    blank = replace(fact, prompt=f"{fact.prompt} ")
    bad = (
        replace(case, request=replace(case.request, fact=blank)),
        replace(case, paraphrases=(replace(paraphrase, text=f"{paraphrase.text} "),)),
    )
    row = [CASES[0], bad[0], CASES[2], CASES[3], bad[1], bad[0]]
    options = {**OPTIONS, "metrics": ("efficacy_acc", "paraphrase_acc"), "checkpoints": (3, 4)}
    with pytest.warns(UserWarning, match="Case 1 is left out: .*blank"):
        frame = sequence(lens, row, EDITOR, tmp_path, batch=2, **options)
    assert [value(frame, step, "model", "refused") for step in (3, 4, 6)] == [1, 1, 3]
    assert list(frame.attrs["skipped"]) == ["1", "4", "5"]
    assert "blank" in frame.attrs["skipped"]["4"]
    good = [CASES[0], CASES[2], CASES[3]]
    alone = qv.evaluate(lens, good, ["efficacy_acc"], EDITOR, "consecutive")
    assert value(frame, 6, "newest", "efficacy_acc") == alone["after"].iloc[-2:].mean()
    assert value(frame, 6, "model", "relative_norm") == pytest.approx(
        alone["relative_norm"].iloc[-1], rel=1e-4
    )
    again = sequence(lens, tuple(row), EDITOR, tmp_path, batch=2, **options)  # the same cases
    pd.testing.assert_frame_equal(again, frame)
    assert again.attrs["skipped"] == frame.attrs["skipped"]


def test_an_editor_that_can_edit_nothing_says_why_at_once(lens, tmp_path):
    class Refusing(qv.FT):
        def deltas(self, job):
            raise EditError(f"{job.requests[0].new} is refused.")

    new = [case.request.new for case in CASES[:2]]
    with pytest.warns(UserWarning, match=f"Case 0 is left out: {new[0]} is refused"):
        frame = sequence(lens, CASES[:2], Refusing(layer=4), tmp_path, **OPTIONS)
    assert value(frame, 2, "model", "refused") == 2
    assert frame.attrs["skipped"] == {str(i): f"{new[i]} is refused." for i in (0, 1)}
    for batch in (1, 4):  # a thousand are not tried where none of ten can be made
        with (
            pytest.warns(UserWarning, match="Case 0 is left out"),
            pytest.raises(
                EditError, match=r"All of the first 1[02] edits were refused, .* is refused"
            ),
        ):
            sequence(lens, CASES * 3, Refusing(layer=4), tmp_path / str(batch), batch=batch)


def test_a_refused_case_of_a_later_batch_is_that_one(lens, tmp_path):
    fact = CASES[3].request.fact
    row = [*CASES[:3], EditCase(fact.to(fact.answer)), CASES[4], CASES[5]]
    options = {**OPTIONS, "checkpoints": (), "metrics": ("efficacy_acc",), "sample": 6}
    frame = sequence(lens, row, EDITOR, tmp_path, **options, batch=3)
    together = qv.edit(lens, [case.request for case in CASES[:3]], EDITOR)
    patches = [together]
    for case in (CASES[4], CASES[5]):  # a batch that is refused is edited one by one
        with lens.patched(*patches):
            patches.append(qv.edit(lens, case.request, EDITOR))
    kept = [*CASES[:3], CASES[4], CASES[5]]
    with lens.patched(*patches):
        told = [lens.next_token_logits(case.request.fact).argmax().item() for case in kept]
    said = [
        token == lens.answer_ids(replace(case.request.fact, answer=case.request.new, aliases=()))[0]
        for token, case in zip(told, kept, strict=True)
    ]
    assert value(frame, 6, "first", "efficacy_acc", "cases") == 5
    assert value(frame, 6, "first", "efficacy_acc") == pytest.approx(sum(said) / 5)
    before = [
        lens.next_token_logits(case.request.fact).argmax().item()
        == lens.answer_ids(replace(case.request.fact, answer=case.request.new, aliases=()))[0]
        for case in kept
    ]
    assert value(frame, 6, "first", "efficacy_acc", "before") == pytest.approx(sum(before) / 5)


def test_what_nothing_could_be_asked_by_is_of_no_case(lens, tmp_path):
    bare = [replace(case, paraphrases=()) for case in CASES[:2]]
    options = {**OPTIONS, "metrics": ("efficacy_acc", "paraphrase_acc"), "checkpoints": ()}
    frame = sequence(lens, bare, EDITOR, tmp_path, **options)
    for metric, count in (("efficacy_acc", 2), ("paraphrase_acc", 0)):
        assert value(frame, 2, "newest", metric, "cases") == count
    with pytest.raises(qv.QVLensError, match="efficacy_judged needs judge="):
        sequence(lens, bare, EDITOR, tmp_path, metrics=("efficacy_judged",))


@pytest.mark.parametrize("damage", ["", "{", '{"x": 1}'])
def test_damaged_progress_is_told(lens, tmp_path, damage):
    (tmp_path / "sequence.json").write_text(damage)
    with pytest.raises(qv.QVLensError, match="no progress of edits in a row"):
        sequence(lens, CASES[:2], EDITOR, tmp_path, **OPTIONS)
    assert (tmp_path / "sequence.json").read_text() == damage
