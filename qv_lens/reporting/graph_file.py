"""A Q-V graph as the attribution-graph JSON that circuit-tracer's and Neuronpedia's viewers read.

1. Nodes: the graph's neurons, one for each token of the prompt (`embedding`), and the answer
   (`logit`). Both viewers draw a neuron as the feature of a transcoder, which is what they call
   nodes between embedding and logits; its number is Cantor's pairing of layer and neuron.
2. Links, in nats of the answer's log p: the graph's edges (of `method='inner_product'` in units of
   m_j), and each value neuron's own score, from it to the answer. The answer is the token that the
   value neurons were scored by, at the token where it is read. A tested edge carries what the
   answer really lost without it (`lost_logprob`).
3. `influence`, by which the viewers prune: of the neurons in order of |score|, the share of all
   |score| up to this one.

Source: circuit-tracer 0.5 (frontend/graph_models.py) and Neuronpedia's graph-schema.json."""

from __future__ import annotations

import json
import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from qv_lens.attribution.edges import Graph
from qv_lens.errors import ConfigError, check_count, check_kind
from qv_lens.files import placed

#: what the viewers show at first: the neurons that hold this share of all |score|
SHOWN = 0.8
#: how many promoted tokens name a neuron
NAMED_BY = 3


def save_graph(graph: Graph, path: str | Path, *, prompt: int = 0) -> Path:
    """Write one prompt of a graph to a JSON file, for the viewers of circuit-tracer and
    Neuronpedia.

    Where the nodes have a column `promoted` (lists of tokens, as `vocabulary` gives), neurons are
    named by it. Raises `ConfigError` for a prompt that the graph does not hold, and if the path
    cannot be written.
    """
    check_kind(graph, Graph, "A graph file is written of what qv.qv_graph or edge_effects gives")
    prompts = graph.nodes.attrs.get("prompts")
    if prompts is None:
        raise ConfigError(
            "These nodes do not say for which prompts they were drawn: a merge or a file drops the "
            "attrs of a frame. Pass the graph of qv_graph or edge_effects, or give its attrs back."
        )
    check_count("prompt", prompt, 0)
    if prompt >= len(prompts):
        raise ConfigError(f"The graph holds prompts 0 to {len(prompts) - 1}, not {prompt}.")
    target = Path(path)
    text = json.dumps(_content(graph, prompt), indent=1, ensure_ascii=False, allow_nan=False)
    with placed(target, "the graph") as file:
        file.write_text(text, encoding="utf-8")
    return target


def _content(graph: Graph, prompt: int) -> dict[str, Any]:
    settings, about = graph.nodes.attrs, graph.nodes.attrs["prompts"][prompt]
    nodes = graph.nodes[graph.nodes["prompt"] == prompt]
    edges = graph.edges[graph.edges["prompt"] == prompt]
    names = {row.id: f"{row.layer}_{row.neuron}_{row.position}" for row in nodes.itertuples()}
    answer = _answer(about, settings["n_layers"])
    return {
        "metadata": {
            "slug": re.sub(r"[^a-z0-9]+", "-", about["text"].lower()).strip("-") or "prompt",
            "scan": settings["model"],
            "transcoder_list": [],
            "prompt_tokens": about["tokens"],
            "prompt": about["text"],
            "node_threshold": SHOWN,
            "schema_version": 1,
            "info": {
                "description": "Query neurons and the value neurons they feed (ACE, Eq. 10).",
                "generator": {"name": "qv_lens", "version": version("qv-lens")},
            },
            "generation_settings": {
                key: value
                for key, value in settings.items()
                if isinstance(value, (str, int, float, bool))
            },
            "pruning_settings": {"node_threshold": SHOWN},
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [*_tokens(about), *_neurons(nodes, names), answer],
        "links": [*_links(edges, names), *_read_out(nodes, names, answer["node_id"])],
    }


def _node(node_id: str, **fields: Any) -> dict[str, Any]:
    """What every node has."""
    common = {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0}
    none = {"influence": None, "activation": None}
    return {"node_id": node_id, **common, **none, **fields}


def _tokens(about: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        _node(
            f"E_{token}_{place}",
            jsNodeId=f"E_{token}-{place}",
            feature=place,
            layer="E",
            ctx_idx=place,
            feature_type="embedding",
            clerp=text,
        )
        for place, (token, text) in enumerate(zip(about["ids"], about["tokens"], strict=True))
    ]


def _answer(about: dict[str, Any], n_layers: int) -> dict[str, Any]:
    token, at, share = about["answer_id"], about["position"], about["probability"]
    layer, text = str(n_layers + 1), f'"{about["answer"]}"'
    if "against" in about:
        text += f' rather than "{about["against"]}"'
    return _node(
        f"{layer}_{token}_{at}",
        jsNodeId=f"L_{token}-{at}",
        feature=token,
        layer=layer,
        ctx_idx=at,
        feature_type="logit",
        clerp=f"Output {text} (p={share:.3f})",
        token_prob=share,
        is_target_logit=True,
    )


def _neurons(nodes: pd.DataFrame, names: dict[str, str]) -> list[dict[str, Any]]:
    size = (
        nodes[["value_score", "query_score"]].abs().max(axis=1).fillna(0.0)
    )  # of one that was given
    ordered = nodes.loc[size.sort_values(ascending=False, kind="stable").index]
    share = size.loc[ordered.index].cumsum() / (size.sum() or 1.0)
    promoted = ordered["promoted"] if "promoted" in ordered else [()] * len(ordered)
    return [
        _node(
            names[node.id],
            jsNodeId=f"{node.layer}_{node.neuron}-0",
            feature=_paired(node.layer, node.neuron),
            layer=str(node.layer),
            ctx_idx=int(node.position),
            feature_type="cross layer transcoder",
            clerp=_named(node.layer, node.neuron, tokens),
            influence=min(1.0, influence),  # a sum of shares may exceed 1 by rounding
            activation=None if math.isnan(node.coefficient) else float(node.coefficient),
        )
        for node, influence, tokens in zip(ordered.itertuples(), share, promoted, strict=True)
    ]


def _named(layer: int, neuron: int, tokens: Any) -> str:
    text = ", ".join(token.strip() or repr(token) for token in list(tokens)[:NAMED_BY])
    return f"L{layer} N{neuron}" + (f": {text}" if text else "")


def _paired(layer: int, neuron: int) -> int:
    """Cantor's pairing: one number for a layer and a neuron."""
    return (layer + neuron) * (layer + neuron + 1) // 2 + neuron


def _links(edges: pd.DataFrame, names: dict[str, str]) -> list[dict[str, Any]]:
    links = []
    for edge in edges.itertuples():
        link = {"source": names[edge.source], "target": names[edge.target], "weight": edge.weight}
        tested = getattr(edge, "lost_logprob", None)
        links.append(link if tested is None else {**link, "lost_logprob": tested})
    return links


def _read_out(nodes: pd.DataFrame, names: dict[str, str], answer: str) -> list[dict[str, Any]]:
    value = nodes[nodes["value_score"].notna()]
    return [
        {"source": names[node.id], "target": answer, "weight": float(node.value_score)}
        for node in value.itertuples()
    ]
