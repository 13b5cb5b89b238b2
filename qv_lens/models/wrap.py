"""A loaded Hugging Face model behind hook points: a HookedTransformer (TransformerLens 3.9) or a
TransformerBridge (3.9, 4.x).

1. The class is chosen by the architecture's record, its weights neither processed nor copied (no
   fold_ln, no centring: editing and export need the raw ones).
2. The wrapped model's logits are compared with Hugging Face's (`agreement`).
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from qv_lens.errors import ModelError, unknown
from qv_lens.facts.spans import puts_bos
from qv_lens.models import agreement
from qv_lens.models.architectures import ARCHITECTURES, architecture_of
from qv_lens.models.refusals import check_as_written, check_plain

#: HookedTransformer's context is capped as TransformerLens caps it
HOOKED_CONTEXT = 2048


def hooked_available() -> bool:
    """Whether this TransformerLens still has HookedTransformer (3.x)."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def wrap(hf: Any, tokenizer: Any, backend: str = "auto") -> Any:
    """A HookedTransformer or TransformerBridge around `hf`, sharing its storage, weights
    unprocessed.

    Its logits are compared with those of `hf` (`agreement`). Where HookedTransformer computes
    another model, 'auto' takes the bridge and warns.

    Raises `ModelError` for an architecture that is not known (`architectures`), a backend that is
    not installed or does not have it, one that computes other logits, or a model that is
    in training mode, compiled, parametrized or with adapters."""
    check_plain(hf, None)  # one that is compiled or has adapters may have another class
    record = architecture_of(hf.config, type(hf).__name__)
    check_as_written((), hf)
    if backend not in ("auto", "hooked", "bridge"):
        raise unknown("Backend", backend, ("auto", "hooked", "bridge"))
    if backend == "hooked" and not hooked_available():
        raise ModelError(
            "backend='hooked' needs HookedTransformer, which TransformerLens removed in 4.0. "
            "Install transformer-lens>=3.9,<4, or use backend='bridge'."
        )
    if backend == "hooked" and not record.hooked:
        raise ModelError(
            f"TransformerLens has no HookedTransformer for {record.model}. Use backend='bridge', or "
            "'auto'."
        )
    hf.config.architectures = [record.model]
    ids = agreement.row(hf, tokenizer, _hooked_context(hf))
    theirs = agreement.probe(hf, ids)
    if backend == "auto" and hooked_available() and record.hooked:
        try:
            model = _built(hf, tokenizer, "hooked")
            wrong = _other_model(hf, model, ids, theirs)
            if not wrong:
                return model
            why = f"HookedTransformer computes another model than this checkpoint ({wrong})"
        except ModelError as error:
            why = str(error).removesuffix(".")
        warnings.warn(f"{why}: TransformerBridge is used instead.", stacklevel=4)
    model = _built(hf, tokenizer, "hooked" if backend == "hooked" else "bridge")
    return _checked(model, _other_model(hf, model, ids, theirs))


def _built(hf: Any, tokenizer: Any, backend: str) -> Any:
    """The wrapped model. Raises `ModelError` where TransformerLens cannot hold it: each of its
    readers knows the usual settings of an architecture, and fails on others as it happens."""
    try:
        return _wrapped(hf, tokenizer, backend)
    except torch.OutOfMemoryError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        kind = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}[backend]
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{kind} cannot hold this {type(hf).__name__}: an unusual setting of its config is not "
            f"known there ({type(error).__name__}: {first[:200]})."
        ) from error


def _wrapped(hf: Any, tokenizer: Any, backend: str) -> Any:
    # Both loaders ask for a folder or an official name, and guess the family from the words in it
    # ("llama", "gemma"). A folder with the config alone keeps them offline and unbiased.
    with tempfile.TemporaryDirectory(prefix="qv_") as folder, _quiet():
        config = copy.deepcopy(hf.config)
        for name, value in ARCHITECTURES[type(hf).__name__].missing.items():
            setattr(config, name, value(hf.config))
        config.save_pretrained(folder)
        wrap_as = _wrap_hooked if backend == "hooked" else _wrap_bridge
        model = wrap_as(hf, _for_transformer_lens(tokenizer), folder)
    model.cfg.model_name = Path(hf.name_or_path).name or type(hf).__name__  # not the folder's
    return model.requires_grad_(False).eval()


def _for_transformer_lens(tokenizer: Any) -> Any:
    """A copy, which TransformerLens may change: it makes up an end of text, a BOS and padding. That
    it is said to put a BOS keeps it from reading the tokenizer's files again."""
    copied = copy.deepcopy(tokenizer)
    copied.init_kwargs = {"name_or_path": "", **copied.init_kwargs, "add_bos_token": True}
    return copied


def _hooked_context(hf: Any) -> int:
    """HookedTransformer holds a [n_ctx, n_ctx] mask per layer, so its context is capped as
    TransformerLens caps it."""
    return min(
        getattr(hf.config, "max_position_embeddings", None) or HOOKED_CONTEXT, HOOKED_CONTEXT
    )


@torch.no_grad()
def _other_model(hf: Any, model: Any, ids: Tensor | None, theirs: Tensor | None) -> str:
    """How the wrapped model's computation differs from that of `hf`, in words; empty where it does
    not."""
    if type(model).__name__ == "HookedTransformer":
        switches = ARCHITECTURES[type(hf).__name__].unread
        reasons = agreement.unread(hf.config, _hooked_context(hf), switches)
        theta = agreement.rotary_base(hf.config)
        if theta is not None and model.cfg.rotary_base != theta:
            reasons.append(f"the base {theta:g} of its rotary positions")
        if reasons:
            return "it leaves out " + " and ".join(reasons)
    if ids is None or theirs is None:
        return ""
    apart = agreement.distance(theirs, model(ids, return_type="logits"))
    if apart <= agreement.TOLERANCE[next(hf.parameters()).dtype]:
        return ""
    return f"its logits on a row of {ids.shape[1]} tokens lie {apart:.1%} of their spread away"


def _checked(model: Any, wrong: str) -> Any:
    """Raise `ModelError` for a model that is not what its checkpoint says."""
    kind = type(model).__name__
    if wrong and kind == "HookedTransformer":
        raise ModelError(
            f"HookedTransformer computes another model than this checkpoint: {wrong}. Use "
            "backend='bridge', or 'auto'."
        )
    if wrong:
        raise ModelError(
            f"{kind} computes another model than this checkpoint: {wrong}. No number from it could "
            "be trusted."
        )
    return model


def plain_tokenizer(model: Any) -> Any:
    """The model's tokenizer without the BOS that TransformerLens makes it put in front; one that
    puts it there by itself keeps it. Raises `ModelError` if it has none."""
    if getattr(model, "tokenizer", None) is None:
        raise ModelError("This model has no tokenizer. Pass one: qv.Lens(model, tokenizer=...).")
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_bos_token = _published_with_bos(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer with which no prompt could be read rightly."""
    if not getattr(tokenizer, "is_fast", True):
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not say where in a text a "
            "token lies: subjects and answers could not be found. Load a fast one (AutoTokenizer)."
        )
    ids, own = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    if own and ids[-1] != own[-1]:
        behind = tokenizer.decode(ids[-1:])
        raise ModelError(
            f"This tokenizer puts {behind!r} behind every prompt, after which no answer follows: load "
            "it with add_eos_token=False, or without that part of its template."
        )


def _published_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer as it is published begins a text with a BOS; not, where its files are
    not at hand."""
    try:
        own = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return False
    return puts_bos(own)


def _wrap_hooked(hf: Any, tokenizer: Any, folder: str) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import (
        get_pretrained_model_config,
        get_pretrained_state_dict,
    )

    parameter = next(hf.parameters())
    cfg = get_pretrained_model_config(
        folder,
        hf_cfg=hf.config.to_dict(),
        device=parameter.device,
        dtype=parameter.dtype,
        n_ctx=_hooked_context(hf),
    )
    if type(hf).__name__ == "GPTJForCausalLM":  # TransformerLens hard-codes both
        cfg.d_mlp = hf.config.n_inner or 4 * hf.config.n_embd
        cfg.eps = hf.config.layer_norm_epsilon
    cfg.default_prepend_bos = False
    state = get_pretrained_state_dict(folder, cfg, hf_model=hf, dtype=parameter.dtype)
    model = HookedTransformer(cfg, tokenizer=tokenizer, move_to_device=False)
    unfilled = model.load_state_dict(state, assign=True, strict=False).missing_keys
    # BLOOM's positions are ALiBi: a table of positions is made at random and never read, and would
    # give the same weights another hash each time
    for name, parameter in model.named_parameters():
        if name in unfilled:
            parameter.data.zero_()
    return model.to(parameter.device, print_details=False)


def _wrap_bridge(hf: Any, tokenizer: Any, folder: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    parameter = next(hf.parameters())
    return TransformerBridge.boot_transformers(
        folder, hf_model=hf, tokenizer=tokenizer, dtype=parameter.dtype, device=parameter.device
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """TransformerLens warns at every construction (deprecation, missing mask buffers); none of it
    concerns the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
