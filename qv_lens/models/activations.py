"""The FFN's non-linearities, by TransformerLens's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

_gelu_tanh = partial(torch.nn.functional.gelu, approximate="tanh")

#: the FFN's non-linearity by TransformerLens's name
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({
    "silu": torch.nn.functional.silu, "swish": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.relu,
    "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "gelu_fast": _gelu_tanh,
})  # fmt: skip
