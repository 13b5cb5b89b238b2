"""The tables and figures of ACE, KNE and CTP, a file each, and the questions of this project."""
