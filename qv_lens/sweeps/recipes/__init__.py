"""Recipes by name: one module each, with a `RECIPE`."""

RECIPES = {"ablation": "qv_lens.sweeps.recipes.ablation:RECIPE"}
