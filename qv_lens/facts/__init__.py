"""Facts in words: records, token positions, prompts, the bundled world, benchmark readers."""
