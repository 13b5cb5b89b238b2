"""KNE's tables and figures."""

#: what all of them measure
METRICS = ["edit_success", "portability", "locality", "fluency"]
