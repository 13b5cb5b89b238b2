"""Settings of the editors for a user's model."""
