"""The hooked model: backends, the Lens, and what can be loaded."""
