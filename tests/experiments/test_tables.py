"""The papers' tables on few prompts: shapes, settings, and numbers computed another way; their
files; the ledger."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import qv_lens as qv
from experiments import compare, editors, ledger, prompts, single
from experiments.ace import neurons_27, section_4_2, sums_to_nothing, table_1, table_5, table_6_7
from experiments.ctp import figure_4
from experiments.kne import figure_b5
from experiments.prompts import asked, of_category, pool, usual
from qv_lens.evaluation import known_cases
from qv_lens.facts.atlas import chains
from qv_lens.facts.categories import CATEGORIES
from qv_lens.models.lens import Lens
from qv_lens.runs.config import read_config
from qv_lens.runs.experiment import directly
from qv_lens.runs.run import all_tasks
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.evaluation import cases_of, examples_of
from tests.models import tiny_of, tokenizer

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def lens():
    return qv.load("toy-gptj")


FILES = [Path(module.__file__) for module in (*ledger.experiments(), editors)]


def test_layers_against_a_loop_over_neurons(lens):
    """Table 1's number for one layer: I of every neuron by two forward reads, added up."""
    frame = table_1.rows(table_1.Task("toy-gptj", "sport", prompts=2), lens)
    assert set(frame["part"]) == {
        "ffn",
        "attn",
        "ffn_vector",
        "attn_vector",
        "head",
        "query",
        "count",
        "ffn_effect",
        "attn_effect",
        "effect_count",
    }
    layer = 2
    assert len(frame) == (9 + 4) * lens.n_layers
    assert (frame[frame["part"] == "count"]["score"].sum(), frame["prompts_asked"].iloc[0]) == (
        300,
        2,
    )
    got = frame[(frame["part"] == "ffn") & (frame["layer"] == layer)].iloc[0]
    sums = []
    for fact in of_category("sport", 2, 0):
        trace = lens.trace(fact)
        h = trace.resid[layer, 0].double() + trace.attn[layer, 0].double()
        target, norm = lens.answer_ids(fact)[0], lens.hf.transformer.ln_f
        y = trace.final[0].double()  # whose divisor is frozen
        sigma = ((y - y.mean()).square().mean() + norm.eps).sqrt()

        def read(x, sigma=sigma, norm=norm, target=target):
            y = (x - x.mean(-1, keepdim=True)) / sigma * norm.weight.double() + norm.bias.double()
            return (
                y @ lens.hf.lm_head.weight.double().T + lens.hf.lm_head.bias.double()
            ).log_softmax(-1)[..., target]

        v = (
            trace.m[layer, 0].double()[:, None]
            * lens.hf.transformer.h[layer].mlp.fc_out.weight.double().T
        )
        sums.append(float((read(h + v) - read(h)).sum()))
    assert abs(got["score"]) > 0.05  # large enough for the tolerance to tell
    assert got["score"] == pytest.approx(sum(sums) / 2, abs=2e-4)
    error = abs(sums[0] - sums[1]) / 2  # sd / sqrt(2), of two
    # Student's t for one degree of freedom
    assert got["interval"] == pytest.approx(12.7062 * error, rel=5e-3)


def slope(lens, fact, layer, at) -> float:
    """What log p of the answer loses, per unit, when a layer's FFN activations at one token shrink:
    the sum of m dy/dm over its neurons."""
    ids = torch.tensor([lens.tokenizer(fact.text)["input_ids"]])
    step, said = 1e-2, []
    for scale in (1 + step, 1 - step):

        def shrink(module, inputs, scale=scale):
            m = inputs[0].clone()
            m[0, at] *= scale
            return (m,)

        hook = lens.hf.transformer.h[layer].mlp.fc_out.register_forward_pre_hook(shrink)
        logits = lens.hf(ids).logits[0, -1].double()
        hook.remove()
        said.append(float(logits.log_softmax(-1)[lens.answer_ids(fact)[0]]))
    return (said[0] - said[1]) / (2 * step)


def test_layers_and_tokens_by_effect(lens, tmp_path):
    """Against activations that are really made smaller, in Hugging Face's model. Of answers that it
    does not give: of those that it is sure of nothing is lost to first order."""
    told = of_category("sport", 2, 0)
    records = [
        {"prompt": f.prompt, "subject": f.subject, "answer": "archery", "category": "sport"}
        for f in told
    ]
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(records))
    facts = [replace(fact, answer="archery") for fact in told]
    frame = table_1.rows(table_1.Task("toy-gptj", "sport", prompts=2, facts=str(file)), lens)
    effect = frame[frame["part"] == "ffn_effect"].set_index("layer")["score"]
    layers = range(lens.n_layers)
    with torch.no_grad():
        wanted = [sum(slope(lens, fact, layer, -1) for fact in facts) / 2 for layer in layers]
        assert max(map(abs, wanted)) > 0.1
        assert effect.tolist() == pytest.approx(wanted, abs=2e-2)
        frame = table_5.rows(table_5.Task("toy-gptj", prompts=2, facts=str(file)), lens)
        frame = frame[frame["text"] == facts[0].text]
        wanted = [
            sum(slope(lens, facts[0], layer, at) for layer in layers) for at in range(len(frame))
        ]
    assert frame["effect"].tolist() == pytest.approx(wanted, abs=5e-2)
    assert max(map(abs, wanted[:-1])) > 0.1  # not at the last token alone


def test_tokens_say_what_the_model_would_say(lens):
    frame = table_5.rows(table_5.Task("toy-gptj", prompts=2), lens)
    fact = of_category("sport", 1, 0)[0]
    assert sorted(set(frame["prompt"])) == [0, 1]
    frame = frame[frame["prompt"] == 0]
    assert frame["token"].tolist() == lens.str_tokens(fact)
    ids = torch.tensor([lens.tokenizer(fact.text)["input_ids"]])
    best = [lens.tokenizer.decode([int(i)]).strip() for i in lens.hf(ids).logits[0].argmax(-1)]
    assert [said.split("', ")[0].strip("'") for said in frame["promoted"]] == best
    assert best[-1] == fact.answer.split()[0]
    # the layer whose output adds most, the divisor frozen
    trace, target = (lens.trace(fact), lens.answer_ids(fact)[0])
    norm, head, y = lens.hf.transformer.ln_f, lens.hf.lm_head, trace.final[0].double()
    sigma = ((y - y.mean()).square().mean() + norm.eps).sqrt()

    def read(x):
        return (
            head((((x - x.mean()) / sigma) * norm.weight + norm.bias).float())
            .double()
            .log_softmax(-1)[target]
        )

    mids = [(trace.resid[i, 0] + trace.attn[i, 0]).double() for i in range(lens.n_layers)]
    adds = [float(read(mid + trace.ffn[i, 0].double()) - read(mid)) for i, mid in enumerate(mids)]
    assert frame["ffn"].iloc[-1] == pytest.approx(max(adds), abs=1e-3)


def test_neurons_and_nodes(lens):
    frame = table_6_7.rows(table_6_7.Task("toy-gptj", prompts=1, top=4), lens)
    assert frame.groupby("role").size().to_dict() == dict.fromkeys(
        ("query", "value", "shared", "effect"), 4
    )
    fact = of_category("sport", 1, 0)[0]
    value = qv.value_neurons(lens, fact)
    assert (
        frame[frame["role"] == "value"][["layer", "neuron"]].to_records(index=False).tolist()
        == value.top(4).units
    )
    found = figure_4.rows(figure_4.Task("toy-gptj", prompts=2, top=3, score="norm"), lens)
    weight, losses = lens.hf.transformer.h[4].mlp.fc_out.weight.requires_grad_(True), []
    # the gradient of the Hugging Face model
    for request in figure_4.edits_of(of_category("all", 2, 0), figure_4.Task("toy-gptj")):
        fact = request.fact
        assert request.new != fact.answer
        assert request.new in {other.answer for other in pool() if other.relation == fact.relation}
        start = len(lens.tokenizer(fact.text)["input_ids"])
        ids = torch.tensor([lens.tokenizer(f"{fact.text} {request.new}")["input_ids"]])
        losses.append(
            -lens.hf(ids)
            .logits[0, start - 1 : -1]
            .log_softmax(-1)
            .gather(1, ids[0, start:, None])[:, 0]
        )
    (G,) = torch.autograd.grad(torch.cat(losses).mean(), weight)
    weight.requires_grad_(False)
    row = found.query("layer == 4 and kind == 'value' and path == 'T+'")
    assert row["importance"].item() == pytest.approx(
        float(G.norm(dim=0).topk(3).values.mean()), rel=1e-3
    )
    assert found[found["path"] == "T+"]["count"].unique().tolist() == [3]
    assert found.groupby(["layer", "kind"])["count"].sum().unique().tolist() == [lens.d_mlp]


def test_suppression_and_interpretable_neurons(lens):
    """The probability after zeroing, against rows of W_out set to zero by hand."""
    frame = section_4_2.rows(section_4_2.Task("toy-gptj", prompts=3), lens)
    clean, other = (frame[(frame["condition"] == "clean") == same] for same in (True, False))
    assert clean["count"].sum() == pytest.approx(300)
    assert clean["original"].tolist() == clean["count"].tolist()
    effects = other[other["condition"].str.startswith("Effects")]
    assert effects["count"].isna().all()
    assert effects["suppressed"].tolist() == other["suppressed"].drop_duplicates().tolist()
    assert set(effects["neurons"]) == set(other["neurons"])
    other = other.drop(effects.index)
    assert (other["original"] <= other["count"]).all()
    assert (other["original"] < other["count"]).any()
    assert frame["clean"].dropna().eq(1.0).all()
    got = neurons_27.rows(neurons_27.Task("toy-gptj", prompts=1, count=5, samples=200), lens)
    fact = of_category("sport", 1, 0)[0]
    value = qv.value_neurons(lens, fact)
    telling = value.where(lambda f: qv.interpretable(lens, value, fact.answer)).top(5)
    ids = torch.tensor([lens.tokenizer(fact.text)["input_ids"]])
    for name, zeroed in (("interpretable", telling), ("effects", qv.neuron_effects(lens, fact, 5))):
        state = {layer: lens.w_out(layer).clone() for layer in range(lens.n_layers)}
        for layer, neuron in zeroed.units:
            lens.w_out(layer)[neuron] = 0.0
        p = float(lens.hf(ids).logits[0, -1].softmax(-1)[lens.answer_ids(fact)[0]])
        for layer, weight in state.items():
            lens.w_out(layer).copy_(weight)
        row = got.set_index("set").loc[name]
        assert row["zeroed"] == len(zeroed)
        assert row["probability"] == pytest.approx(p, abs=1e-5)
        assert abs(row["sampled"] - p) < 4 * (p * (1 - p) / 200) ** 0.5 + 1e-3
    zeroed = got.set_index("set")["zeroed"]
    assert zeroed["random beside effects"] == zeroed["effects"] == 5


def test_prompts_by_category():
    assert len(of_category("author", 100, 0)) == 40  # all there are
    assert {f.category for f in of_category("capital", 10, 0, hops=2)} == {"capital"}
    assert of_category("sport", 5, 0) == of_category("sport", 5, 0) != of_category("sport", 5, 1)
    with pytest.raises(qv.QVLensError, match="Categories: author"):
        of_category("weather", 5, 0)
    assert len(pool(hops=2)) > 1000


def test_prompts_of_a_file_of_chains(tmp_path):
    """Against the raw records: every unedited hop once; of two-hop prompts those of two hops, filed
    under their end."""
    records, path = world_cases.mquake(generator.build(0), 27, 1), tmp_path / "chains.json"
    path.write_text(json.dumps([*records, {**records[0], "questions": []}]))
    with pytest.warns(
        UserWarning, match=r"1 records are left out, the first one record 27, field 'questions'"
    ):
        single = pool(str(path))
    hops = {
        (hop["cloze"], hop["answer"]): triple[1]
        for record in records
        for hop, triple in zip(record["single_hops"], record["orig"]["triples"], strict=True)
    }
    assert {(fact.text, fact.answer): fact.relation for fact in single} == hops
    assert len(single) == len(hops)
    assert all(fact.category == CATEGORIES.get(fact.relation) for fact in single)
    # the subject is found in the cloze
    assert sum(fact.subject != fact.text for fact in single) == len(single)
    with pytest.warns(UserWarning, match="left out"):
        double = pool(str(path), hops=2)
    two = [record for record in records if len(record["single_hops"]) == 2]
    assert [(fact.text, fact.answer) for fact in double] == [
        (record["questions"][0], record["answer"]) for record in two
    ]
    assert [fact.relation for fact in double] == [
        record["orig"]["triples"][-1][1] for record in two
    ]
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(qv.QVLensError, match=r"No prompt .*; \d+ of \d+ prompts have none"),
    ):
        of_category("weather", 5, 0, str(path))


def test_layers_of_the_atlas_are_located_over_its_own_chains(lens, monkeypatch):
    """Of a model of the real world: two-hop prompts that it knows, on the cases' relations, about
    none of their subjects; not the bundled world's."""
    asked_of = []
    monkeypatch.setattr(compare, "usual", lambda lens, source: prompts.ATLAS)
    monkeypatch.setattr(compare, "first_known", lambda lens, facts, count: list(facts[:count]))
    monkeypatch.setattr(compare, "as_said", lambda lens, facts: facts)
    monkeypatch.setattr(compare, "locate", lambda lens, facts: asked_of.extend(facts))
    cases = compare.Cases(count=4)
    compare._located(lens, cases, directly)
    edited = [case.request.fact for case in compare._drawn(lens, cases, directly).cases]
    told = {chain.cloze: chain for chain in chains()}
    assert len(asked_of) == compare.LOCATED_OVER
    for fact in asked_of:
        chain = told[fact.text]
        assert {chain.first.relation, chain.second.relation} & {f.relation for f in edited}
        assert not {chain.first.subject, chain.second.subject} & {f.subject for f in edited}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_experiment_makes_tasks_and_says_its_command(path):
    tasks = all_tasks(read_config(path))
    assert tasks
    assert len({task.id for task in tasks}) == len(tasks)
    where = path.relative_to(EXPERIMENTS.parent)
    assert f"    qv-lens run {where}" in path.read_text()


def test_every_comparison_has_its_cases(lens):
    """What the files ask for can be drawn: as many cases as they say, and worked examples that tell
    none of their facts."""
    tasks = [
        task.fields
        for path in FILES
        for task in all_tasks(read_config(path))
        if task.fields.__class__ is compare.Task
    ]
    wanted = {(task.cases.data, task.cases.count, task.cases.seed) for task in tasks}
    assert ("multihop", 100, 0) in wanted
    for data, count, seed in wanted:
        cases = cases_of(lens, data, count, seed).cases
        blocks = examples_of(lens, cases, seed)
        assert len(cases) == count
        for request in (request for case in cases for request in case.requests):
            assert not any(
                request.fact.subject in block and request.fact.answer in block for block in blocks
            )


def test_the_bundled_world_is_asked_of_its_own_models_alone(lens, tmp_path):
    lens.save(tmp_path / "saved")
    saved = qv.load(tmp_path / "saved")
    assert len(table_5.rows(table_5.Task(saved.name, prompts=1), saved))
    other = SimpleNamespace(name="other", tokenizer=SimpleNamespace(get_vocab=lambda: {"a": 0}))
    assert usual(other, "") == "atlas"
    assert usual(other, "facts.csv") == usual(saved, "facts.csv") == "facts.csv"
    with pytest.raises(qv.QVLensError, match="was not trained on the bundled world"):
        cases_of(other, "multihop", 1)


def test_prompts_of_the_atlas_are_those_that_the_model_knows(monkeypatch):
    """The first so many in the seed's order; single facts of a category, and chains of its end."""
    monkeypatch.setattr(prompts, "as_said", lambda lens, facts: facts)
    other = SimpleNamespace(name="other", tokenizer=SimpleNamespace(get_vocab=lambda: {"a": 0}))
    for hops in (1, 2):
        every = of_category("capital", 10_000, 0, "atlas", hops)
        assert {fact.category for fact in every} == {"capital"}
        known = every[1::3]
        monkeypatch.setattr(
            known_cases, "knows", lambda lens, facts, known=known: [f in known for f in facts]
        )
        task = table_5.Task("other", category="capital", prompts=7)
        assert asked(other, task, hops) == known[:7]
        assert asked(other, replace(task, prompts=10_000), hops) == known
    monkeypatch.setattr(known_cases, "knows", lambda lens, facts: [False for _ in facts])
    with pytest.raises(qv.QVLensError, match="knows the answer of none of"):
        asked(other, task)


def test_the_committed_ledger_is_what_the_command_writes():
    for file, text in ledger.pages().items():
        assert file.read_text() == text, (
            "run python -m experiments.ledger and commit what it writes"
        )


def test_rows_take_the_place_of_the_same_cell_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    cell = ledger.cell_of(single)
    assert {"model", "method", "data", "protocol", "seed", "known", "metric"} <= set(cell)
    assert not {"count", "batch_size"} & set(cell)
    assert "batch_size" in ledger.cell_of(figure_b5)  # varied there

    def rows(after, *whose):
        frame = pd.DataFrame(whose, columns=["model", "method"])
        return frame.assign(metric="efficacy_acc", case=0, after=after)

    ledger._join("single", rows(1.0, ("small", "FT"), ("small", "ROME"), ("large", "FT")), cell)
    ledger._join("single", rows(2.0, ("small", "FT"), ("small", "MEMIT")), cell)
    kept = pd.read_parquet(tmp_path / "single.parquet").set_index(["model", "method"])["after"]
    assert kept.to_dict() == {
        ("small", "FT"): 2.0, ("small", "ROME"): 1.0, ("small", "MEMIT"): 2.0, ("large", "FT"): 1.0,
    }  # fmt: skip
    for data in ("atlas", "counterfact"):  # of other data, other results
        ledger._join("asked", rows(1.0, ("small", "FT")).assign(data=data), cell)
    assert len(pd.read_parquet(tmp_path / "asked.parquet")) == 2
    ledger._join("layers", rows(1.0, ("small", "")).drop(columns="method"), cell)
    ledger._join("layers", rows(2.0, ("small", "")).drop(columns="method"), cell)
    assert pd.read_parquet(tmp_path / "layers.parquet")["after"].tolist() == [2.0]
    # part of a sweep, another seed, another metric: added; other sizes: in the place of those before
    sweep = pd.concat(
        rows(1.0, ("small", "CTP")).assign(editor=json.dumps({"lam": lam}), seed=0, count=34)
        for lam in (0.0, 0.5, 1.0)
    )

    def swept(part: pd.DataFrame) -> list[tuple]:
        ledger._join("sweep", part, cell)
        kept = pd.read_parquet(tmp_path / "sweep.parquet")
        return sorted(kept[["lam", "seed", "metric", "count", "after"]].itertuples(index=False))

    first = swept(sweep)
    assert len(first) == 3
    again = sweep[sweep["editor"] == '{"lam": 0.5}'].assign(after=2.0, count=30)
    now = swept(again)
    assert [row.after for row in now] == [1.0, 2.0, 1.0]
    assert [row.count for row in now] == [34, 30, 34]
    assert len(swept(again.assign(seed=1))) == 4
    assert len(swept(again.assign(metric="locality"))) == 5


def test_a_ledger_that_is_out_of_date_says_where():
    text = ledger._first_difference("# The ledger\n| a | holds |", "# The ledger\n| a | fails |")
    assert text.startswith("'| a | holds |' is now '| a | fails |'. Run python -m")


@pytest.mark.parametrize(("name", "nothing"), [("Gemma 3", True), ("Qwen3", False)])
def test_effects_before_a_norm_are_not_added_up(name, nothing):
    """A norm takes a longer vector for the same, so along the sublayer's whole output nothing is
    lost to first order: what is left of the sum is rounding."""
    lens = Lens.from_hf(tiny_of(name, torch.float64), tokenizer())
    facts = [qv.Fact("The capital of {} is", "Norway", "Oslo")]
    for kind, unit in (("ffn", "ffn"), ("attn", "attn_channel")):
        frame = qv.neuron_effects(lens, facts, None, unit=unit).frame
        sums = frame.groupby("layer")["score"].sum().abs()
        share = float((sums / frame["score"].abs().groupby(frame["layer"]).sum()).max())
        assert (share < 1e-4) == nothing
        assert sums_to_nothing(lens, kind) == nothing
    parts = {part for frame in table_1.effects(lens, facts) for part in frame["part"]}
    assert parts == {"effect_count"} if nothing else {"effect_count", "ffn_effect", "attn_effect"}
