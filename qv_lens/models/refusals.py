"""Models, and modes of PyTorch, in which no number here would be right: what is wrong, and what to
do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from qv_lens.errors import ConfigError, ModelError
from qv_lens.models.activations import ACTIVATIONS


def _set(name: str) -> Callable[[Any], bool]:
    return lambda cfg: bool(getattr(cfg, name, None))


#: kinds of a user's own hooked model for which no number here would be right: a test of the model's
#: config, and the reason
UNREADABLE: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        _set("attn_only"),
        "it has no FFN (attn_only), whose neurons are what is attributed and edited",
    ),
    (
        lambda cfg: cfg.normalization_type not in ("LN", "RMS"),
        "its norms are neither LayerNorm nor RMSNorm (normalization_type)",
    ),
    (
        _set("use_normalization_before_and_after"),
        (
            "a norm follows its FFN (use_normalization_before_and_after), so that a neuron does not "
            "add m * W_out to the stream"
        ),
    ),
    (
        lambda cfg: getattr(cfg, "final_rms", False) and cfg.normalization_type == "LN",
        "its final norm is of another kind than the others (final_rms)",
    ),
    (
        _set("num_experts"),
        "it is a mixture of experts: which neurons run depends on the router",
    ),
    (
        lambda cfg: getattr(cfg, "attention_dir", "causal") != "causal",
        (
            "its attention looks ahead (attention_dir), so that padding and later tokens would "
            "change every number"
        ),
    ),
    (
        lambda cfg: getattr(cfg, "positional_embedding_type", "") == "shortformer",
        "attention reads positions apart from the stream (shortformer)",
    ),
    (
        lambda cfg: str(cfg.act_fn) not in ACTIVATIONS,
        "its FFN's activation (act_fn) is none of those known here",
    ),
)


def check_plain(model: Any, hf: Any) -> None:
    """Raise `ModelError` for a model whose weights are not all that it computes with, or cannot be
    written to and differentiated by."""
    parts = list(model.modules())
    check_as_written(parts, hf)
    if any(type(part).__module__.split(".")[0] == "peft" for part in parts):
        raise ModelError(
            "This model has adapters beside its weights (PEFT), which no value vector, patch or "
            "saved checkpoint would hold: merge them first (PeftModel.merge_and_unload())."
        )
    if any(weight.is_inference() for weight in model.parameters()):
        raise ModelError(
            "This model was loaded under torch.inference_mode(), so that nothing can be "
            "differentiated by its weights: load it outside of that block."
        )


def check_as_written(parts: Iterable[torch.nn.Module], hf: Any) -> None:
    """Raise `ModelError` for a model whose passes are not what weights and hooks say: dropout, a
    compiled module, weights computed anew in every pass."""
    if getattr(hf, "training", False):
        raise ModelError(
            "This model is in training mode, in which dropout changes every pass: call "
            "model.eval() first."
        )
    for part in parts:
        if _compiled(part):
            raise ModelError(
                "This model was compiled (torch.compile), and a compiled pass does not see hooks "
                "that come later, so that interventions would have no effect: load it again, and "
                "leave it as it is."
            )
        if "parametrizations" in part._modules:
            raise ModelError(
                "A weight of this model is computed anew in every pass "
                "(torch.nn.utils.parametrize), so that a patch would be written to a passing copy: "
                "remove_parametrizations(...) first."
            )


def _compiled(part: torch.nn.Module) -> bool:
    """Whether a module is compiled: by its own `compile`, put into another, or its forward alone."""
    forward = part.__dict__.get("forward")
    return (
        part._compiled_call_impl is not None
        or type(part).__name__ == "OptimizedModule"
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


def check_mode(device: torch.device) -> None:
    """Raise `ConfigError` in a mode of PyTorch's in which numbers are others, or no gradients."""
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "Passes run under torch.no_grad(), not torch.inference_mode(): take that off; weights "
            "are frozen anyway."
        )
    if torch.is_autocast_enabled(device.type):
        raise ConfigError(
            "Passes run without torch.autocast, under which every number is another one: leave that "
            "block, and load the model with dtype='bfloat16' where it is to be smaller."
        )
