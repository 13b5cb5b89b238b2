"""Results as pages: a study as one self-contained HTML file."""
