"""KNE's tables and figures."""
