"""Weight edits: statistics, keys, target vectors, the closed form, and the editors made of them."""
