"""Frames -> plotly figures. Nothing here computes or shows anything.

attribution   layers, tokens, heads, neurons, the Q-V graph, what the model loses
editing       metrics before and after, editors, edits in a row
papers        the papers' tables, scripted sweeps
output        `paper` styles a figure for print, `save` writes it as a page or a picture
parts         colours, axes and the checks that all of them share"""

from __future__ import annotations

from qv_lens.plots.attribution import (
    counts,
    head_heatmap,
    layer_heatmap,
    layer_lines,
    layer_profile,
    neuron_table,
    pathway,
    removal_curve,
    token_heatmap,
    vocabulary_table,
)
from qv_lens.plots.editing import (
    before_after,
    lasting,
    method_bars,
    method_dots,
    metric_bars,
    seconds_bars,
)
from qv_lens.plots.output import paper, save
from qv_lens.plots.papers import category_heatmap, node_lines, set_bars, sweep_heatmap, token_bars

__all__ = [
    "before_after",
    "category_heatmap",
    "counts",
    "head_heatmap",
    "lasting",
    "layer_heatmap",
    "layer_lines",
    "layer_profile",
    "method_bars",
    "method_dots",
    "metric_bars",
    "neuron_table",
    "node_lines",
    "paper",
    "pathway",
    "removal_curve",
    "save",
    "seconds_bars",
    "set_bars",
    "sweep_heatmap",
    "token_bars",
    "token_heatmap",
    "vocabulary_table",
]
