"""Facts that are searched together, as many as memory has room for, are found as each alone."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import qv_lens as qv
from qv_lens.editing import targets
from qv_lens.editing.keys import rows_of
from qv_lens.facts.records import EditRequest
from tests.models import tiny_lens

REQUESTS = [
    qv.Fact("{} is the capital of", "Paris", "France").to("Italy"),
    qv.Fact("{} plays the sport of", "Shaquille O'Neal", "basketball").to("long-distance running"),
    qv.Fact("The mother tongue of {} is", "Danielle Darrieux", "French").to("English"),
]
TEMPLATES = ("{}", "The day is long. {}", "I. {}")
SEARCH = targets.Search(("blocks.1.hook_resid_post",), 6, 0.3, 0.5, 0.75, 0.0625)


def searched(lens, requests: list[EditRequest]) -> targets.Targets:
    rows = rows_of(lens, requests, TEMPLATES, "subject_last")
    return targets.search(lens, requests, rows, "subject_last", SEARCH)


def test_rows_of_some_requests_are_those_that_they_alone_have():
    lens = tiny_lens("gptj", n_layers=4)
    every = rows_of(lens, REQUESTS, TEMPLATES, "subject_last")
    for begin, end in ((0, 1), (1, 3), (2, 3), (0, 3)):
        alone = rows_of(lens, REQUESTS[begin:end], TEMPLATES, "subject_last")
        some = every.of(range(begin, end))
        for each in fields(alone):
            one, other = getattr(some, each.name), getattr(alone, each.name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("room", [0, 10**12])
def test_a_search_in_parts_finds_what_one_search_finds(room, monkeypatch):
    """Without room every fact is searched alone: the same z* and losses."""
    lens = tiny_lens("gptj", n_layers=4)
    parts = []
    whole = targets._Problem.run
    monkeypatch.setattr(targets, "ROOM", room)
    monkeypatch.setattr(targets._Problem, "run", lambda self: parts.append(self.n) or whole(self))
    found = searched(lens, REQUESTS)
    assert parts == ([1, 1, 1] if room == 0 else [3])
    for i, request in enumerate(REQUESTS):
        alone = searched(lens, [request])
        assert torch.allclose(found.z[i], alone.z[0], atol=1e-5)
        for together, by_itself in zip(found.losses, alone.losses, strict=False):
            assert together[i] == pytest.approx(by_itself[0], abs=1e-5)


def test_the_room_is_about_what_the_backward_pass_keeps(monkeypatch):
    """The bytes that autograd saves in one forward pass, each storage once, against the room below
    which a fact more would be left out."""
    lens = tiny_lens("qwen3-gqa", n_layers=4)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows = rows_of(lens, REQUESTS, TEMPLATES, "subject_last")
    problem = targets._Problem(lens, rows, targets._kl_rows(lens, REQUESTS, "subject_last"), SEARCH)
    weights = {each.untyped_storage().data_ptr() for each in lens.model.parameters()}
    active = torch.ones(3, dtype=torch.bool)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        problem._loss(active, ~active)
    saved = sum(size for place, size in kept.items() if place not in weights)
    low, high = 0, 10**12
    while high - low > 1:  # the least room in which all three are searched together
        middle = (low + high) // 2
        monkeypatch.setattr(targets, "ROOM", middle)
        together = targets._together(lens, rows, SEARCH) == [range(3)]
        low, high = (low, middle) if together else (middle, high)
    assert 0.5 < high / saved < 2
