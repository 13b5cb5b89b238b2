"""ACE's tables and figures."""

from qv_lens.models.architectures import Sublayer
from qv_lens.models.lens import Lens

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


def sums_to_nothing(lens: Lens, kind: Sublayer) -> bool:
    """Whether the effects of a sublayer's units add up to zero whatever they are: behind them stands
    a norm (Gemma 3), of which a longer input has the same output (Euler's theorem)."""
    return lens.backend_adapter.norm_after(0, kind) is not None
