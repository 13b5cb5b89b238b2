"""Which models are known, and how they differ: one frozen record per architecture, read by all code
that needs it.

1. Where a layer lies in the Hugging Face model, and which module below it stores which weight.
2. Which norms stand before and after attention and FFN, what is added to a stored gain, and what
   follows the logits.
3. What the configs of TransformerLens leave out or get wrong.

To add an architecture: one record here, and its tiny model in `tests/models.py`, which puts it
through every contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from qv_lens.errors import ModelError

Sublayer = Literal["ffn", "attn"]
#: a weight that shares its module with others: the module, and in brackets which part it is
QKV = ("W_Q", "W_K", "W_V")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What must be known of one architecture; TransformerLens's own names and config say the
    rest."""

    model: str
    """The Hugging Face class."""
    family: str
    """What people call it."""
    layer: str
    """The module of a layer, with {} for its number."""
    modules: Mapping[str, str]
    """Weight -> the module below the layer that stores it; a part of a joint matrix as
    "module[part]"."""
    hooked: bool = True
    """Whether TransformerLens 3.9 has HookedTransformer for it."""
    norm_before: Mapping[str, str | None] = field(
        default_factory=lambda: {"attn": "ln1", "ffn": "ln2"}
    )
    """The norm that a sublayer reads through (None: it reads the stream itself); without an ln2 the
    FFN reads ln1's."""
    norm_after: Mapping[str, str] = field(default_factory=dict)
    """The norm through which a sublayer's output reaches the stream, where there is one."""
    gain_offset: float = 0.0
    """What is added to the stored gain of a norm (Gemma stores gain - 1)."""
    activation: str | None = None
    """The FFN's non-linearity where TransformerLens's bridge names another one."""
    logit_cap: str | None = None
    """The config's name of the soft cap on the logits."""
    missing: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Config fields that TransformerLens reads and this config lacks -> how to get them from it."""
    unread: tuple[str, ...] = ()
    """Switches of the config that TransformerLens 3.9 passes over: where one is on,
    HookedTransformer is another model."""
    refused: Mapping[str, tuple[Callable[[Any], bool], str]] = field(default_factory=dict)
    """Settings of the config with which no number here would be right: when, and why."""
    ace_layers: tuple[int, int, int] = (5, 3, 36)
    """How many value and query layers ACE's release edits, of how many layers: Qwen3-8B's, or the
    model's own."""
    conv1d: bool = False
    """Whether weights are stored [input, output] (GPT-2)."""

    def stored_name(self, layer: int, name: str) -> str:
        """The Hugging Face module that holds a weight: W_out of GPT-J is
        transformer.h.<layer>.mlp.fc_out."""
        weight = {"b_in": "W_in", "b_out": "W_out"}.get(name, name)
        return f"{self.layer.format(layer)}.{self.modules[weight]}"


def _plain(prefix: str, q: str, k: str, v: str, o: str, mlp: Mapping[str, str]) -> dict[str, str]:
    """Attention's four projections below one module, and the FFN's."""
    attention = {"W_Q": q, "W_K": k, "W_V": v, "W_O": o}
    return {name: f"{prefix}.{module}" for name, module in attention.items()} | dict(mlp)


def _joint(qkv: str, out: str, mlp: Mapping[str, str]) -> dict[str, str]:
    """One matrix for queries, keys and values."""
    return {name: f"{qkv}[{name[2].lower()}]" for name in QKV} | {"W_O": out} | dict(mlp)


_GATED = {"W_in": "mlp.up_proj", "W_gate": "mlp.gate_proj", "W_out": "mlp.down_proj"}
_LLAMA = _plain("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", _GATED)
_BIASES = ("attention_bias", "mlp_bias")
_POST = {"attn": "ln1_post", "ffn": "ln2_post"}

_RECORDS = (
    Architecture(
        model="GPT2LMHeadModel", family="GPT-2", layer="transformer.h.{}", conv1d=True, missing={"n_ctx": lambda c: c.n_positions},
        modules=_joint("attn.c_attn", "attn.c_proj", {"W_in": "mlp.c_fc", "W_out": "mlp.c_proj"}),
    ),
    Architecture(
        model="GPTNeoForCausalLM", family="GPT-Neo", layer="transformer.h.{}",
        modules=_plain("attn.attention", "q_proj", "k_proj", "v_proj", "out_proj", {"W_in": "mlp.c_fc", "W_out": "mlp.c_proj"}),
    ),
    Architecture(
        model="GPTJForCausalLM", family="GPT-J", layer="transformer.h.{}", ace_layers=(3, 6, 28),
        modules=_plain("attn", "q_proj", "k_proj", "v_proj", "out_proj", {"W_in": "mlp.fc_in", "W_out": "mlp.fc_out"}),
    ),
    Architecture(
        model="GPTNeoXForCausalLM", family="GPT-NeoX (Pythia)", layer="gpt_neox.layers.{}",
        modules=_joint(
            "attention.query_key_value", "attention.dense", {"W_in": "mlp.dense_h_to_4h", "W_out": "mlp.dense_4h_to_h"}
        ),
    ),
    Architecture(
        model="OPTForCausalLM", family="OPT", layer="model.decoder.layers.{}",
        modules=_plain("self_attn", "q_proj", "k_proj", "v_proj", "out_proj", {"W_in": "fc1", "W_out": "fc2"}),
        refused={
            "do_layer_norm_before": (lambda config: not config.do_layer_norm_before, "its norms follow the sum of the stream and a sublayer"),
            "word_embed_proj_dim": (lambda config: config.word_embed_proj_dim != config.hidden_size, "a projection stands between the stream and the logits"),
        },
    ),
    Architecture(model="LlamaForCausalLM", family="Llama (SmolLM2, Llama 3)", layer="model.layers.{}", modules=_LLAMA, unread=_BIASES),
    Architecture(model="MistralForCausalLM", family="Mistral", layer="model.layers.{}", modules=_LLAMA, unread=_BIASES),
    Architecture(model="Qwen2ForCausalLM", family="Qwen2", layer="model.layers.{}", modules=_LLAMA, unread=_BIASES),
    Architecture(model="Qwen3ForCausalLM", family="Qwen3", layer="model.layers.{}", modules=_LLAMA, unread=_BIASES),
    Architecture(
        model="PhiForCausalLM", family="Phi", layer="model.layers.{}",
        # TransformerLens 3.9 reads its rotary share where transformers no longer keeps it
        hooked=False,
        modules=_plain("self_attn", "q_proj", "k_proj", "v_proj", "dense", {"W_in": "mlp.fc1", "W_out": "mlp.fc2"}),
    ),
    Architecture(
        model="Phi3ForCausalLM", family="Phi-3", layer="model.layers.{}",
        modules=_joint(
            "self_attn.qkv_proj", "self_attn.o_proj",
            {"W_gate": "mlp.gate_up_proj[gate]", "W_in": "mlp.gate_up_proj[up]", "W_out": "mlp.down_proj"},
        ),
    ),
    Architecture(
        model="GemmaForCausalLM", family="Gemma", layer="model.layers.{}", modules=_LLAMA, hooked=False, gain_offset=1.0
    ),
    Architecture(
        model="Gemma2ForCausalLM", family="Gemma 2", layer="model.layers.{}", modules=_LLAMA, hooked=False, gain_offset=1.0,
        norm_after=_POST, logit_cap="final_logit_softcapping",
    ),
    Architecture(
        model="Gemma3ForCausalLM", family="Gemma 3", layer="model.layers.{}", modules=_LLAMA, hooked=False, gain_offset=1.0,
        norm_after=_POST, logit_cap="final_logit_softcapping",
    ),
    Architecture(model="OlmoForCausalLM", family="OLMo", layer="model.layers.{}", modules=_LLAMA, hooked=False),
    Architecture(
        model="Olmo2ForCausalLM", family="OLMo 2", layer="model.layers.{}", modules=_LLAMA, hooked=False,
        norm_before={"attn": None, "ffn": None}, norm_after=_POST,
    ),
    Architecture(model="StableLmForCausalLM", family="StableLM", layer="model.layers.{}", modules=_LLAMA, hooked=False),
    Architecture(
        model="BloomForCausalLM", family="BLOOM", layer="transformer.h.{}", activation="gelu_new",
        refused={
            "apply_residual_connection_post_layernorm": (
                lambda config: config.apply_residual_connection_post_layernorm, "the stream goes on from behind each norm, so that its parts do not add up to it"
            )
        },
        modules=_joint(
            "self_attention.query_key_value", "self_attention.dense",
            {"W_in": "mlp.dense_h_to_4h", "W_out": "mlp.dense_4h_to_h"},
        ),
    ),
    Architecture(
        model="FalconForCausalLM", family="Falcon", layer="transformer.h.{}", hooked=False, activation="gelu",
        modules=_joint(
            "self_attention.query_key_value", "self_attention.dense",
            {"W_in": "mlp.dense_h_to_4h", "W_out": "mlp.dense_4h_to_h"},
        ),
    ),
)  # fmt: skip
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {record.model: record for record in _RECORDS}
)


def architecture_of(config: Any, name: str | None = None) -> Architecture:
    """The record of a Hugging Face config, or of its class `name`.

    Raises `ModelError` for a mixture of experts, for an architecture that is not known, and for a
    setting with which no number would be right.
    """
    name = name or str((getattr(config, "architectures", None) or ["?"])[0])
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((count for count in counts if (getattr(config, count, None) or 0) > 1), None)
    if experts or "Moe" in name or "Mixtral" in name:
        raise ModelError(
            f"{name} is a mixture of experts{f' ({experts})' if experts else ''}: which neurons run "
            "depends on the router, so that a neuron's score and an edit of W_out have no meaning "
            "here. Load a dense model."
        )
    if name not in ARCHITECTURES:
        raise ModelError(
            f"Architecture {name!r} not found. Available: {', '.join(ARCHITECTURES)}. Any other "
            "decoder: wrap it yourself as a TransformerLens model and pass that, qv.Lens(model)."
        )
    record = ARCHITECTURES[name]
    for setting, (wrong, why) in record.refused.items():
        if wrong(config):
            raise ModelError(
                f"{name} with {setting} = {getattr(config, setting)} cannot be read rightly: {why}."
            )
    return record
