"""What is asked of the hooked classes themselves."""

from __future__ import annotations

import torch

import qv_lens as qv
from tests.models import PROMPTS, tiny_lens

FACT = qv.Fact("{} works for", "Olga Pelodan", "Nortek")


def test_a_bridge_is_asked_for_its_hook_points_once(monkeypatch):
    """It makes its table anew whenever it is asked, which takes longer than many a pass."""
    lens = tiny_lens("qwen3-gqa", "bridge", torch.float32)
    kind, asked = type(lens.model), []
    table = kind.hook_dict.fget
    monkeypatch.setattr(kind, "hook_dict", property(lambda model: asked.append(1) or table(model)))
    qv.neuron_effects(lens, FACT, method="relp")
    lens.generate(PROMPTS, 2)
    assert len(asked) <= 1
