"""Protocols: what is edited when, put back, kept on disk and skipped."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import random
import time
import warnings
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import qv_lens as qv
from qv_lens.editing import layer_by_layer
from qv_lens.editing.statistics import covariance
from qv_lens.evaluation import answers, metrics, protocols
from qv_lens.evaluation.known_cases import known
from qv_lens.evaluation.metrics import GENERATED, ngram_entropy
from qv_lens.evaluation.perplexity import perplexity
from qv_lens.evaluation.protocols import _compatible, evaluate, total
from qv_lens.evaluation.questions import Generation
from qv_lens.facts.benchmarks import parse, read
from qv_lens.facts.records import UNKNOWN, Hop, MultiHopCase, Probe
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from tests.editing.test_closed_form import EDITORS, REQUESTS, TEXTS, same, weights
from tests.models import tiny_lens

WORLD = generator.build(0)
CASES = world_cases.edit_cases(WORLD, 4)


@pytest.fixture(scope="module")
def tiny():
    lens = tiny_lens("gptj", dtype=torch.float32)
    return lens, covariance(lens, TEXTS, range(3))


@pytest.fixture(scope="module")
def exact():
    lens = tiny_lens("gptj")
    return lens, covariance(lens, TEXTS, range(3))


def values(frame, step=None):
    chosen = frame if step is None else frame[frame["step"] == step]
    return chosen.set_index(["case", "metric"])["after"].sort_index()


def test_consecutive_keeps_every_edit_in_force(tiny):
    """Asked at the end, it equals asking a model with all patches applied by hand."""
    lens, statistics = tiny
    before = weights(lens)
    # strong enough to show
    editor = dataclasses.replace(EDITORS[0], steps=20, lr=1.0, clamp=8.0, lam=0.01)
    names = [
        "efficacy_acc",
        "efficacy_success",
        "edit_success",
        "paraphrase_success",
        "specificity_acc",
        "specificity_success",
    ]
    options = {"statistics": statistics, "templates": ("{}",)}
    frame = evaluate(lens, CASES, names, editor, "consecutive", every=2, **options)
    assert sorted(frame["step"].unique()) == [2, 4]
    assert same(lens, before)
    for case in CASES:
        lens.apply(qv.edit(lens, case.request, editor, **options))
    by_hand = evaluate(lens, CASES, names)
    for _ in CASES:
        lens.revert()
    pd.testing.assert_series_equal(values(frame, 4), values(by_hand))
    # the edits show
    assert by_hand["after"].ne(frame[frame["step"] == 4]["before"].to_numpy()).any()
    assert frame["relative_norm"].gt(0).all()


def test_batch_writes_one_joint_edit_and_single_one_at_a_time(tiny):
    lens, statistics = tiny
    options = {"statistics": statistics, "templates": ("{}",)}
    batch = evaluate(
        lens,
        CASES,
        ["efficacy_acc", "efficacy_success"],
        EDITORS[0],
        "batch",
        batch_size=4,
        **options,
    )
    with lens.patched(qv.edit(lens, [c.request for c in CASES], EDITORS[0], **options)):
        by_hand = evaluate(lens, CASES, ["efficacy_acc", "efficacy_success"])
    pd.testing.assert_series_equal(values(batch), values(by_hand))
    rome = qv.ROME(layer=1, steps=4)  # edits one fact after another, in a batch as well
    frames = [
        evaluate(lens, CASES, ["efficacy_success"], rome, way, batch_size=4, **options)
        for way in ("batch", "consecutive")
    ]
    pd.testing.assert_series_equal(*(values(frame, 4) for frame in frames))
    single = evaluate(lens, CASES[:1], ["efficacy_success"], EDITORS[0], **options)
    alone = evaluate(
        lens, CASES[:1], ["efficacy_success"], EDITORS[0], "batch", batch_size=1, **options
    )
    pd.testing.assert_series_equal(values(single), values(alone))


@pytest.mark.parametrize("metrics", [EDITORS[0], "efficacy_acc"])
def test_an_editor_in_the_place_of_the_metrics_is_told(tiny, metrics):
    with pytest.raises(qv.QVLensError, match="editor="):
        evaluate(tiny[0], CASES, metrics)


def test_a_chain_of_thought_without_examples_is_warned_of(tiny):
    case = MultiHopCase(0, (CASES[0].request,), ("Who?",), "golf", "chess")
    for generation, warned in ((None, True), (Generation(thought_tokens=2), False)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            evaluate(tiny[0], [case], ["multihop_cot"], generation=generation)
        assert any("without worked examples" in str(each.message) for each in told) == warned


@pytest.mark.filterwarnings("ignore:These cases hold no prompt")
def test_results_do_not_depend_on_the_company_a_case_is_in(tiny):
    lens, _ = tiny
    one_by_one = (case for case in CASES)
    together = evaluate(lens, one_by_one, [*metrics.FORCED, *GENERATED])
    for i, case in enumerate(CASES):
        alone = evaluate(
            lens, [case], [*metrics.FORCED, *(name for name in GENERATED if name != "fluency")]
        )
        mine = together[(together["case"] == i) & (together["metric"] != "fluency")]
        assert mine["after"].tolist() == pytest.approx(alone["after"].tolist(), nan_ok=True)


@pytest.mark.filterwarnings("ignore:These cases hold no prompt")
@pytest.mark.parametrize("kind", ["facts", "chains"])
def test_a_metric_alone_asks_less_and_tells_the_same(tiny, kind, monkeypatch):
    lens, statistics = tiny
    cases = CASES if kind == "facts" else list(parse(world_cases.mquake(WORLD, 3, 0)).cases)
    options = {"editor": EDITORS[0], "statistics": statistics, "templates": ("{}",)}
    missing = {
        "facts": {"instance_wise"},
        "chains": {"portability", "locality", "specificity_success"},
    }
    asked, tell = [], answers.tell
    monkeypatch.setattr(
        answers, "tell", lambda lens, given: asked.append(len(given)) or tell(lens, given)
    )
    together, most = evaluate(lens, cases, **options), max(asked)
    for name in metrics.FORCED:
        asked.clear()
        alone = evaluate(lens, cases, [name], **options)
        assert max(asked, default=0) < most
        if name not in missing[kind]:
            rows = together[together["metric"].isin(alone["metric"].unique())]
            pd.testing.assert_series_equal(values(alone), values(rows))
        else:
            assert alone["after"].isna().all()
    # what would be NaN is not asked by default
    assert set(metrics.FORCED) - set(together["metric"]) == missing[kind]
    asked = together[
        together["metric"] != "multihop_gen"
    ]  # has a value where the model knows a chain
    assert values(asked).notna().groupby("metric").any().all()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("facts", ["efficacy_gen", "paraphrase_gen", "specificity_gen"]),
        (
            "chains",
            ["efficacy_gen", "paraphrase_gen", "specificity_gen", "multihop_gen", "multihop_known"],
        ),
    ],
)
def test_what_the_model_says_comes_first_where_no_metric_is_named(tiny, kind, said):
    lens, _ = tiny
    cases = CASES if kind == "facts" else list(parse(world_cases.mquake(WORLD, 3, 0)).cases)
    frame = evaluate(lens, cases)
    assert list(frame["metric"].unique())[: len(said)] == said
    pd.testing.assert_series_equal(
        values(frame[frame["metric"].isin(said)]), values(evaluate(lens, cases, said))
    )


def test_conflicting_cases_go_into_different_batches():
    one, other = CASES[0], qv.EditCase(CASES[0].request.fact.to("Quorix"))
    assert _compatible([one, other, CASES[1]], [0, 1, 2], 3) == [[0, 2], [1]]
    assert _compatible(CASES, [0, 1, 2, 3], 2) == [[0, 1], [2, 3]]


def chain_of(capital, owner):
    """A case that moves X Ltd to a country, whose capital is asked for, and the edit of another's."""
    path = (
        Hop("Where is X Ltd?", "X Ltd is in", "Peru", subject="X Ltd", relation="P17"),
        Hop("Its capital?", "The capital of Peru is", "Lima", subject="Peru", relation="P36"),
    )
    moved = qv.Fact("{} is in", "X Ltd", "Chile", relation="P17").to("Peru")
    peru = qv.Fact("The capital of {} is", owner, "Lima", relation="P36").to(capital)
    return [
        MultiHopCase(0, (moved,), ("Q",), "Santiago", "Lima", new_hops=path),
        MultiHopCase(1, (peru,), ("Q",), "Lima", capital),
    ]


def test_edits_that_lead_another_chain_elsewhere_are_kept_apart(tiny):
    lens, _ = tiny
    for cases, apart in (
        (chain_of("Cusco", "Peru"), True),
        (chain_of("Cusco", "Bolivia"), False),
        (chain_of("Cusco", "Peru")[:1], False),
    ):
        both = list(range(len(cases)))
        assert _compatible(cases, both, 2) == ([[0], [1]] if apart else [both])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            evaluate(lens, cases, ["efficacy_acc"], qv.FT(layer=1, steps=1), "consecutive")
        assert any("1 of 2 cases have a step" in str(each.message) for each in told) == apart


@pytest.mark.parametrize("protocol", ["single", "batch", "consecutive"])
def test_a_case_without_an_old_answer_stops_no_other(tiny, protocol):
    """KN asks which neurons say the old answer: it is told of no such case, and edits the next."""
    lens, _ = tiny
    recent = qv.EditCase(qv.Fact("{} plays", "Tim Duncan", UNKNOWN).to("golf"))
    with pytest.warns(UserWarning, match="Case 0 is left out: The answer after .* is not known"):
        frame = evaluate(
            lens, [recent, CASES[0]], ["efficacy_acc"], qv.KN(steps=2), protocol, batch_size=1
        )
    assert list(frame.attrs["skipped"]) == ["0"]
    assert frame.set_index("case")["after"].isna().to_dict() == {0: True, 1: False}


def test_what_cannot_be_edited_or_asked_is_counted(tiny):
    lens, statistics = tiny
    impossible = qv.EditCase(qv.Fact("{} plays", "Tim Duncan", "golf").to("golf"))
    with pytest.warns(UserWarning, match="Case 1 is left out: The new answer"):
        frame = evaluate(
            lens, [CASES[0], impossible], ["efficacy_acc"], EDITORS[0], statistics=statistics
        )
    assert "there is nothing to edit" in frame.attrs["skipped"]["1"]
    assert math.isnan(frame.set_index("case").loc[1, "after"])
    assert not math.isnan(frame.set_index("case").loc[0, "after"])
    unreadable = qv.EditCase(qv.Fact("{} plays ", "Tim Duncan", "golf").to("ball"))
    context = lens.backend_adapter.cfg.n_ctx
    long = qv.EditCase(qv.Fact("a " * context + "{} plays", "Tim Duncan", "golf").to("ball"))
    for case in (unreadable, long):
        frame = evaluate(lens, [case, CASES[0]], ["efficacy_acc"])
        assert list(frame.attrs["skipped"]) == ["0"]
        assert frame.set_index("case")["after"].isna().to_dict() == {0: True, 1: False}
    assert f"the model takes {context}" in frame.attrs["skipped"]["0"]
    for bad in ({"metrics": ["eficacy_acc"]}, {"protocol": "singel"}):
        with pytest.raises(qv.QVLensError, match="Available: "):
            evaluate(lens, CASES, **bad)


def test_a_failure_in_the_middle_leaves_the_weights(tiny, monkeypatch):
    lens, statistics = tiny
    before, count, look = weights(lens), [], protocols.look

    def interrupted(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return look(*args)

    monkeypatch.setattr(protocols, "look", interrupted)
    for protocol, options in (("single", {}), ("consecutive", {"every": 1})):
        count.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate(
                lens,
                CASES,
                ["efficacy_acc"],
                EDITORS[0],
                protocol,
                statistics=statistics,
                **options,
            )
        assert same(lens, before)
        assert not lens.patches


def test_the_cache_is_kept_by_weights_and_content(tiny, tmp_path, monkeypatch):
    lens, _ = tiny
    first = evaluate(lens, CASES, cache=tmp_path)
    calls, look = [], protocols.look
    monkeypatch.setattr(
        protocols,
        "look",
        lambda lens, cases, *rest: calls.append(len(cases)) or look(lens, cases, *rest),
    )
    again = evaluate(lens, CASES[::-1], cache=tmp_path)
    assert not sum(calls)
    assert sorted(first["before"].dropna()) == sorted(again["before"].dropna())
    kept = sorted(tmp_path.glob("*.json"))
    kept[0].write_text("{")  # damaged: asked again
    damaged = evaluate(lens, CASES, cache=tmp_path)
    assert sorted(first["before"].dropna()) == sorted(damaged["before"].dropna())
    assert sum(calls) == 1
    lens.w_out(1)[0, 0] += 1.0  # a write that leaves no other trace
    evaluate(lens, CASES, cache=tmp_path)
    lens.w_out(1)[0, 0] -= 1.0
    assert sum(calls) == 5
    assert len(json.loads(next(tmp_path.glob("*.json")).read_text())["told"]) > 3


def test_an_answer_is_written_to_its_end_however_long():
    """What the model itself writes, taken as the answer: seventeen tokens are not cut off at
    twelve."""
    lens = qv.load("toy-gptj")
    for prompt, tokens in (("Elena Morefeld plays the sport of", 2), ("Every year", 17)):
        said = lens.generate(prompt, 20)
        assert len(lens.answer_ids(prompt, said)) == tokens
        case = dataclasses.replace(CASES[0], neighbours=(Probe(prompt, said),))
        frame = evaluate(lens, [case], ["specificity_gen", "specificity_acc"])
        assert frame["after"].tolist() == [1.0, 1.0], said


def test_a_name_that_only_begins_the_word_is_not_the_answer():
    """As many tokens are written as tell whether the word goes on."""
    lens = qv.load("toy-gptj")
    ids = lens.answer_ids("Every year", lens.generate("Every year", 40))
    pieces = [lens.tokenizer.decode([token]) for token in ids]
    # a word of which a token of its own is the beginning
    at = next(
        i for i, (one, other) in enumerate(itertools.pairwise(pieces))
        if one[0] == " " and one[1:].isalpha() and other[0].isalpha()
    )  # fmt: skip
    prompt, begins_so = "Every year" + "".join(pieces[:at]), pieces[at].strip()
    assert lens.generate(prompt, 2) == pieces[at] + pieces[at + 1]
    case = dataclasses.replace(CASES[0], neighbours=(Probe(prompt, begins_so),))
    frame = evaluate(lens, [case], ["specificity_gen"], generation=Generation(answer_tokens=1))
    assert frame["after"].tolist() == [0.0]


def test_totals_of_patches_are_sums(tiny):
    lens, statistics = tiny
    patches = [
        qv.edit(lens, request, EDITORS[0], statistics=statistics, templates=("{}",))
        for request in REQUESTS
    ]
    both = total(patches)
    for key, delta in both.deltas.items():
        torch.testing.assert_close(delta.dense(), sum(p.deltas[key].dense() for p in patches))


def test_the_benchmarks_layouts_run_on_a_toy():
    """MQuAKE, CounterFact and KnowEdit records of the bundled world, written and read back, through
    one evaluation."""
    lens = qv.load("toy-gptj")
    cases = [
        *_read(world_cases.mquake(WORLD, 3)),
        *_read(world_cases.counterfact(WORLD, 2)),
        *_read(world_cases.knowedit(WORLD, 2)),
    ]
    blocks = tuple(world_cases.cot_blocks(WORLD, (), random.Random(0)))
    names = [*metrics.FORCED, "efficacy_gen", "multihop_cot", "fluency"]
    frame = evaluate(lens, cases, names, generation=Generation(blocks=blocks, fluency_tokens=20))
    before = frame.groupby("metric")["before"].mean()
    assert before["efficacy_acc"] == 0
    assert before["specificity_acc"] == before["instance_wise"] == before["multihop_cot"] == 1
    assert before["specificity_success"] == before["locality"] == 1
    assert before["fluency"] > 1
    kept, told = known(lens, [c for c in cases if isinstance(c, qv.MultiHopCase)])
    assert len(kept) == 3
    assert told["right"].all()
    strange = [c for c in cases if isinstance(c, qv.MultiHopCase)][:1]
    assert (
        known(lens, [qv.MultiHopCase(**{**strange[0].__dict__, "hops": strange[0].new_hops})])[0]
        == []
    )


def test_the_subset_by_what_a_model_writes():
    """Zero-shot and behind worked examples (ACE, Appendices B.1 and G.2): the prompts, and what
    counts as known."""
    hops = (
        Hop("Where is X?", "X is in", "Landia", ("The Land",)),
        Hop("Who heads Landia?", "The head of Landia is", "Ann"),
    )
    cases = [qv.MultiHopCase(i, (), ("Q",), "Ann", "Bob", hops=hops) for i in range(2)]
    cases.append(qv.MultiHopCase(2, (), ("Q",), "Ann", "Bob"))  # no hops: nothing is known of it
    asked = []

    def says(*texts):
        return SimpleNamespace(
            generate=lambda prompts, tokens: asked.append(prompts) or list(texts),
            answer_ids=lambda prompt, name: name.split(),
            label={"model": "none"},
        )

    kept, told = known(says(" the land, far off", "Ann.", "Landia", "Anna"), cases, "generate")
    assert asked.pop() == ["X is in", "The head of Landia is"] * 2
    assert [case.case_id for case in kept] == [0]  # an alias counts, a longer word does not
    assert told["right"].tolist() == [True, True, True, False]
    kept, told = known(
        says("Landia", "Ann", "?", "Ann"), cases, "few_shot", [("Who wrote Y?", "Zoe")]
    )
    assert asked.pop()[0] == "Q: Who wrote Y? A: Zoe\nQ: Where is X? A:"
    assert [case.case_id for case in kept] == [0]
    with pytest.raises(qv.QVLensError, match="How 'guess' not found"):
        known(says(), cases, "guess")


def _read(records):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        path.write_text(json.dumps(records))
        return read(path).cases


def test_a_patch_applied_after_a_failure_stays(tiny, monkeypatch):
    """An evaluation that failed must not take anything back later, when it is collected."""
    lens, statistics = tiny
    look, count = protocols.look, []

    def failing(*args):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("in the middle")
        return look(*args)

    monkeypatch.setattr(protocols, "look", failing)
    with pytest.raises(RuntimeError) as caught:
        evaluate(lens, CASES, ["efficacy_acc"], EDITORS[0], statistics=statistics)
    patch = qv.edit(lens, REQUESTS[0], EDITORS[0], statistics=statistics)
    lens.apply(patch)
    del caught
    gc.collect()
    assert lens.patches == (patch,)
    lens.revert()
    monkeypatch.setattr(protocols, "look", look)
    # no editor: the unedited model alone
    unedited = evaluate(lens, CASES, ["specificity_acc"], protocol="batch")
    assert unedited["after"].tolist() == unedited["before"].tolist()


@pytest.mark.parametrize("editor", EDITORS[:3], ids=lambda editor: type(editor).__name__)
def test_single_edits_searched_together_are_those_searched_one_by_one(editor, exact, monkeypatch):
    """In float64: in float32 rows side by side round otherwise, by up to 1.3e-4 of the norms."""
    lens, statistics = exact
    searched, real = [], protocols.search_ahead
    monkeypatch.setattr(
        protocols,
        "search_ahead",
        lambda lens, first, *a, **k: searched.append(len(first)) or real(lens, first, *a, **k),
    )
    frames = [
        evaluate(lens, CASES, None, editor, statistics=statistics, batch_size=size)
        for size in (1, 3)
    ]
    pd.testing.assert_series_equal(values(frames[0]), values(frames[1]))
    assert searched == [1, 1, 1, 1, 3, 1]
    monkeypatch.setattr(protocols, "search_ahead", _no_memory)
    alone = evaluate(lens, CASES, None, editor, statistics=statistics, batch_size=3)
    pd.testing.assert_series_equal(values(alone), values(frames[0]))
    torch.testing.assert_close(
        *(torch.tensor(frame["relative_norm"].to_numpy()) for frame in frames), rtol=1e-9, atol=0
    )


def test_editors_with_one_search_share_the_targets_in_the_cache(exact, tmp_path, monkeypatch):
    lens, statistics = exact
    memit = qv.MEMIT(layers=(0, 1), steps=4, lam=10.0)
    alone = evaluate(lens, CASES, None, memit, statistics=statistics)
    search = layer_by_layer.search
    slow = lambda *words, **options: time.sleep(2) or search(*words, **options)  # noqa: E731
    monkeypatch.setattr(layer_by_layer, "search", slow)
    first = evaluate(lens, CASES, None, memit, statistics=statistics, cache=tmp_path)
    kept = {file: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    assert len(kept) == len(CASES)
    monkeypatch.setattr(layer_by_layer, "search", _no_search)
    again = evaluate(lens, CASES, None, memit, statistics=statistics, cache=tmp_path)
    for frame in (first, again):
        pd.testing.assert_series_equal(values(frame), values(alone))
    # the search that was spared counts all the same, each case with its share
    assert (again["seconds"] > 2 / len(CASES)).all()
    rival = qv.RECT(layers=(0, 1), steps=4, lam=10.0)
    # the same search: nothing is searched
    evaluate(lens, CASES, None, rival, statistics=statistics, cache=tmp_path)
    for other in (dataclasses.replace(memit, clamp=2.0), dataclasses.replace(memit, layers=(0,))):
        with pytest.raises(AssertionError, match="searched"):
            evaluate(lens, CASES, None, other, statistics=statistics, cache=tmp_path)
    with (
        lens.patched(qv.edit(lens, REQUESTS[0], qv.FT(layer=1, steps=2))),
        pytest.raises(AssertionError, match="searched"),
    ):
        evaluate(lens, CASES, None, memit, statistics=statistics, cache=tmp_path)
    damaged = next(iter(kept))
    damaged.write_bytes(kept[damaged][:100])
    with pytest.raises(AssertionError, match="searched"):
        evaluate(lens, CASES, None, memit, statistics=statistics, cache=tmp_path)
    monkeypatch.undo()
    evaluate(lens, CASES, None, memit, statistics=statistics, cache=tmp_path)
    assert len(damaged.read_bytes()) > 100


def _no_search(*args, **options):
    raise AssertionError("searched")


def _no_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory")


def by_hand(lens, texts):
    """exp of Hugging Face's own loss over the texts, weighed by their tokens."""
    loss = count = 0
    for text in texts:
        ids = torch.tensor([lens.tokenizer(text)["input_ids"]])
        loss += float(lens.hf(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(loss / count)


def test_perplexity_beyond_numbers_and_blank_texts(tiny, monkeypatch):
    lens, _ = tiny
    texts = ["Olga Pelodan works for Nortek.", "The capital of Norway is Oslo."]
    assert perplexity(lens, [texts[0], " ", "", texts[1]]) == perplexity(lens, texts)
    with pytest.raises(qv.QVLensError, match="no text to measure perplexity on"):
        perplexity(lens, [])
    monkeypatch.setattr("qv_lens.evaluation.perplexity.log_probs", lambda logits: logits * 0 - 800)
    assert perplexity(lens, texts) == math.inf


def test_perplexity_of_ordinary_text_stands_in_every_row(tiny):
    lens, _ = tiny
    texts = ["The capital of Norway is a city.", "Olga Pelodan works for", "A"]
    clean = by_hand(lens, texts[:2])  # of a single token nothing is predicted
    assert perplexity(lens, texts) == pytest.approx(clean, rel=1e-5)
    editor = qv.FT(layer=1, lr=1e-2, steps=3)
    frame = evaluate(lens, CASES[:2], ["efficacy_acc"], editor, held_out=texts)
    rows = frame[frame["metric"] == "perplexity"]
    assert rows["before"].tolist() == pytest.approx([clean, clean], rel=1e-5)
    for case, after in zip(CASES[:2], rows["after"], strict=True):
        with lens.patched(qv.edit(lens, case.request, editor)):
            assert after == pytest.approx(by_hand(lens, texts[:2]), rel=1e-5)
    assert "perplexity" not in set(evaluate(lens, CASES[:1], ["efficacy_acc"], editor)["metric"])
    table = qv.summary(frame).reset_index()
    assert table.loc[table["metric"] == "perplexity", "after"].item() > 1
    with pytest.raises(qv.QVLensError, match="several texts"):
        evaluate(lens, CASES[:1], ["efficacy_acc"], editor, held_out="one text")
    with pytest.raises(qv.QVLensError, match="no text to measure"):
        perplexity(lens, ["A"])


def test_of_a_long_text_the_beginning_is_read(tiny):
    lens, _ = tiny
    limit = lens.backend_adapter.cfg.n_ctx
    text = " ".join(CASES[i % 4].request.fact.text for i in range(60))
    ids = torch.tensor([lens.tokenizer(text)["input_ids"][:limit]])
    assert len(lens.tokenizer(text)["input_ids"]) > 2 * limit
    wanted = math.exp(float(lens.hf(ids, labels=ids).loss))
    assert perplexity(lens, [text]) == pytest.approx(wanted, rel=1e-5)


def test_fluency_is_of_text_drawn_as_asked(tiny, tmp_path):
    """With `top_k=1` the text drawn is the greedy one. Another `top_k` is another text, although the
    folder holds what was drawn before."""
    lens, _ = tiny
    case = dataclasses.replace(CASES[0], generation=("The capital of Norway is",))
    (prompt,) = case.generation
    greedy = lens.generate(prompt, 20)
    told = {}
    for top_k in (1, 50):
        frame = evaluate(
            lens, [case], ["fluency"], cache=tmp_path,
            generation=Generation(fluency_tokens=20, top_k=top_k),
        )  # fmt: skip
        told[top_k] = frame["after"].item()
    assert told[1] == pytest.approx(ngram_entropy(prompt + greedy))
    assert told[50] != pytest.approx(told[1])


def test_a_judge_is_told_every_accepted_name(tiny):
    lens, _ = tiny
    case = dataclasses.replace(
        CASES[0], neighbours=(Probe("The capital is", "Oslo", ("Kristiania",)),)
    )
    seen = []
    judge = lambda prompt, said, accepted: bool(seen.append(tuple(accepted)))  # noqa: E731
    evaluate(lens, [case], ["specificity_judged"], judge=judge)
    assert set(seen) == {("Oslo", "Kristiania")}


def test_a_judge_is_asked_only_where_it_is_passed(tiny):
    lens, _ = tiny
    asked = []

    def judge(prompt, said, accepted):
        asked.append(prompt)
        return "x" in said

    with pytest.raises(qv.QVLensError, match="needs judge="):
        evaluate(lens, CASES[:1], ["efficacy_judged"])
    evaluate(lens, CASES[:1], ["efficacy_acc", "efficacy_exact"], judge=judge)
    assert not asked
    for said in (None, "yes", 7, float("nan")):
        with pytest.raises(qv.QVLensError, match="from 0 to 1"):
            evaluate(lens, CASES[:1], ["efficacy_judged"], judge=lambda *_, said=said: said)
    frame = evaluate(lens, CASES[:1], ["efficacy_judged"], judge=judge)
    assert asked == [CASES[0].request.fact.text]
    assert frame["after"].isin([0.0, 1.0]).all()
    # a person is not asked again about the unedited model: two before, one after one edit, two after two
    asked.clear()
    editor = qv.FT(layer=0, steps=1)
    row = {"protocol": "consecutive", "every": 1, "judge": judge}
    evaluate(lens, CASES[:2], ["efficacy_judged"], editor, **row)
    assert len(asked) == 5
