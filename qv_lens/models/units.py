"""Neurons of a model: drawn at random, and whether a set was found on it."""

from __future__ import annotations

import random
import warnings

from qv_lens.models.lens import Lens
from qv_lens.neurons import NeuronSet


def random_neurons(lens: Lens, count: int, rng: random.Random) -> NeuronSet:
    """`count` of a model's FFN neurons at random, without scores, in the order in which `rng` draws
    them."""
    places = rng.sample(range(lens.n_layers * lens.d_mlp), count)
    return NeuronSet.of([divmod(place, lens.d_mlp) for place in places])


def warn_of_others(lens: Lens, neurons: NeuronSet) -> None:
    """Warn if a set was found on weights other than those that this lens wraps."""
    found_on = neurons.settings.get("fingerprint", lens.fingerprint)
    if found_on not in (lens.fingerprint, "patched"):  # found under a patch: which one is not known
        warnings.warn(
            f"These neurons were found on {neurons.settings.get('model', 'another model')} "
            f"({found_on}), this is {lens.name} ({lens.fingerprint}).",
            stacklevel=4,
        )
