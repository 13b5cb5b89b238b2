"""Which score says beforehand what a model loses without a neuron (ours)."""
