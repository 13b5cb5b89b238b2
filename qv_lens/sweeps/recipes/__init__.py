"""Recipes by name: one module each, with a `RECIPE`."""

RECIPES = {
    "ablation": "qv_lens.sweeps.recipes.ablation:RECIPE",
    "editors": "qv_lens.sweeps.recipes.editors:RECIPE",
}
