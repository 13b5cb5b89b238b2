"""CTP's tables and figures."""

#: efficacy, generality, locality and their mean
METRICS = ["edit_success", "generality", "ctp_locality", "ctp_score"]
#: one batch of 100 facts
ONE_BATCH = {"protocol": "batch", "count": 100, "batch_size": 100, "metrics": METRICS}
