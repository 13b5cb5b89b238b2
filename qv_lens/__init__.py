"""qv_lens: where a language model keeps a fact, and how to change it.

    import qv_lens as qv
    lens = qv.load("toy-gptj")

Public names are loaded when first used; importing the package imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from qv_lens.editing.editors import HOMES

__version__ = "0.1.0"

_HOME = {
    "Fact": "facts.records",
    "EditRequest": "facts.records",
    "MultiHopCase": "facts.records",
    "EditCase": "facts.records",
    "atlas": "facts.atlas",
    "NeuronSet": "neurons",
    "Trace": "trace",
    "Zero": "models.interventions",
    "Scale": "models.interventions",
    "Replace": "models.interventions",
    "Suppress": "models.interventions",
    "MeanOver": "models.baselines",
    "Patch": "patch",
    "Lens": "models.lens",
    "load": "models.zoo",
    "value_neurons": "attribution.value",
    "neuron_effects": "attribution.effects",
    "layer_scores": "attribution.layers",
    "query_neurons": "attribution.query",
    "query_layers": "attribution.query",
    "qv_graph": "attribution.edges",
    "edge_effects": "attribution.edges",
    "vocabulary": "attribution.projection",
    "interpretable": "attribution.projection",
    "neuron_ensemble": "attribution.ensembles",
    "integrated_gradients": "attribution.knowledge_neurons",
    "transmission_paths": "attribution.paths",
    "ace_official": "attribution.as_released",
    "locate": "attribution.locate",
    "covariance": "editing.statistics",
    "corpus_statistics": "editing.kept_statistics",
    "Statistics": "editing.statistics",
    "presets": "editing.presets",
    "edit": "editing.edit",
    "norm_anchor": "editing.anchor",
    **HOMES,
    "read": "facts.benchmarks",
    "evaluate": "evaluation.protocols",
    "summary": "evaluation.summary",
    "known": "evaluation.known_cases",
    "faithfulness": "evaluation.faithfulness",
    "study": "case_study",
    "Study": "case_study",
    "report": "reporting.page",
    "save_graph": "reporting.graph_file",
    "load_run": "runs.rows",
    "compare_runs": "runs.comparing",
    "QVLensError": "errors",
}

#: names that their home knows by another: there `known` asks for whole cases
_THERE = {"known": "known_facts"}

# the same names for type checkers and editors; tests/test_names.py keeps the two lists together
if TYPE_CHECKING:
    from qv_lens import plots
    from qv_lens.attribution.as_released import ace_official
    from qv_lens.attribution.edges import edge_effects, qv_graph
    from qv_lens.attribution.effects import neuron_effects
    from qv_lens.attribution.ensembles import neuron_ensemble
    from qv_lens.attribution.knowledge_neurons import integrated_gradients
    from qv_lens.attribution.layers import layer_scores
    from qv_lens.attribution.locate import locate
    from qv_lens.attribution.paths import transmission_paths
    from qv_lens.attribution.projection import interpretable, vocabulary
    from qv_lens.attribution.query import query_layers, query_neurons
    from qv_lens.attribution.value import value_neurons
    from qv_lens.case_study import Study, study
    from qv_lens.editing.anchor import norm_anchor
    from qv_lens.editing.edit import edit
    from qv_lens.editing.editors import *
    from qv_lens.editing.kept_statistics import corpus_statistics
    from qv_lens.editing.presets import presets
    from qv_lens.editing.statistics import Statistics, covariance
    from qv_lens.errors import QVLensError
    from qv_lens.evaluation.faithfulness import faithfulness
    from qv_lens.evaluation.known_cases import known_facts as known
    from qv_lens.evaluation.protocols import evaluate
    from qv_lens.evaluation.summary import summary
    from qv_lens.facts.atlas import atlas
    from qv_lens.facts.benchmarks import read
    from qv_lens.facts.records import EditCase, EditRequest, Fact, MultiHopCase
    from qv_lens.models.baselines import MeanOver
    from qv_lens.models.interventions import Replace, Scale, Suppress, Zero
    from qv_lens.models.lens import Lens
    from qv_lens.models.zoo import load
    from qv_lens.neurons import NeuronSet
    from qv_lens.patch import Patch
    from qv_lens.reporting.graph_file import save_graph
    from qv_lens.reporting.page import report
    from qv_lens.runs.comparing import compare_runs
    from qv_lens.runs.rows import load_run
    from qv_lens.trace import Trace

__all__ = [*_HOME, "plots"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name == "plots":
        return import_module("qv_lens.plots")
    if name in _HOME:
        return getattr(import_module(f"qv_lens.{_HOME[name]}"), _THERE.get(name, name))
    raise AttributeError(f"module 'qv_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
