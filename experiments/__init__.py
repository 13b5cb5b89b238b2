"""The tables and figures of ACE, KNE and CTP, a file each, and the sweeps of this project."""
