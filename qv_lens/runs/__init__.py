"""Runs that survive: a TOML file becomes tasks, tasks become rows, rows become files that are whole
or absent."""
