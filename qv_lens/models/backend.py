"""One face for a HookedTransformer (TransformerLens 3.9) and a TransformerBridge (3.9 and 4.x).

`Backend` offers the same hook names, the same weight layout and the same behaviour on both classes:
GPT-J's missing ln2, None biases, unknown hook names and transposed views are settled here, and here
alone (`wrap` makes such models). What differs by architecture is said by `architectures`.

Layouts are TransformerLens's: W_in, W_gate [d_model, d_mlp], W_out [d_mlp, d_model], W_O [head,
d_head, d_model], W_U [d_model, d_vocab]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import TransformerLensKeyValueCacheEntry as Entry
from transformer_lens.hook_points import HookPoint

from qv_lens.errors import ModelError
from qv_lens.models.activations import ACTIVATIONS
from qv_lens.models.architectures import ARCHITECTURES, Architecture, Sublayer
from qv_lens.models.hooks import Hook, adapted_to
from qv_lens.models.norms import Norm, dtype_name
from qv_lens.models.refusals import UNREADABLE, check_as_written, check_plain

BackendName = Literal["hooked", "bridge"]


def _record_of(model: Any, kind: str) -> Architecture | None:
    """What is known of the architecture of a hooked model, where its config names one."""
    named = getattr(model.cfg, "architecture", None) or getattr(
        model.cfg, "original_architecture", None
    )
    if kind == "TransformerBridge" and named is None:
        named = type(model.original_model).__name__
    return ARCHITECTURES.get(str(named))


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    libraries = {"transformer_lens": "transformer-lens", "transformers": "transformers"}
    return {"torch": torch.__version__} | {name: version(of) for name, of in libraries.items()}


class Backend:
    """One face for both hooked classes: names, weights, one forward pass. Holds the model, and no
    state of its own."""

    def __init__(self, model: Any) -> None:
        kind = type(model).__name__
        if kind not in ("HookedTransformer", "TransformerBridge"):
            raise ModelError(
                f"A Lens wraps a HookedTransformer or a TransformerBridge, not {kind}. "
                "A Hugging Face model is loaded with qv.load(folder), or wrapped with "
                "qv.Lens.from_hf(model, tokenizer)."
            )
        if str(model.cfg.normalization_type).endswith("Pre"):
            raise ModelError(
                "This model's norms are folded into its weights (fold_ln), and attribution needs "
                "them apart. Load it with HookedTransformer.from_pretrained_no_processing(...), or "
                "with qv.load."
            )
        for unreadable, why in UNREADABLE:
            if unreadable(model.cfg):
                raise ModelError(f"A Lens cannot read this model rightly: {why}.")
        check_plain(model, getattr(model, "original_model", None))
        self.model = model
        self.name: BackendName = "hooked" if kind == "HookedTransformer" else "bridge"
        self.cfg = model.cfg
        self.record = _record_of(model, kind)
        # GPT-J: attention and FFN read the same
        self.parallel = bool(getattr(self.cfg, "parallel_attn_mlp", False))
        self.gated = bool(self.cfg.gated_mlp)
        self.rms = self.cfg.normalization_type == "RMS"
        if self.name == "hooked" and self.gated:
            # there b_in is added after the gate: m is act(gate) * up + b_in
            biases = (self.b_in(layer) for layer in range(self.n_layers))
            if any(bias is not None and bias.any() for bias in biases):
                raise ModelError(
                    "A Lens cannot read this model rightly: its gated FFN has a b_in, which "
                    "HookedTransformer adds behind the gate."
                )

    # ------------------------------------------------------------------ sizes

    @property
    def n_layers(self) -> int:
        return self.cfg.n_layers

    @property
    def n_kv_heads(self) -> int:
        return getattr(self.cfg, "n_key_value_heads", None) or self.cfg.n_heads

    @property
    def device(self) -> torch.device:
        return self.w_out(0).device

    @property
    def dtype(self) -> torch.dtype:
        return self.w_out(0).dtype

    # ------------------------------------------------------------------ hook names

    def resid_pre(self, layer: int) -> str:
        return f"blocks.{layer}.hook_resid_pre"

    def resid_post(self, layer: int) -> str:
        return f"blocks.{layer}.hook_resid_post"

    def attn_out(self, layer: int) -> str:
        return f"blocks.{layer}.hook_attn_out"

    def mlp_out(self, layer: int) -> str:
        return f"blocks.{layer}.hook_mlp_out"

    def coefficient(self, layer: int) -> str:
        """m: the FFN activation that multiplies the rows of W_out."""
        return f"blocks.{layer}.mlp.hook_post"

    def pre(self, layer: int) -> str:
        """What the non-linearity reads: x W_in + b_in, in a gated FFN x W_gate."""
        return f"blocks.{layer}.mlp.hook_pre"

    def pre_linear(self, layer: int) -> str:
        """A gated FFN's x W_in."""
        return f"blocks.{layer}.mlp.hook_pre_linear"

    def qkv(self, layer: int, which: str) -> str:
        """Queries, keys or values ('Q', 'K', 'V') as the projection gives them."""
        return f"blocks.{layer}.attn.hook_{which.lower()}"

    def z(self, layer: int) -> str:
        """Attention-weighted values per head, what W_O multiplies."""
        return f"blocks.{layer}.attn.hook_z"

    def pattern(self, layer: int) -> str:
        """Attention weights [prompt, head, query, key]."""
        return f"blocks.{layer}.attn.hook_pattern"

    def written_at(self, layer: int, sublayer: Sublayer = "ffn") -> str:
        """What a sublayer's output weight and bias give, before any norm that follows."""
        whole = self.mlp_out(layer) if sublayer == "ffn" else self.attn_out(layer)
        if self.norm_after(layer, sublayer) is None:
            return whole
        return f"blocks.{layer}.{'mlp' if sublayer == 'ffn' else 'attn'}.hook_out"

    # ------------------------------------------------------------------ weights (live)

    def w_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Live view: writing to it changes the next forward pass."""
        return self.model.blocks[layer].mlp.W_out.data

    def w_in(self, layer: int) -> Float[Tensor, "d_model d_mlp"]:
        return self.model.blocks[layer].mlp.W_in.data

    def w_gate(self, layer: int) -> Float[Tensor, "d_model d_mlp"] | None:
        return self.model.blocks[layer].mlp.W_gate.data if self.gated else None

    def b_gate(self, layer: int) -> Float[Tensor, " d_mlp"] | None:
        """The gate's own bias, where there is one (a Llama with `mlp_bias`)."""
        gate = getattr(self.model.blocks[layer].mlp, "gate", None) if self.gated else None
        return _data(getattr(gate, "bias", None))

    def b_in(self, layer: int) -> Float[Tensor, " d_mlp"] | None:
        return _data(getattr(self.model.blocks[layer].mlp, "b_in", None))

    def stored_b_out(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """b_out, where the model has one."""
        return _data(getattr(self.model.blocks[layer].mlp, "b_out", None))

    def b_out(self, layer: int) -> Float[Tensor, " d_model"]:
        bias = self.stored_b_out(layer)
        return self.w_out(layer).new_zeros(self.cfg.d_model) if bias is None else bias

    def w_o(self, layer: int) -> Float[Tensor, "head_channel d_model"]:
        """Live view of W_O with heads and channels in one axis (the k-th row is `hook_z`'s k-th
        channel)."""
        weight = self.model.blocks[layer].attn.W_O.data
        flat = rearrange(weight, "head channel d -> (head channel) d")
        if _shared(flat, weight):
            return flat
        return self.model.blocks[
            layer
        ].attn.o.weight.data.T  # 4.x hands out a copy of the heads' view

    def w_qkv(self, layer: int, which: str) -> Float[Tensor, "d_model head_channel"]:
        """W_Q, W_K or W_V, heads (for K and V the key-value heads) and channels in one axis."""
        return rearrange(self._by_head(layer, which).data, "head d channel -> d (head channel)")

    def live_w_qkv(self, layer: int, which: str) -> Float[Tensor, "d_model head_channel"]:
        """The same as a live view, for which a weight that is laid out otherwise is laid out
        anew."""
        weight, flat = self._by_head(layer, which), self.w_qkv(layer, which)
        if not _shared(flat, weight):
            weight.data = rearrange(flat, "d (head channel) -> head d channel", head=len(weight))
        return flat

    def _by_head(self, layer: int, which: str) -> Float[Tensor, "head d_model channel"]:
        attn = self.model.blocks[layer].attn
        # HookedTransformer's W_K and W_V repeat the key-value heads
        weight = getattr(attn, f"_W_{which}", None)
        return getattr(attn, f"W_{which}") if weight is None else weight

    def b_o(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """Attention's own bias, where there is one."""
        attn = self.model.blocks[layer].attn
        if hasattr(attn, "b_O"):
            return _data(attn.b_O)
        return _data(getattr(getattr(attn, "o", None), "bias", None))

    def b_qkv(self, layer: int, which: str) -> Float[Tensor, " head_channel"] | None:
        """The bias of queries, keys or values, where there is one."""
        attn = self.model.blocks[layer].attn
        for name in (f"_b_{which}", f"b_{which}"):  # HookedTransformer's b_K and b_V repeat
            if (bias := _data(getattr(attn, name, None))) is not None:
                return bias.flatten()
        return None

    def stored_name(self, layer: int, name: str) -> str:
        """The Hugging Face module that holds a weight; TransformerLens's own name for a user's
        model of no known kind."""
        if self.record is not None:
            return self.record.stored_name(layer, name)
        return f"blocks.{layer}.{'attn' if name in ('W_Q', 'W_K', 'W_V', 'W_O') else 'mlp'}.{name}"

    @property
    def conv1d(self) -> bool:
        """Whether the Hugging Face model stores weights [input, output]."""
        return self.record is not None and self.record.conv1d

    @property
    def ace_layers(self) -> tuple[int, int, int]:
        """How many value and query layers ACE's release edits, and how many layers its model
        has."""
        return (5, 3, 36) if self.record is None else self.record.ace_layers

    @property
    def first_editable(self) -> int:
        """The lowest layer whose keys depend on more than the token: 1 where the FFN reads the
        embedding alone (a parallel block without positions in the stream), else 0."""
        return int(self.parallel and self.cfg.positional_embedding_type != "standard")

    @property
    def logit_cap(self) -> float | None:
        """c of c tanh(logits / c), where the logits are capped."""
        cap = getattr(self.cfg, "output_logits_soft_cap", None)
        return float(cap) if cap and cap > 0 else None

    def value_vectors(
        self, layer: int, sublayer: Sublayer = "ffn"
    ) -> Float[Tensor, "unit d_model"]:
        """What a unit adds to the stream per unit of its coefficient: its row of W_out (or W_O);
        where a norm follows, times that norm's gain (and, by `Trace.scale`, divided by its
        sigma)."""
        weight = self.w_out(layer) if sublayer == "ffn" else self.w_o(layer)
        after = self.norm_after(layer, sublayer)
        return weight if after is None else weight * after.gain.to(weight.dtype)

    def value_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """What b_out adds to the stream, up to the division by sigma (see `value_vectors`)."""
        after = self.norm_after(layer, "ffn")
        return self.b_out(layer) if after is None else self.b_out(layer) * after.gain.to(self.dtype)

    def scale_after(
        self, layer: int, sublayer: Sublayer, coefficients: Float[Tensor, "*batch unit"]
    ) -> Float[Tensor, "*batch 1"] | None:
        """1 / sigma of the norm that follows a sublayer, from what its units' coefficients write;
        None without one."""
        after = self.norm_after(layer, sublayer)
        if after is None:
            return None
        weight = self.w_out(layer) if sublayer == "ffn" else self.w_o(layer)
        bias = self.b_out(layer) if sublayer == "ffn" else self.b_o(layer)
        raw = coefficients @ weight.to(coefficients.dtype)
        return 1 / after.scale(raw if bias is None else raw + bias.to(raw.dtype))

    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings."""
        return self.model.embed.W_E.data

    def unembed(self) -> tuple[Float[Tensor, "d_model d_vocab"], Float[Tensor, " d_vocab"]]:
        weight, bias = self.model.unembed.W_U.data, _data(getattr(self.model.unembed, "b_U", None))
        return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias

    def every_weight(self) -> Iterator[Tensor]:
        """All that the model computes with, in one order on both hooked classes: matrices, biases
        and norms layer by layer, then what lies before and after the layers. A bias of zeros is
        none, since a hooked class may make it up."""
        weights: list[Tensor | None] = []
        for layer in range(self.n_layers):
            weights += [self.w_out(layer), self.w_in(layer), self.w_gate(layer), self.w_o(layer)]
            weights += [read(layer, which) for read in (self.w_qkv, self.b_qkv) for which in "QKV"]
            weights += [
                self.b_in(layer),
                self.b_gate(layer),
                self.stored_b_out(layer),
                self.b_o(layer),
            ]
            attn = self.model.blocks[layer].attn
            norms = [self.norm(layer, sublayer) for sublayer in ("attn", "ffn")]
            norms += [self.norm_after(layer, sublayer) for sublayer in ("attn", "ffn")]
            norms += [
                self._norm(norm)
                for norm in (getattr(attn, "q_norm", None), getattr(attn, "k_norm", None))
                if norm is not None
            ]
            weights += [
                part for norm in norms if norm is not None for part in (norm.gain, norm.bias)
            ]
        final = self.norm(None)
        weights += [self.embedding(), *self._beside_embedding()]
        weights += [final.gain, final.bias, *self.unembed()]
        return (weight for weight in weights if weight is not None and weight.any())

    def _beside_embedding(self) -> Iterator[Tensor | None]:
        """Positions that are added to the tokens, as far as they are read, and the norm behind the
        embedding (BLOOM)."""
        positions = getattr(self.model, "pos_embed", None)
        if positions is not None:
            unread = getattr(getattr(positions, "original_component", None), "offset", 0)  # OPT
            yield positions.W_pos.data[unread:]
        after = getattr(self.model.embed, "ln", None) or getattr(self.model, "embed_ln", None)
        if after is not None:
            norm = self._norm(after)
            yield from (norm.gain, norm.bias)

    def norm(self, layer: int | None, sublayer: Sublayer = "ffn") -> Norm:
        """The norm in front of a sublayer, or the final one (`layer=None`); where there is none, a
        norm that changes nothing."""
        if layer is None:
            return self._norm(self.model.ln_final)
        block = self.model.blocks[layer]
        before = {"attn": "ln1", "ffn": "ln2"} if self.record is None else self.record.norm_before
        name = before[sublayer]
        if name is None:
            ones = torch.ones(self.cfg.d_model, dtype=self.dtype, device=self.device)
            return Norm(ones, None, 0.0, self.rms, none=True)
        # one norm for both (GPT-J)
        return self._norm(getattr(block, name) if hasattr(block, name) else block.ln1)

    def norm_after(self, layer: int, sublayer: Sublayer) -> Norm | None:
        """The norm through which a sublayer's output reaches the stream, where there is one."""
        name = None if self.record is None else self.record.norm_after.get(sublayer)
        if name is None:
            return None
        block = self.model.blocks[layer]  # TransformerLens 3.9 calls OLMo 2's norms ln1 and ln2
        return self._norm(
            getattr(block, name)
            if hasattr(block, name)
            else getattr(block, name.removesuffix("_post"))
        )

    def _norm(self, module: Any) -> Norm:
        gain = _data(module.w if hasattr(module, "w") else getattr(module, "weight", None))
        if gain is None:  # OLMo's norms have no parameters
            gain = torch.ones(self.cfg.d_model, dtype=self.dtype, device=self.device)
        if self.name == "bridge" and self.record is not None and self.record.gain_offset:
            gain = gain + self.record.gain_offset
        bias = None if self.rms else getattr(module, "b", getattr(module, "bias", None))
        return Norm(gain, _data(bias), float(self.cfg.eps), self.rms)

    def constant_pattern(self, layer: int) -> list[Hook]:
        """Hooks that make a layer's attention weights constants to the gradient, and change nothing
        that it computes. Not at the pattern itself, which some bridges only show."""
        return [(self.qkv(layer, which), Tensor.detach) for which in "QK"]

    def constant_scales(self, layer: int) -> list[Hook]:
        """Hooks for a layer's norms, those before and after its sublayers: sigma is a constant to
        the gradient, and nothing that the norms compute changes."""
        names = [f"blocks.{layer}.{norm}" for norm in ("ln1", "ln2", "ln1_post", "ln2_post")]
        names = [name for name in names if f"{name}.hook_scale" in self.points]
        if self.name == "hooked":
            return [(f"{name}.hook_scale", Tensor.detach) for name in names]
        # the bridge does not compute with its hook_scale where Hugging Face's own norm runs
        return [hook for name in names for hook in self._constant_scale(name)]

    def _constant_scale(self, name: str) -> list[Hook]:
        norm = self._norm(self.model.get_submodule(name))
        read: list[Tensor] = []

        def keep(x: Tensor) -> None:
            read.append(x)

        def rewrite(out: Tensor) -> Tensor:
            x = read.pop()
            y = norm(x, norm.scale(x).detach())
            return out.detach() + (y - y.detach()).to(out.dtype)

        return [(f"{name}.hook_in", keep), (f"{name}.hook_out", rewrite)]

    def activation(self, x: Tensor) -> Tensor:
        """The FFN's non-linearity, as the model applies it."""
        return ACTIVATIONS[self.activation_name](x)

    @property
    def activation_name(self) -> str:
        """The name of the FFN's non-linearity, one on both hooked classes."""
        named = None if self.record is None else self.record.activation
        return named or self.cfg.act_fn

    # ------------------------------------------------------------------ running

    @cached_property
    def points(self) -> dict[str, HookPoint]:
        """The model's hook points, by every name that they have. Read once: a TransformerBridge
        makes its table anew whenever it is asked (18 ms with SmolLM2's 1,725 names)."""
        return dict(self.model.hook_dict)

    def check_names(self, hooks: Sequence[Hook]) -> None:
        """Refuse hook names the model does not have (the bridge of 3.9 would ignore them)."""
        for name, _ in hooks:
            if name not in self.points:
                raise ModelError(
                    f"This model has no hook point {name!r}. lens.model.hook_dict lists all of "
                    "them."
                )

    @contextmanager
    def hooks(self, hooks: Sequence[Hook], shape: Sequence[int] = ()) -> Iterator[None]:
        """Install (name, function) pairs and later remove exactly these; the user's own hooks stay.
        `shape`: [batch, seq] of the pass, for modules that run on one long row of tokens (OPT's
        FFN).

        Plain PyTorch handles on the hook points: `model.hooks(...)` of 3.9 ends with reset_hooks,
        which also removes what a caller added at the same level."""
        self.check_names(hooks)
        handles = []
        try:
            for name, function in hooks:
                adapted = adapted_to(function, shape)
                handles.append(self.points[name].register_forward_hook(adapted))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(
        self,
        ids: Int[Tensor, "batch seq"],
        start: tuple[int, Tensor] | None = None,
        stop: int | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """One forward pass over right-padded ids: logits, or with `stop` the stream in front of
        that layer; with `start` from the stream in front of a layer (that of the positions after
        `past`, where it is given). Causal attention never looks at what follows, so no mask is
        needed.

        A TransformerBridge cannot begin in the middle: it begins at the tokens, with the same
        result.
        """
        check_as_written(self.model.modules(), getattr(self.model, "original_model", None))
        if self.name == "hooked" and self.dtype != self.cfg.dtype:
            raise ModelError(
                f"This HookedTransformer was made in {dtype_name(self.cfg.dtype)}, and its weights were "
                f"turned into {dtype_name(self.dtype)} since: turn it by model.to(torch."
                f"{dtype_name(self.dtype)}), which TransformerLens notes, or load it so."
            )
        if self.embedding().dtype != self.dtype:
            raise ModelError(
                f"A part of this model was turned into {dtype_name(self.embedding().dtype)} since it was "
                f"wrapped, and the rest is in {dtype_name(self.dtype)}: turn the model that the lens holds "
                "(lens.model.to(...)), or wrap the Hugging Face model anew."
            )
        # a tokenizer that pads on the left would make it guess a mask from the ids
        if self.name == "hooked":
            options = {"return_type": "logits", "padding_side": "right", "stop_at_layer": stop}
            if start is None:
                return self.model(ids, **options)
            if past is not None:
                options["attention_mask"] = torch.nn.functional.pad(
                    past.mask, (0, start[1].shape[1]), value=True
                ).int()
                options["past_kv_cache"] = past.layers
            return self.model(start[1], start_at_layer=start[0], **options)
        if stop is None:
            return self.model(ids, return_type="logits")
        kept: list[Tensor] = []

        def leave(x: Tensor) -> None:
            kept.append(x)
            raise _Reached

        site = self.resid_pre(stop) if stop < self.n_layers else self.resid_post(stop - 1)
        with suppress(_Reached), self.hooks([(site, leave)]):
            self.model(ids, return_type="logits")
        return kept[0]

    @torch.no_grad()
    def past(
        self, start: tuple[int, Float[Tensor, "row seq d_model"]], first: Int[Tensor, " row"]
    ) -> Past:
        """Keys and values of each row's first tokens, from the stream in front of layer `start[0]`
        on (HookedTransformer)."""
        layer, stream = start
        longest = int(first.max())
        entries = {
            i: Entry.init_cache_entry(self.cfg, self.device, len(stream))
            for i in range(layer, self.n_layers)
        }
        self.model(
            stream[:, : longest + 1], start_at_layer=layer, past_kv_cache=entries, return_type=None
        )
        at = torch.arange(longest, device=first.device) - (longest - first)[:, None]
        rows = torch.arange(len(first), device=first.device)[:, None]
        index = rows, at.clamp_min(0)
        return Past(
            at >= 0,
            {
                i: Entry(e.past_keys[index], e.past_values[index], frozen=True)
                for i, e in entries.items()
            },
        )


@dataclass(frozen=True)
class Past:
    """What the first tokens of some rows leave for later tokens: keys and values by layer, aligned
    at their ends."""

    mask: Bool[Tensor, "row past"]
    """Which positions are there."""
    layers: dict[int, Entry]
    """Keys and values, by layer."""

    def rows(self, index: Tensor) -> Past:
        """The keys and values of some of the rows."""
        chosen = {
            i: Entry(e.past_keys[index], e.past_values[index], frozen=True)
            for i, e in self.layers.items()
        }
        return Past(self.mask[index], chosen)


class _Reached(Exception):  # noqa: N818 - nothing went wrong
    """A pass through a bridge has come as far as it was asked to (its own `stop_at_layer` runs on
    through the unembedding of every token after the last layer)."""


def _shared(view: Tensor, weight: Tensor) -> bool:
    """Whether writing to a rearranged weight writes to the weight."""
    return view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def _data(parameter: Any) -> Tensor | None:
    return None if parameter is None else parameter.data
