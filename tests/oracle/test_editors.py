"""Against numbers measured from the published reference code (MEMIT, PMET) on a tiny trained GPT-J.

Tolerances: deltas given K, z*, cur and C0 are float64 algebra on both sides (1e-8 relative); keys come from float32
forward passes (1e-5); z* from 24 to 29 Adam steps in float32 on both sides (1e-3), its losses are printed with three
decimals (2e-3).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qv_lens as qv
from qv_lens.editing.keys import clean_values, mean_over_contexts, read, rows_of
from qv_lens.editing.solve import inverse_of, solve
from qv_lens.editing.statistics import Statistics, covariance
from qv_lens.editing.targets import search

ORACLE = Path(__file__).parents[3] / "shared" / "oracle" / "editors"
pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"no reference numbers at {ORACLE.name}")


class Reference:
    def __init__(self, method: str) -> None:
        self.method = method
        self.tensors = load_file(ORACLE / f"{method}.safetensors")
        self.record = json.loads((ORACLE / f"{method}.json").read_text())
        self.h = self.record["hparams"]
        self.layers = self.h["layers"]
        self.templates = ("{}", *self.record["context_templates"])
        self.requests = [
            qv.Fact(r["prompt"], r["subject"], r["target_true"]["str"]).to(r["target_new"]["str"])
            for r in self.record["requests"]
        ]

    def name(self, layer: int) -> str:
        return f"transformer.h.{layer}.mlp.fc_out"

    def keys(self, layer: int):
        return self.tensors[f"keys.{layer}" if self.method == "memit" else f"keys.{self.name(layer)}"]

    def current(self, layer: int):
        return self.tensors[f"cur_z.{layer}" if self.method == "memit" else f"cur_z.{self.name(layer)}"]

    @property
    def z(self):
        return self.tensors["z_star" if self.method == "memit" else "z_star_mlp"]

    def delta(self, layer: int):
        return self.tensors[f"delta_fp64.{self.name(layer)}.weight"].T

    def editor(self):
        kind = {"memit": qv.MEMIT, "pmet": qv.PMET}[self.method]
        return kind(
            layers=tuple(self.layers), steps=self.h["v_num_grad_steps"], lr=self.h["v_lr"], clamp=self.h["clamp_norm_factor"],
            weight_decay=self.h["v_weight_decay"], kl=self.h["kl_factor"], lam=self.h["mom2_update_weight"],
        )  # fmt: skip

    def one_pass(self, lens):
        editor = self.editor()
        return editor.spread(lens, editor.layers) if self.method == "memit" else editor.two_deltas(lens, (editor.layers,))


@pytest.fixture(params=["memit", "pmet"])
def reference(request):
    return Reference(request.param)


@pytest.fixture(scope="module")
def lens():
    return qv.load(ORACLE / "model")


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_delta_given_keys_targets_and_statistics(reference):
    for i, layer in enumerate(reference.layers):
        left = len(reference.layers) - i
        share = left if reference.method == "memit" else left**0.5
        R = (reference.z - reference.current(layer)).double().T / share  # the reference subtracts in float32
        metric = inverse_of(reference.tensors[f"C0.{reference.name(layer)}"])
        delta = solve(metric, reference.keys(layer).T, R, reference.h["mom2_update_weight"])
        assert relative(delta.dense(), reference.delta(layer)) < 1e-8


def test_rows_and_keys(reference, lens):
    rows = rows_of(lens, reference.requests, reference.templates, "subject_last")
    ids = [list(row) for request in reference.record["token_ids"] for row in request["prompts"][:-1]]
    assert [list(row) for row in rows.ids] == ids
    where = [i for request in reference.record["lookup_idx"] for i in request[:-1]]
    assert rows.lookup.long().argmax(1).tolist() == where
    layer = reference.layers[0]
    sites = (lens.backend_adapter.coefficient(layer), reference.one_pass(lens).search.sites[0])
    seen = read(lens, rows, sites)
    assert relative(mean_over_contexts(rows, seen[sites[0]]), reference.keys(layer)) < 1e-5
    assert relative(clean_values(rows, seen[sites[1]]), reference.current(layer)) < 1e-5


def test_targets_and_their_losses(reference, lens):
    rows = rows_of(lens, reference.requests, reference.templates, "subject_last")
    found = search(lens, reference.requests, rows, "subject_last", reference.one_pass(lens).search)
    assert relative(found.z, reference.z) < 1e-3
    log, steps = reference.record["loss_log"], reference.h["v_num_grad_steps"]
    assert len(log) == len(found.losses) * len(reference.requests) == steps * len(reference.requests)
    for i in range(len(reference.requests)):
        theirs = [row[0] for row in log[i * steps : (i + 1) * steps]]
        assert [step[i][0] for step in found.losses] == pytest.approx(theirs, abs=2e-3)


def test_whole_run(reference, lens):
    C0 = {layer: reference.tensors[f"C0.{reference.name(layer)}"].double() for layer in reference.layers}
    statistics = Statistics(C0, 35859, "oracle", lens.fingerprint)
    before = [lens.w_out(layer).clone() for layer in range(lens.n_layers)]
    patch = qv.edit(lens, reference.requests, reference.editor(), statistics=statistics, templates=reference.templates)
    assert all(torch.equal(lens.w_out(layer), w) for layer, w in enumerate(before))
    for layer in reference.layers:
        assert relative(patch.deltas[layer, "W_out"].dense(), reference.delta(layer)) < 5e-3


def test_fine_tuning(lens):
    """FT of W_out and b_out for 25 steps of Adam in float32: every loss to 2e-3, the deltas to 1e-3 of their norm."""
    reference = Reference("ft")
    h = reference.h
    patch = qv.edit(lens, reference.requests, qv.FT(layer=h["layers"][0], steps=h["num_steps"], lr=h["lr"]))
    assert [step[0] for step in patch.info["losses"][0]] == pytest.approx(reference.record["batch_losses"], abs=2e-3)
    name = "delta_fp32.transformer.h.1.mlp.fc_out"
    assert relative(patch.deltas[1, "W_out"].dense(), reference.tensors[f"{name}.weight"].T) < 1e-3
    assert relative(patch.deltas[1, "b_out"].dense(), reference.tensors[f"{name}.bias"]) < 1e-3


def test_statistics_from_the_corpus(lens):
    """C0 over all 600 texts against a loop with Hugging Face alone; the reference's 500 are a subset."""
    texts = json.loads((ORACLE / "corpus.json").read_text())[:40]
    got = covariance(lens, texts, [1, 2])
    kept = []
    handle = lens.hf.transformer.h[2].mlp.fc_out.register_forward_pre_hook(lambda _, args: kept.append(args[0][0].double()))
    for text in texts:
        lens.hf(torch.tensor([lens.tokenizer(text)["input_ids"][:128]]))  # the model's context
    handle.remove()
    keys = torch.cat(kept)
    assert got.tokens == len(keys)
    assert relative(got.C0[2], keys.T @ keys / len(keys)) < 1e-5
