"""What one forward pass computes at chosen positions of its rows, kept through hooks: the tensors
of a `Trace`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.errors import ModelError
from qv_lens.models.architectures import Sublayer
from qv_lens.models.backend import Backend
from qv_lens.models.hooks import Hook


class Captured(NamedTuple):
    """The tensors of a trace: every layer's at the rows asked for."""

    m: Float[Tensor, "layer row d_mlp"]
    """Coefficients of the FFN's neurons."""
    z: Float[Tensor, "layer row head_channel"]
    """What attention's channels write with."""
    attn: Float[Tensor, "layer row d_model"]
    """Attention's outputs."""
    ffn: Float[Tensor, "layer row d_model"]
    """The FFN's outputs."""
    resid: Float[Tensor, "layer_and_final row d_model"]
    """The stream before each layer, and after the last."""
    logits: Float[Tensor, "row d_vocab"]
    """Of the next token."""
    pattern: Float[Tensor, "layer row head key"] | None = None
    """Attention's weights, where they were asked for."""
    v: Float[Tensor, "layer prompt kv_head_channel key"] | None = None
    """The value vectors that they weigh."""


def capture(
    backend: Backend,
    run: Callable[[list[Hook]], Tensor],
    where: Sequence[Sequence[int]],
    attention: bool = False,
) -> Captured:
    """One pass, `run` with our hooks, at the positions `where` of each row. Every layer's tensors
    are stacked."""
    kept: dict[str, Tensor] = {}
    index = torch.tensor(
        [i for i, chosen in enumerate(where) for _ in chosen], device=backend.device
    )
    position = torch.tensor([p for chosen in where for p in chosen], device=backend.device)

    def keep(name: str) -> Hook:
        def hook(tensor: Tensor) -> None:
            kept[name] = tensor[index, position].flatten(1)  # z comes as [head, channel]

        return name, hook

    def keep_pattern(name: str) -> Hook:
        def hook(tensor: Float[Tensor, "prompt head query key"]) -> None:
            kept[name] = tensor[index, :, position]

        return name, hook

    def keep_values(name: str) -> Hook:
        def hook(tensor: Tensor) -> None:
            kept[name] = tensor.flatten(
                2
            ).mT  # [prompt, kv_head_channel, key]: the key axis last, to be padded

        return name, hook

    layers = range(backend.n_layers)
    names = {
        "m": [backend.coefficient(layer) for layer in layers],
        "z": [backend.z(layer) for layer in layers],
        "attn": [backend.attn_out(layer) for layer in layers],
        "ffn": [backend.mlp_out(layer) for layer in layers],
        "resid": [
            *(backend.resid_pre(layer) for layer in layers),
            backend.resid_post(backend.n_layers - 1),
        ],
    }
    hooks = [keep(name) for group in names.values() for name in group]
    extra: dict[str, list[str]] = {}
    if attention:
        patterns = [backend.pattern(layer) for layer in layers]
        values = [backend.qkv(layer, "V") for layer in layers]
        extra = {"pattern": patterns, "v": values}
        hooks += [*map(keep_pattern, patterns), *map(keep_values, values)]
    logits = run(hooks)
    _check_reached(
        kept, names.values(), "Another forward was put in a module's place: load the model again."
    )
    _check_reached(
        kept, extra.values(), "Attention is not seen here: load the model with backend='hooked'."
    )
    stacked = {
        field: torch.stack([kept[name] for name in group])
        for field, group in (names | extra).items()
    }
    return Captured(**stacked, logits=logits[index, position])


def _check_reached(kept: Collection[str], names: Iterable[Sequence[str]], advice: str) -> None:
    """Raise `ModelError` for a hook point that the pass did not come to."""
    silent = [name for group in names for name in group if name not in kept]
    if silent:
        raise ModelError(f"The hook point {silent[0]} was not reached in this pass. {advice}")


def joined(parts: Sequence[Captured]) -> Captured:
    """The rows of several passes as those of one, joined along the axis of rows; the keys of
    attention are padded to the longest prompt."""
    return Captured(
        m=torch.cat([part.m for part in parts], dim=1),
        z=torch.cat([part.z for part in parts], dim=1),
        attn=torch.cat([part.attn for part in parts], dim=1),
        ffn=torch.cat([part.ffn for part in parts], dim=1),
        resid=torch.cat([part.resid for part in parts], dim=1),
        logits=torch.cat([part.logits for part in parts]),
        pattern=_cat_padded([part.pattern for part in parts]),
        v=_cat_padded([part.v for part in parts]),
    )


def _cat_padded(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Batches of different longest prompts along axis 1, the last axis (keys) padded with zeros;
    None where they were not asked for."""
    there = [part for part in parts if part is not None]
    if not there:
        return None
    longest = max(part.shape[-1] for part in there)
    return torch.cat(
        [torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in there], dim=1
    )


def scales_after(
    backend: Backend,
    m: Float[Tensor, "layer row d_mlp"],
    z: Float[Tensor, "layer row head_channel"],
) -> tuple[Float[Tensor, "layer row 1"], Float[Tensor, "layer row 1"]] | None:
    """1 / sigma of the norms after attention and after the FFN, in float32 or better; None for a
    model without them."""
    if backend.norm_after(0, "ffn") is None:
        return None
    wide = torch.promote_types(m.dtype, torch.float32)

    def of(sublayer: Sublayer, values: Tensor) -> Tensor:
        scales = [
            backend.scale_after(layer, sublayer, x.to(wide)) for layer, x in enumerate(values)
        ]
        return torch.stack([scale for scale in scales if scale is not None])

    return of("attn", z), of("ffn", m)
