"""Metrics, multi-hop accuracy and the protocol that edits, probes and puts back."""
