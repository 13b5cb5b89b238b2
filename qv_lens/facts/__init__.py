"""Facts in words: records, where text becomes tokens, prompts, the atlas, readers of benchmarks."""
