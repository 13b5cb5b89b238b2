"""ACE's tables and figures."""

#: what the official release does otherwise than the paper says
RELEASED = (
    "value layers 23 to 25 are edited there (the paper: 26 to 28), and attention is written, which "
    "the paper denies"
)
NO_CODE = "the official release holds no code for this"
#: the editors that ACE is compared with
RIVALS = ("FT", "ROME", "MEMIT", "PMET")
#: beside a claim by the paper's score: the same by what the model loses
BY_EFFECT = "by the effect on log p (ours)"
