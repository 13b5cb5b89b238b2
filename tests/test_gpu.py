"""On a CUDA GPU every verb gives what it gives on the CPU, and every edit does what it does there.

Skipped where torch sees no GPU."""

from __future__ import annotations

import pytest
import torch

import qv_lens as qv
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from tests.attribution.test_value import FACTS
from tests.editing.test_closed_form import REQUESTS, TEXTS
from tests.editing.test_methods import EVERY, named
from tests.models import BACKENDS, tiny_lens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
KINDS = ("gptj", "qwen3-gqa")


def both(kind: str, backend: str = "auto") -> list[qv.Lens]:
    """The same small model twice: on the CPU and on the GPU."""
    return [tiny_lens(kind, backend, torch.float32, device) for device in ("cpu", "cuda")]


def best(lens: qv.Lens) -> qv.NeuronSet:
    """Each fact's best value neurons."""
    return qv.value_neurons(lens, FACTS, 5)


VERBS = {
    "value exact": lambda lens: qv.value_neurons(lens, FACTS, None, method="exact").frame,
    "value full": lambda lens: qv.value_neurons(lens, FACTS, None, norm="full").frame,
    "value moments": lambda lens: qv.value_neurons(lens, FACTS, None, method="moments").frame,
    "value topk": lambda lens: qv.value_neurons(lens, FACTS, 5, method="topk").frame,
    "value first order": lambda lens: (
        qv.value_neurons(lens, FACTS, None, method="first_order").frame
    ),
    "value heads": lambda lens: qv.value_neurons(lens, FACTS, None, unit="head").frame,
    "value positions": lambda lens: qv.value_neurons(lens, FACTS, None, unit="head_position").frame,
    "value attention": lambda lens: qv.value_neurons(lens, FACTS, None, unit="attn_neuron").frame,
    "query": lambda lens: qv.query_neurons(lens, FACTS, best(lens), None).frame,
    "query inner": lambda lens: (
        qv.query_neurons(lens, FACTS, best(lens), None, method="inner_product").frame
    ),
    "gradient": lambda lens: qv.neuron_effects(lens, FACTS, None).frame,
    "relp": lambda lens: qv.neuron_effects(lens, FACTS, None, method="relp").frame,
    "rounds": lambda lens: qv.neuron_effects(lens, FACTS, 4, rounds=2).frame,
    "effects of heads": lambda lens: qv.neuron_effects(lens, FACTS, None, unit="head").frame,
    "integrated": lambda lens: qv.integrated_gradients(lens, FACTS, None, steps=4).frame,
    "ensemble": lambda lens: qv.neuron_ensemble(lens, FACTS, 1.0, steps=4).frame,
    "layers": lambda lens: qv.layer_scores(lens, FACTS),
    "layer vectors": lambda lens: qv.layer_scores(lens, FACTS, "attn", "layer_vector"),
    "edges": lambda lens: (
        qv.qv_graph(lens, FACTS, best(lens), qv.query_neurons(lens, FACTS, best(lens), 5)).edges
    ),
    "paths": lambda lens: qv.transmission_paths(lens, FACTS),
    "vocabulary": lambda lens: qv.vocabulary(lens, qv.NeuronSet.of([(0, 1), (1, 2)])),
    "curve": lambda lens: qv.faithfulness(
        lens, FACTS, {"gradient": qv.neuron_effects(lens, FACTS, None)}, (1, 3)
    ),
}


def numbers(frame) -> torch.Tensor:
    """The numeric columns of a frame, rows in a fixed order."""
    places = [
        name
        for name in ("prompt", "layer", "neuron", "head", "position", "token", "ranking", "k")
        if name in frame
    ]
    frame = frame.sort_values(places, kind="stable") if places else frame
    return torch.tensor(frame.select_dtypes("float").to_numpy(), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_gives_what_it_gives_on_the_cpu(kind, verb):
    cpu, gpu = (numbers(VERBS[verb](lens)) for lens in both(kind))
    assert cpu.shape == gpu.shape
    largest = float(cpu.nan_to_num().abs().max())
    torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-5 * largest, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_interventions_do_what_they_do_on_the_cpu(kind):
    found = []
    for lens in both(kind):
        value = best(lens)
        neurons = value.union()
        said = [lens.logprob(FACTS)]
        for change in (
            qv.Zero(neurons),
            qv.Replace(neurons, 0.5),
            qv.Scale(neurons, 2.0),
            qv.Suppress(qv.query_neurons(lens, FACTS, value, 5).union(), neurons),
        ):
            with lens.intervene(change):
                said.append(lens.logprob(FACTS))
        found.append(torch.tensor(said))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("editor", EVERY, ids=named)
@pytest.mark.filterwarnings("ignore:Value layers")
def test_every_edit_does_what_it_does_on_the_cpu(editor, backend):
    written = []
    for lens in both("gptj", backend):
        statistics = qv.covariance(lens, TEXTS[:100], range(3), modules=("ffn", "attn"))
        state = {key: value.clone() for key, value in lens.checkpoint.state.items()}
        patch = qv.edit(lens, REQUESTS, editor, statistics=statistics)
        with lens.patched(patch):
            after = lens.logprob([request.target for request in REQUESTS])
        assert all(torch.equal(value, state[key]) for key, value in lens.checkpoint.state.items())
        written.append((patch, torch.tensor(after)))
    (mine, said), (theirs, there) = written
    assert list(mine.deltas) == list(theirs.deltas)
    torch.testing.assert_close(there, said, rtol=0.05, atol=0.05)


def test_cases_are_judged_alike():
    found = []
    for device in ("cpu", "cuda"):
        lens = qv.load("toy-gptj", device=device)
        cases = world_cases.edit_cases(generator.build(0), 3)
        statistics = qv.covariance(lens, TEXTS, range(3))
        editor = qv.MEMIT(layers=(1,), lam=1.0, steps=8)
        frame = qv.evaluate(lens, cases, editor=editor, statistics=statistics)
        found.append(frame[[name for name in frame if name.startswith(("efficacy", "paraphrase"))]])
    torch.testing.assert_close(
        numbers(found[1]), numbers(found[0]), rtol=0.05, atol=0.05, equal_nan=True
    )
