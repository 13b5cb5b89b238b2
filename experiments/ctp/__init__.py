"""CTP's tables and figures."""
