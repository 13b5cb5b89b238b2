"""LoRA through its class, against the same trained on Hugging Face alone, and against PEFT's
start."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

import qv_lens as qv
from tests.attribution.test_gradients import hf_name
from tests.editing.test_closed_form import REQUESTS
from tests.editing.test_trained_by_hand import adam, over_tokens, stored
from tests.models import tiny_hf, tiny_lens


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_lora_starts_as_pefts_and_trains_its_factors(kind):
    """W + alpha/rank A B: A uniform within 1/sqrt(inputs), B zero; alpha, rank, layers, weights,
    lr, stop as asked for."""
    editor = qv.LoRA(
        layers=(0, 2), parameters=("W_out",), rank=3, alpha=7.0, dropout=0.0, steps=5, lr=1e-2
    )
    patch = qv.edit(tiny_lens(kind, dtype=torch.float32), REQUESTS, editor, seed=4)
    hf, generator = tiny_hf(kind, torch.float32), torch.Generator().manual_seed(4)
    factors = {}
    for layer in (0, 2):
        name = hf_name(kind, layer, "W_out")
        out, inputs = dict(hf.named_parameters())[name].shape
        A = (2 * torch.rand(inputs, 3, generator=generator) - 1) / sqrt(inputs)
        factors[name] = (A.requires_grad_(True), torch.zeros(3, out, requires_grad=True))

    def moved():
        return {name: (7.0 / 3 * A @ B).T for name, (A, B) in factors.items()}

    def loss():
        now = moved()
        return over_tokens(hf, now, REQUESTS)

    losses = adam([leaf for pair in factors.values() for leaf in pair], loss, 5, 1e-2, 0.0)
    assert [step[0] for step in patch.info["losses"][0]] == pytest.approx(losses, rel=1e-5)
    assert set(patch.deltas) == {(0, "W_out"), (2, "W_out")}
    for layer in (0, 2):
        torch.testing.assert_close(
            stored(kind, patch, (layer, "W_out")).float(),
            moved()[hf_name(kind, layer, "W_out")].detach(),
            atol=1e-5,
            rtol=1e-3,
        )


def test_loras_start_is_pefts_own():
    """The same spread as PEFT gives its A: uniform, standard deviation 1/sqrt(3 inputs)."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra lora)")
    config = peft.LoraConfig(r=64, target_modules=["transformer.h.1.mlp.fc_out"])
    module = (
        peft.get_peft_model(tiny_hf("gptj", torch.float32), config)
        .base_model.model.transformer.h[1]
        .mlp.fc_out
    )
    theirs = module.lora_A["default"].weight
    editor = qv.LoRA(layers=(1,), parameters=("W_out",), rank=64, steps=1, dropout=0.0)
    ours = qv.edit(tiny_lens("gptj", dtype=torch.float32), REQUESTS[0], editor).deltas[
        1, "W_out"
    ].left / (editor.alpha / 64)
    assert ours.abs().max() <= theirs.abs().max() * 1.01
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.03)


def test_loras_dropout_drops_its_share():
    """Of what the adapters read; the others are scaled up, the mean stays."""
    editor = qv.LoRA(layers=(1,), parameters=("W_out",), rank=2, steps=1, dropout=0.25)
    add = editor._added(torch.Generator().manual_seed(0), torch.eye(2), torch.eye(2), 1.0)
    out = add(torch.ones(1, 4000, 2))
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert float((out == 0).double().mean()) == pytest.approx(0.25, abs=0.02)
