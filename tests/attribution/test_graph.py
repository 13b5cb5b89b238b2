"""The Q-V graph's edges against Hugging Face's own modules: attention weights replayed, FFN outputs
put in by hand, one neuron's vector left out; and the graph as a file."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn

import qv_lens as qv
from qv_lens.attribution import edges
from qv_lens.attribution.edges import agreement
from tests.models import BACKENDS, KINDS, TINY, lens_and_twin, tiny_lens

FACTS = [
    qv.Fact("{} works for", "Olga Pelodan", "Nortek Dalrin"),
    qv.Fact("The capital of {} is the city of", "Norway", "Oslo"),
]


class Twin:
    """A Hugging Face model in which attention weights, what FFNs add to the stream, and single
    activations can be set."""

    def __init__(self, hf, lens, ids, monkeypatch):
        self.hf, self.ids, self.patch = hf, torch.tensor([ids]), monkeypatch
        names = [lens.backend_adapter.stored_name(i, "W_out") for i in range(lens.n_layers)]
        self.down = [hf.get_submodule(name.removesuffix(".weight")) for name in names]
        self.added = [self._last_of_ffn(name) for name in names]
        self.clean = self.run()

    def _last_of_ffn(self, name):
        block = self.hf.get_submodule(".".join(name.split(".")[:3]))
        after = getattr(block, "post_feedforward_layernorm", None)
        return self.hf.get_submodule(name.removesuffix(".weight")) if after is None else after

    def run(self, patterns=None, added=None, put=None):
        """A pass: `patterns` are replayed, `added` is what FFNs add, `put` (layer, position,
        neuron, value) sets one activation. Returns patterns, what FFNs added, activations,
        log-probabilities."""
        seen = {"patterns": [], "added": {}, "m": {}}
        softmax, replay = nn.functional.softmax, iter(patterns or ())

        def attend(*args, **kwargs):
            out = softmax(*args, **kwargs) if patterns is None else next(replay)
            seen["patterns"].append(out)
            return out

        def write(layer):
            def hook(_module, _inputs, output):
                out = output if added is None else added[layer].reshape(output.shape)
                seen["added"][layer] = out.reshape(len(self.ids[0]), -1).clone()
                return out.clone()  # Falcon adds to it in place

            return hook

        def activate(layer):
            def hook(_module, inputs):
                m = inputs[0].clone()
                if put is not None and put[0] == layer:
                    m.view(len(self.ids[0]), -1)[put[1], put[2]] = put[3]
                seen["m"][layer] = m.reshape(len(self.ids[0]), -1)
                return (m,)

            return hook

        with ExitStack() as stack:
            for layer, (down, last) in enumerate(zip(self.down, self.added, strict=True)):
                stack.callback(down.register_forward_pre_hook(activate(layer)).remove)
                stack.callback(last.register_forward_hook(write(layer)).remove)
            with self.patch.context() as patch:
                patch.setattr(nn.functional, "softmax", attend)
                patch.setattr(torch, "softmax", attend)
                logits = self.hf(self.ids).logits[0, -1]
        return {**seen, "logp": logits.log_softmax(-1)}

    def without(self, layer, position, v, share=1.0):
        """Activations by layer when an FFN writes v less at a position, attention looks where it
        looked and all FFNs write what they wrote."""
        added = {i: wrote.clone() for i, wrote in self.clean["added"].items()}
        added[layer][position] -= share * v
        return self.run(self.clean["patterns"], added)["m"]


def at_every_token(lens, value, each, **options):
    """The best query neurons of each token of each prompt."""
    query = qv.query_neurons(lens, FACTS, value, None, through="attention", **options)
    return query.where(lambda frame: frame.groupby(["prompt", "position"]).cumcount() < each)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TINY)
def test_every_edge_is_what_hugging_face_gives(name, backend, true_float64, monkeypatch):
    lens, twin = lens_and_twin(name, backend)
    value = qv.neuron_effects(lens, FACTS, 12)
    query = at_every_token(lens, value, 2)
    graph = qv.edge_effects(lens, FACTS, qv.qv_graph(lens, FACTS, value, query))
    nodes, edges = (frame.set_index("prompt") for frame in graph)
    nodes.attrs, edges.attrs = {}, {}  # pandas copies them with every row
    assert set(nodes["position"]) > {lens.tokenize(FACTS[0])[0].last}
    for number, fact in enumerate(FACTS):
        prompt, trace = lens.tokenize(fact)[0], lens.trace(fact, "all")
        hf = Twin(twin, lens, prompt.ids, monkeypatch)
        clean, token = hf.clean["m"], lens.answer_ids(fact)[0]
        places = nodes.loc[number].set_index("id")
        for source, some in edges.loc[number].groupby("source"):
            q = places.loc[source]
            weight = lens.backend_adapter.value_vectors(int(q.layer))[int(q.neuron)]
            scale = trace.scale_of("ffn", int(q.layer))
            v = trace.m[q.layer, q.position, q.neuron] * weight
            v = v if scale is None else v * scale[q.position]
            lacks = hf.without(q.layer, q.position, v)
            less, more = (hf.without(q.layer, q.position, v, s) for s in (1e-5, -1e-5))
            for edge in some.itertuples():
                j = places.loc[edge.target]
                at = j.position, j.neuron
                slope = (more[j.layer][at] - less[j.layer][at]).item() / 2e-5
                lost = (clean[j.layer][at] - lacks[j.layer][at]).item()
                assert edge.predicted_m == pytest.approx(slope, rel=1e-4, abs=1e-7)
                assert edge.lost_m == pytest.approx(lost, rel=1e-5, abs=1e-7)
                assert edge.weight == pytest.approx(
                    slope * j.value_score / j.coefficient, rel=1e-4, abs=1e-7
                )
            put = j.layer, j.position, j.neuron, lacks[j.layer][at]
            now = hf.run(put=put)["logp"][token]
            assert edge.lost_logprob == pytest.approx(
                (hf.clean["logp"][token] - now).item(), rel=1e-5, abs=1e-7
            )
    assert (edges["weight"] != 0).all()
    assert edges["lost_m"].abs().max() > 1e-3
    assert edges["lost_logprob"].abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_an_edge_through_the_stream_is_suppress_of_one_for_one(kind, true_float64):
    lens = tiny_lens(kind)
    value = qv.value_neurons(lens, FACTS, 10)
    query = qv.query_neurons(lens, FACTS, value, 6, targets=10)
    graph = qv.edge_effects(lens, FACTS, qv.qv_graph(lens, FACTS, value, query, targets=10))
    places = graph.nodes.set_index(["prompt", "id"])
    clean, before = lens.trace(FACTS).m, lens.logprob(FACTS)
    for edge in graph.edges[::7].itertuples():
        q, j = places.loc[edge.prompt, edge.source], places.loc[edge.prompt, edge.target]
        one, other = (qv.NeuronSet.of([(int(n.layer), int(n.neuron))]) for n in (q, j))
        with lens.intervene(qv.Suppress(one, other, positions="last")):
            now, after = lens.trace(FACTS).m, lens.logprob(FACTS)
        m = clean[j.layer, edge.prompt, j.neuron] - now[j.layer, edge.prompt, j.neuron]
        assert edge.lost_m == pytest.approx(m.item(), rel=1e-8, abs=1e-10)
        lost = before[edge.prompt] - after[edge.prompt]
        assert edge.lost_logprob == pytest.approx(lost, rel=1e-8, abs=1e-10)
    assert set(graph.edges.attrs["agreement"]) == {
        "pearson_m", "spearman_m", "pearson_logprob", "spearman_logprob",
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_edges_through_attention_add_up_to_query_scores(kind, true_float64):
    lens = tiny_lens(kind)
    value = qv.neuron_effects(lens, FACTS, 10)
    query = at_every_token(lens, value, 4, targets=10)
    edges = qv.qv_graph(lens, FACTS, value, query, targets=10).edges
    sums = edges.groupby(["prompt", "source"])["weight"].sum()
    assert query.frame["position"].nunique() > 2
    for row in query.frame.itertuples():
        name = f"f{row.layer}-{row.neuron}@{row.position}"
        assert sums.get((row.prompt, name), 0.0) == pytest.approx(row.score, abs=1e-9)
    layers = qv.query_layers(lens, FACTS, value, targets=10, through="attention")
    every = qv.query_neurons(lens, FACTS, value, None, targets=10, through="attention").frame
    whole = layers[layers["kind"] == "ffn"].set_index(["prompt", "layer"])["score"]
    bias = [lens.backend_adapter.b_out(layer).abs().max() for layer in range(lens.n_layers)]
    if max(bias) == 0:
        summed = every.groupby(["prompt", "layer"])["score"].sum()
        assert (summed - whole).abs().max() < 1e-9


def test_prompts_together_are_what_they_are_alone(true_float64):
    lens = tiny_lens("gptj")
    value = qv.neuron_effects(lens, FACTS, 10)
    together = qv.query_neurons(lens, FACTS, value, 20, through="attention").frame
    for number, fact in enumerate(FACTS):
        own = qv.neuron_effects(lens, fact, 10)
        alone = qv.query_neurons(lens, fact, own, 20, through="attention").frame
        mine = together[together["prompt"] == number].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine.drop(columns="prompt"), alone.drop(columns="prompt"))


def test_the_answer_of_an_edge_may_be_any_token_or_a_contrast():
    lens = tiny_lens("gptj", dtype=torch.float32)
    fact = FACTS[1]
    value = qv.neuron_effects(lens, fact, 5, target=("Oslo", "Paris"))
    graph = qv.qv_graph(lens, fact, value, qv.query_neurons(lens, fact, value, 5))
    oslo, paris = (lens.answer_ids(fact, answer)[0] for answer in ("Oslo", "Paris"))
    losses = [
        qv.edge_effects(lens, fact, graph, target=target).edges["lost_logprob"]
        for target in (oslo, paris, ("Oslo", "Paris"))
    ]
    assert (losses[0] - losses[1] - losses[2]).abs().max() < 1e-5


OTHER_LAYERS = qv.NeuronSet.of([(0, 99999)])
HEADS = qv.NeuronSet.of([(0, 1)], "head")


def bare(graph):
    """A graph whose frames lost their attrs."""
    return edges.Graph(*(pd.DataFrame(frame.to_dict("list")) for frame in graph))


def at_tokens(lens, value):
    return qv.query_neurons(lens, FACTS[0], value, 5, through="attention")


def queries_of_the_other(lens):
    value = qv.value_neurons(lens, FACTS[1], 5)
    return qv.query_neurons(lens, FACTS[1], value, 5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda lens, value, graph: qv.edge_effects(lens, FACTS[1], graph), "drawn for"),
        (lambda lens, value, graph: qv.edge_effects(lens, FACTS[0], graph, target="sequence"), "next token"),
        (lambda lens, value, graph: qv.query_neurons(lens, FACTS[0], value, 5, through="heads"), "through"),
        (lambda lens, value, graph: qv.query_neurons(lens, FACTS[0], value, 5, through="attention", method="share"), "method='grad'"),
        (lambda lens, value, graph: qv.query_neurons(lens, FACTS[0], value, 5, through="attention", over="set"), "over='prompt'"),
        (lambda lens, value, graph: qv.save_graph(graph, "graph.json", prompt=1), "prompts 0 to 0"),
        (lambda lens, value, graph: qv.save_graph(graph, "graph.json", prompt=0.5), "whole number"),
        (lambda lens, value, graph: qv.save_graph(bare(graph), "graph.json"), "do not say for which prompts"),
        (lambda lens, value, graph: qv.query_neurons(lens, FACTS[0], value, 5, targets=1.5), "targets .* whole number"),
        (lambda lens, value, graph: qv.qv_graph(lens, FACTS[0], value, value | OTHER_LAYERS), "has neurons 0 to"),
        (lambda lens, value, graph: qv.qv_graph(lens, FACTS[0], value, HEADS), "ffn"),
        (lambda lens, value, graph: qv.qv_graph(lens, FACTS[0], value, queries_of_the_other(lens)), "query neurons of prompt 0 were computed for 'The capital"),
        (lambda lens, value, graph: qv.qv_graph(lens, FACTS[0], value, qv.query_neurons(lens, FACTS[0], value, 5, method="share")), "found with method='share'"),
        (lambda lens, value, graph: qv.qv_graph(lens, FACTS[0], value, at_tokens(lens, value) | qv.NeuronSet.of([(0, 2)])), "no position"),
        (lambda lens, value, graph: qv.edge_effects(lens, FACTS[:1], graph, target="last"), "Target"),
        (lambda lens, value, graph: lens.trace(FACTS, True), "Position True"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(call, says):
    lens = tiny_lens("gptj")
    value = qv.value_neurons(lens, FACTS[0], 5)
    graph = qv.qv_graph(lens, FACTS[0], value, qv.query_neurons(lens, FACTS[0], value, 5))
    with pytest.raises(qv.QVLensError, match=says):
        call(lens, value, graph)


def test_a_graph_of_neurons_that_were_given_has_a_file(tmp_path):
    """Those without a score have no influence of their own."""
    lens = tiny_lens("gptj")
    value, given = qv.value_neurons(lens, FACTS[0], 5), qv.NeuronSet.of([(0, 1), (1, 2)])
    graph = qv.qv_graph(lens, FACTS[0], value, given)
    file = json.loads(qv.save_graph(graph, tmp_path / "graph.json").read_text())
    told = [node for node in file["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert len(told) == len(graph.nodes)
    assert [node["influence"] for node in told][-3:] == pytest.approx([1.0] * 3)


def test_what_a_file_says_of_a_neuron(tmp_path):
    """Influence adds up in the order of the scores; layer, position and number are the neuron's."""
    lens = tiny_lens("gptj")
    value = qv.neuron_effects(lens, FACTS, 6)
    graph = qv.qv_graph(lens, FACTS, value, qv.query_neurons(lens, FACTS, value, 6))
    file = json.loads(qv.save_graph(graph, tmp_path / "graph.json").read_text())
    nodes = graph.nodes[graph.nodes["prompt"] == 0]
    size = nodes[["value_score", "query_score"]].abs().max(axis=1)
    order = size.sort_values(ascending=False, kind="stable").index
    told = [node for node in file["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert [n["influence"] for n in told] == pytest.approx(
        (size[order].cumsum() / size.sum()).tolist()
    )
    for node, row in zip(told, nodes.loc[order].itertuples(), strict=True):
        total = row.layer + row.neuron
        assert (node["layer"], node["ctx_idx"]) == (str(row.layer), row.position)
        assert node["feature"] == total * (total + 1) // 2 + row.neuron
    (answer,) = [node for node in file["nodes"] if node["feature_type"] == "logit"]
    assert answer["layer"] == str(lens.n_layers + 1)


def test_a_file_says_what_the_graph_says(tmp_path):
    """Every field of every node and link, of the second prompt."""
    lens = tiny_lens("gptj")
    every = qv.neuron_effects(lens, FACTS, None)
    value = every.where(lambda f: (f["score"].abs() > 1e-3) & (f.index % 7 == 0))
    query = qv.query_neurons(lens, FACTS, value, 20, through="attention")
    graph = qv.qv_graph(lens, FACTS, value, query, targets=400)
    named = graph.nodes.assign(promoted=[[" a", "b", " c", "d"]] * len(graph.nodes))
    path = qv.save_graph(edges.Graph(named, graph.edges), tmp_path / "graph.json", prompt=1)
    file = json.loads(path.read_text())
    mine, ties = (frame[frame["prompt"] == 1] for frame in graph)
    assert (mine["value_score"] < 0).any()
    assert (mine["coefficient"] < 0).any()

    prompt = lens.tokenize(FACTS[1])[0]
    token, last = prompt.answer[0], prompt.last
    answer = f"{lens.n_layers + 1}_{token}_{last}"
    by_id = {node["node_id"]: node for node in file["nodes"]}
    names = {node.id: f"{node.layer}_{node.neuron}_{node.position}" for node in mine.itertuples()}
    for node in mine.itertuples():
        told = by_id[names[node.id]]
        assert told["activation"] == node.coefficient
        assert told["clerp"] == f"L{node.layer} N{node.neuron}: a, b, c"
        assert told["jsNodeId"] == f"{node.layer}_{node.neuron}-0"
    links = {(link["source"], link["target"]): link["weight"] for link in file["links"]}
    drawn = {(names[edge.source], names[edge.target]): edge.weight for edge in ties.itertuples()}
    scored = mine[mine["value_score"].notna()].itertuples()
    assert links == {**drawn, **{(names[node.id], answer): node.value_score for node in scored}}
    said = by_id[answer]
    assert said["is_target_logit"]
    assert (said["ctx_idx"], said["jsNodeId"]) == (last, f"L_{token}-{last}")
    assert said["clerp"] == f'Output "{lens.token_label(token)}" (p={said["token_prob"]:.3f})'
    for place, (number, text) in enumerate(zip(prompt.ids, lens.str_tokens(FACTS[1]), strict=True)):
        told = by_id[f"E_{number}_{place}"]
        assert (told["feature"], told["ctx_idx"], told["clerp"]) == (place, place, text)
        assert told["jsNodeId"] == f"E_{number}-{place}"
    about = file["metadata"]
    assert (about["scan"], about["prompt"]) == (lens.name, prompt.text)
    assert about["node_threshold"] == 0.8
    size = mine[["value_score", "query_score"]].abs().max(axis=1)
    share = size.sort_values(ascending=False, kind="stable").cumsum() / size.sum()
    told = [n for n in file["nodes"] if n["feature_type"] == "cross layer transcoder"]
    assert [node["influence"] for node in told] == pytest.approx(share.tolist())


def test_the_answer_of_a_file_is_what_the_value_neurons_were_scored_by(tmp_path):
    """A token, the model's own, one of a contrast; read where the scores were read, and taken for
    the tests of edges."""
    lens = tiny_lens("gptj")
    fact = FACTS[1]
    prompt, (own,) = lens.tokenize(fact)[0], lens.next_token_logits([fact]).argmax(-1).tolist()
    p = lens.next_token_logits([fact])[0].softmax(-1)
    at_subject = lens.trace(fact, "subject_last").logits[0].softmax(-1)
    oslo, other = prompt.answer[0], 7
    contrast = f'"{lens.token_label(other)}" rather than "{lens.token_label(oslo)}"'
    effects, increases = qv.neuron_effects, qv.value_neurons
    for find, asked, options, token, at, share, clerp in (
        (effects, fact, {}, oslo, prompt.last, p, ""),
        (effects, fact, {"target": other}, other, prompt.last, p, ""),
        (effects, fact, {"target": "predicted"}, own, prompt.last, p, ""),
        (effects, fact.text, {}, own, prompt.last, p, ""),
        (effects, fact, {"target": (other, "answer")}, other, prompt.last, p, contrast),
        (effects, fact, {"positions": "subject_last"}, oslo, prompt.last, p, ""),
        (increases, fact, {"positions": "subject_last"}, oslo, prompt.subject[1], at_subject, ""),
    ):
        value = find(lens, asked, 5, **options)
        where = {name: options[name] for name in ("positions",) if name in options}
        graph = qv.qv_graph(
            lens, asked, value, qv.query_neurons(lens, asked, value, 5, **where), **where
        )
        path = qv.save_graph(graph, tmp_path / "graph.json")
        (said,) = [
            node
            for node in json.loads(path.read_text())["nodes"]
            if node["feature_type"] == "logit"
        ]
        assert (said["feature"], said["ctx_idx"]) == (token, at)
        assert said["token_prob"] == pytest.approx(share[token].item(), rel=1e-5)
        assert clerp in said["clerp"]
        target = options.get("target", token)
        tested = qv.edge_effects(lens, asked, graph).edges
        wanted = qv.edge_effects(lens, asked, graph, target=target).edges
        pd.testing.assert_frame_equal(tested, wanted)


def test_the_file_has_every_node_and_link_once(tmp_path):
    """The fields are those of circuit-tracer 0.5 and of Neuronpedia's schema."""
    lens = tiny_lens("gptj")
    value = qv.neuron_effects(lens, FACTS, 10)
    query = qv.query_neurons(lens, FACTS, value, 10, through="attention")
    graph = qv.edge_effects(lens, FACTS, qv.qv_graph(lens, FACTS, value, query))
    file = json.loads(qv.save_graph(graph, tmp_path / "graph.json", prompt=1).read_text())
    prompt = lens.tokenize(FACTS[1])[0]
    assert set(file) == {"metadata", "qParams", "nodes", "links"}
    assert {"slug", "scan", "prompt_tokens", "prompt"} <= set(file["metadata"])
    assert file["metadata"]["prompt_tokens"] == lens.str_tokens(FACTS[1])
    fields = {
        "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str,
        "jsNodeId": str, "clerp": str,
    }  # fmt: skip
    for node in file["nodes"]:
        assert all(isinstance(node[name], kind) for name, kind in fields.items())
    by_id = {node["node_id"]: node for node in file["nodes"]}
    assert len(by_id) == len(file["nodes"])
    kinds = pd.Series([node["feature_type"] for node in file["nodes"]]).value_counts()
    drawn = graph.nodes[graph.nodes["prompt"] == 1]
    assert kinds.to_dict() == {
        "cross layer transcoder": len(drawn), "embedding": len(prompt.ids), "logit": 1,
    }  # fmt: skip
    (answer,) = [node for node in file["nodes"] if node["feature_type"] == "logit"]
    assert answer["token_prob"] == pytest.approx(2.718281828 ** lens.logprob(FACTS[1]), rel=1e-5)
    assert answer["feature"] == lens.answer_ids(FACTS[1])[0]
    into_answer = {
        link["source"]: link["weight"]
        for link in file["links"]
        if link["target"] == answer["node_id"]
    }
    best = value.frame[value.frame["prompt"] == 1]
    expected = {f"{row.layer}_{row.neuron}_{prompt.last}": row.score for row in best.itertuples()}
    assert into_answer == pytest.approx(expected)
    others = [link for link in file["links"] if link["target"] != answer["node_id"]]
    edges = graph.edges[graph.edges["prompt"] == 1]
    assert sum(link["weight"] for link in others) == pytest.approx(edges["weight"].sum())
    assert [link["lost_logprob"] for link in others] == edges["lost_logprob"].tolist()
    assert all({link["source"], link["target"]} <= set(by_id) for link in file["links"])
    shares = [node["influence"] for node in file["nodes"] if node["influence"] is not None]
    assert max(shares) == pytest.approx(1.0)
    assert min(shares) > 0
    numbers = {(node["layer"], node["feature"]) for node in file["nodes"] if node["activation"]}
    assert (
        len({feature for _, feature in numbers})
        == drawn[["layer", "neuron"]].drop_duplicates().shape[0]
    )


def test_the_file_is_read_by_circuit_tracers_own_reader(tmp_path):
    models = pytest.importorskip(
        "circuit_tracer.frontend.graph_models",
        reason="pip install --no-deps circuit-tracer (it pins other transformers than TransformerLens)",
        exc_type=ImportError,
    )
    lens = tiny_lens("gptj")
    value = qv.neuron_effects(lens, FACTS, 10)
    query = qv.query_neurons(lens, FACTS, value, 10, through="attention")
    graph = qv.edge_effects(lens, FACTS, qv.qv_graph(lens, FACTS, value, query))
    file = json.loads(qv.save_graph(graph, tmp_path / "graph.json", prompt=1).read_text())
    read = models.Model(**file)
    assert len(read.nodes) == len(file["nodes"])
    assert len(read.links) == len(file["links"])
    drawn = graph.nodes[graph.nodes["prompt"] == 1]
    own = [
        models.Node.feature_node(int(row.layer), int(row.position), int(row.neuron))
        for row in drawn.itertuples()
    ]
    found = {node.node_id: node for node in read.nodes}
    for node in own:
        same = found[node.node_id]
        assert (same.feature, same.layer, same.ctx_idx) == (node.feature, node.layer, node.ctx_idx)
        assert same.feature_type == node.feature_type


def test_the_picture_puts_neurons_at_their_tokens_and_says_what_edges_are_worth():
    lens = tiny_lens("gptj")
    value = qv.neuron_effects(lens, FACTS[1], 10)
    query = qv.query_neurons(lens, FACTS[1], value, 10, through="attention")
    graph = qv.edge_effects(lens, FACTS[1], qv.qv_graph(lens, FACTS[1], value, query))
    figure = qv.plots.pathway(graph.nodes, graph.edges)
    assert list(figure.layout.xaxis.ticktext) == lens.str_tokens(FACTS[1])
    assert f"{graph.edges.attrs['agreement']['spearman_logprob']:.2f}" in figure.layout.title.text
    drawn = {
        name: (x, y)
        for trace in figure.data
        if trace.customdata is not None
        for name, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }
    for node in graph.nodes.itertuples():
        assert drawn[node.id][1] == node.layer
        assert node.position <= drawn[node.id][0] < node.position + 1


@pytest.mark.parametrize("through", ["stream", "attention"])
@pytest.mark.parametrize("asked", [FACTS, [fact.text for fact in FACTS]])
def test_a_trace_gives_what_its_facts_give(asked, through):
    """Whatever positions it holds: answers are read at the prompts' ends."""
    lens = tiny_lens("gptj")
    value = qv.neuron_effects(lens, asked, 4)
    query = qv.query_neurons(lens, asked, value, 12, through=through)
    graph = qv.qv_graph(lens, asked, value, query)
    for target in (None, "predicted", (3, "answer")):
        wanted = qv.edge_effects(lens, asked, graph, target=target).edges
        traced = qv.edge_effects(lens, lens.trace(asked, "all"), graph, target=target).edges
        pd.testing.assert_frame_equal(traced, wanted)
        for number, alone in enumerate(asked):  # each prompt's own tokens
            one = value.where(lambda f, n=number: f["prompt"] == n).frame.assign(prompt=0)
            its = query.where(lambda f, n=number: f["prompt"] == n).frame.assign(prompt=0)
            own, found = (qv.NeuronSet(rows, {"through": through}) for rows in (one, its))
            drawn = qv.qv_graph(lens, alone, own, found)
            tested = qv.edge_effects(lens, alone, drawn, target=target).edges
            mine = wanted[wanted["prompt"] == number]["lost_logprob"]
            assert tested["lost_logprob"].tolist() == pytest.approx(mine.tolist(), abs=1e-9)


@pytest.mark.parametrize("through", ["stream", "attention"])
def test_one_of_several_prompts_may_have_no_edge(through):
    lens = tiny_lens("gptj")
    value = qv.value_neurons(lens, FACTS, 200)
    query = qv.query_neurons(lens, FACTS, value, 10, through=through)
    for chosen in (0, 1):
        some = query.where(lambda f, n=chosen: f["prompt"] == n)
        graph = qv.edge_effects(lens, FACTS, qv.qv_graph(lens, FACTS, value, some))
        assert set(graph.edges["prompt"]) == {chosen}
    lowest = value.where(lambda f: (f["prompt"] == 0) | (f["layer"] == 0))
    graph = qv.edge_effects(lens, FACTS, qv.qv_graph(lens, FACTS, lowest, query))
    assert set(graph.edges["prompt"]) == {0}
    nothing = qv.qv_graph(lens, FACTS, lowest.where(lambda f: f["layer"] == 0), query)
    assert not len(nothing.edges)


def test_nodes_hold_the_prompts_own_activations_and_units_once():
    """Of queries summed over the set too, of those made by hand, of any that come twice."""
    lens = tiny_lens("gptj")
    value, trace = qv.value_neurons(lens, FACTS, 6), lens.trace(FACTS)
    over_all = qv.query_neurons(lens, FACTS, value, 6, over="set")
    rows = pd.concat([over_all.frame, over_all.frame, qv.NeuronSet.of([(0, 3)]).frame])
    twice = qv.NeuronSet(rows.reset_index(drop=True), over_all.settings)
    doubled = qv.NeuronSet(pd.concat([value.frame, value.union().frame]), value.settings)
    once, graph = (
        qv.edge_effects(lens, FACTS, qv.qv_graph(lens, FACTS, values, query))
        for values, query in ((value, over_all | qv.NeuronSet.of([(0, 3)])), (doubled, twice))
    )
    assert not graph.nodes.duplicated(["prompt", "id"]).any()
    assert set(zip(once.edges["source"], once.edges["target"], strict=True)) <= set(
        zip(graph.edges["source"], graph.edges["target"], strict=True)
    )
    for node in graph.nodes.itertuples():
        assert node.coefficient == trace.m[node.layer, node.prompt, node.neuron].item()


def test_edges_lie_in_the_order_of_their_sources_and_of_thirty_targets():
    lens = tiny_lens("gptj")
    value = qv.value_neurons(lens, FACTS, 40)
    query = qv.query_neurons(lens, FACTS, value, 10)
    drawn = qv.qv_graph(lens, FACTS, value, query).edges
    assert drawn.groupby("prompt")["source_layer"].is_monotonic_increasing.all()
    pd.testing.assert_frame_equal(
        drawn, qv.qv_graph(lens, FACTS, value, query, targets=30).edges, check_like=True
    )
    assert len(qv.qv_graph(lens, FACTS, value, query, targets=40).edges) > len(drawn)
    with pytest.raises(qv.QVLensError, match="drawn for"):
        qv.edge_effects(lens, FACTS[::-1], qv.qv_graph(lens, FACTS, value, query))


def test_a_value_neuron_that_is_hardly_active_keeps_its_weight(true_float64):
    lens = tiny_lens("gptj")
    every = qv.neuron_effects(lens, FACTS[0], None)
    small = every.where(lambda f: f["coefficient"].abs().between(1e-5, 5e-3) & (f["layer"] == 2))
    graph = qv.qv_graph(lens, FACTS[0], small, qv.query_neurons(lens, FACTS[0], every, 10))
    assert len(small)
    assert (graph.edges["weight"] != 0).all()


def test_a_graph_without_edges_says_so():
    """Of value neurons in the first layer nothing lies below."""
    lens = tiny_lens("gptj")
    fact = FACTS[0]
    value = qv.value_neurons(lens, fact, None, method="exact").where(lambda f: f["layer"] == 0)
    query = qv.query_neurons(lens, fact, qv.value_neurons(lens, fact, 10), 10)
    graph = qv.edge_effects(lens, fact, qv.qv_graph(lens, fact, value.top(5), query))
    assert not len(graph.edges)
    assert graph.edges.attrs["tested"].startswith("No edge leads")


def test_agreement_is_the_mean_of_the_prompts_correlations():
    g = torch.Generator().manual_seed(0)
    columns = ("weight", "predicted_m", "lost_m", "lost_logprob")
    tested = pd.DataFrame(torch.randn(14, 4, generator=g).double().numpy(), columns=list(columns))
    tested["prompt"] = [0] * 5 + [1] * 5 + [2] * 4
    found = agreement(tested)
    for name, one, other in (
        ("m", "predicted_m", "lost_m"),
        ("logprob", "weight", "lost_logprob"),
    ):
        parts = [(rows[one], rows[other]) for _, rows in tested.groupby("prompt")]
        for method, of in (("pearson", pearsonr), ("spearman", spearmanr)):
            wanted = sum(of(*pair).statistic for pair in parts) / len(parts)
            assert found[f"{method}_{name}"] == pytest.approx(wanted)


def test_what_the_words_say_of_the_correlations():
    found = pd.Series(
        {"pearson_m": 0.1, "spearman_m": 0.2, "pearson_logprob": 0.3, "spearman_logprob": 0.4}
    )
    told = edges._in_words(9, found)
    assert told.startswith("Each of the 9 edges was taken out")
    assert "rho 0.20" in told
    assert "with 0.40" in told
    assert "too few" in edges._in_words(1, found.replace(0.2, float("nan")))


@pytest.mark.parametrize("method", ["grad", "share", "inner_product"])
def test_what_a_value_neuron_would_hear_less(method, true_float64):
    """v_q . subkey to the letter; else the weight, freed of what the value neuron is worth."""
    lens = tiny_lens("gptj")
    value = qv.value_neurons(lens, FACTS, 4)
    query = qv.query_neurons(lens, FACTS, value, 6, method=method)
    drawn = qv.qv_graph(lens, FACTS, value, query, method=method)
    tested = qv.edge_effects(lens, FACTS, drawn).edges
    rows = value.frame.set_index(["prompt", "layer", "neuron"])
    for edge in tested.itertuples():
        nodes = drawn.nodes[drawn.nodes["prompt"] == edge.prompt].set_index("id")
        target = rows.loc[(edge.prompt, *nodes.loc[edge.target, ["layer", "neuron"]])]
        wanted = edge.weight
        if method != "inner_product":
            wanted = edge.weight * target["coefficient"] / target["score"]
        assert edge.predicted_m == pytest.approx(wanted, rel=1e-6)


def test_query_neurons_asked_a_few_at_a_time_are_what_they_are_together(monkeypatch, true_float64):
    lens = tiny_lens("gptj")
    value = qv.value_neurons(lens, FACTS, 4)
    query = qv.query_neurons(lens, FACTS, value, 10, through="attention")
    drawn = qv.qv_graph(lens, FACTS, value, query)
    whole = qv.edge_effects(lens, FACTS, drawn).edges
    monkeypatch.setattr(edges, "TOGETHER", 3)
    split = qv.edge_effects(lens, FACTS, drawn).edges
    assert whole["lost_m"].abs().max() > 1e-3
    pd.testing.assert_frame_equal(split, whole)
