"""Which neurons hold a fact (value), which activate them (query), and in which layers."""
