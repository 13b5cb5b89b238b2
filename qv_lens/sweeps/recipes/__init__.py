"""Recipes by name."""

RECIPES = {
    "ablation": "qv_lens.sweeps.recipes.ablation:RECIPE",
    "editors": "qv_lens.sweeps.recipes.editors:RECIPE",
    "layers": "qv_lens.sweeps.recipes.anatomy:LAYERS",
    "tokens": "qv_lens.sweeps.recipes.anatomy:TOKENS",
    "neurons": "qv_lens.sweeps.recipes.anatomy:NEURONS",
    "nodes": "qv_lens.sweeps.recipes.anatomy:NODES",
    "suppression": "qv_lens.sweeps.recipes.causal:SUPPRESSION",
    "interpretable": "qv_lens.sweeps.recipes.causal:INTERPRETABLE",
}
