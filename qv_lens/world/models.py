"""Which models know the bundled world."""

from __future__ import annotations

from qv_lens.errors import ConfigError
from qv_lens.models.lens import Lens
from qv_lens.models.zoo import BUNDLED, WEIGHTS


def of_world(lens: Lens) -> bool:
    """Whether a model was trained on the bundled world: bundled, or saved from one that is (they
    share the vocabulary)."""
    from transformers import AutoTokenizer

    return (
        lens.name in BUNDLED
        or lens.tokenizer.get_vocab()
        == AutoTokenizer.from_pretrained(WEIGHTS / BUNDLED[0]).get_vocab()
    )


def check_world(lens: Lens) -> None:
    """Refuse a model that was not trained on the bundled world, before it is asked about that
    world. Raises `ConfigError`."""
    if not of_world(lens):
        raise ConfigError(
            f"{lens.name} was not trained on the bundled world, which is what is used where nothing "
            "else is named. Name facts= (prompts by category) or data= (edits), in MQuAKE's, "
            "CounterFact's or another format of qv_lens.facts.benchmarks, and for edits text= (a "
            "corpus for C0)."
        )
