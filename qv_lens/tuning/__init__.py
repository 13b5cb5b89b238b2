"""Settings of the editors for a model of one's own."""
