"""Lens: a hooked model one can look into, intervene on, edit and put back.

State: the weights (with the stack of applied patches and the tensors they replaced) and the
interventions in force."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.errors import (
    ConfigError,
    ModelError,
    PatchError,
    check_count,
    check_kind,
    check_seed,
    one_or_more,
)
from qv_lens.facts.records import Asked, Fact
from qv_lens.facts.spans import Positions, Prompt, continuation, pad, tokenize
from qv_lens.models.agreement import short_context
from qv_lens.models.backend import Backend, Past, versions
from qv_lens.models.capture import capture, joined, scales_after
from qv_lens.models.checkpoint import Checkpoint, forwards, own_hooks
from qv_lens.models.generation import (
    Sampling,
    cached,
    continued,
    ends_of_text,
    following,
    plain,
)
from qv_lens.models.hooks import Hook, ordered
from qv_lens.models.identity import bit_sum, checksum, content, digest
from qv_lens.models.norms import at_least_float32, capped, dtype_name
from qv_lens.models.patch_stack import PatchStack, check_fits
from qv_lens.models.refusals import check_mode
from qv_lens.models.turn import Turn
from qv_lens.models.wrap import check_tokenizer, plain_tokenizer, wrap
from qv_lens.patch import Patch
from qv_lens.trace import Rows, Setup, Trace

Facts = Fact | str | Sequence[Fact | str]
#: a layer, and the stream in front of it
Start = tuple[int, Tensor]
#: prompts a pass whose whole answers are asked for
TOGETHER = 64
#: the modules after the last layer
READ_OUT = ("ln_final", "unembed")


class Intervention(Protocol):
    """Anything that a Lens can put in force."""

    def check(self, lens: Lens) -> None:
        """Raise `ConfigError` if this cannot be meant on this model."""
        ...

    def hooks(self, lens: Lens) -> list[Hook]:
        """Fresh hooks for one forward pass, `hooks.Early` and `Late` ones among them where the
        order of nesting must not count."""
        ...


class Lens:
    """A HookedTransformer or TransformerBridge, with the tokenizer and the Hugging Face model it
    wraps.

    `Lens(model)` takes a user's hooked model; `Lens.from_hf` (and `qv.load`) wraps a
    Hugging Face model, whose weights it shares, and can therefore `save`. Tokens are the
    tokenizer's own; `prepend_bos=True` puts a BOS in front."""

    def __init__(
        self, model: Any, *, tokenizer: Any = None, prepend_bos: bool = False, name: str = ""
    ) -> None:
        self.backend_adapter = Backend(model)
        self.model = model
        self._forwards = forwards(model.modules())
        self.tokenizer: Any = plain_tokenizer(model) if tokenizer is None else tokenizer
        check_tokenizer(self.tokenizer)
        self.checkpoint: Checkpoint | None = None
        self._shared_names: frozenset[str] | None = (
            None  # a joint matrix of Q, K and V is held in copies
        )
        self.prepend_bos = prepend_bos
        self.name = name or str(getattr(model.cfg, "model_name", ""))
        self._applied = PatchStack()
        self._first_bits: tuple[int, ...] = ()
        self._in_force: list[Intervention] = []
        self.turn = Turn()
        self.last: Int[Tensor, " prompt"] | None = (
            None  # where each prompt of the pass in progress ends
        )

    @classmethod
    def from_hf(
        cls,
        hf: Any,
        tokenizer: Any,
        *,
        backend: str = "auto",
        prepend_bos: bool = False,
        name: str = "",
    ) -> Lens:
        """Wrap a loaded Hugging Face model of a known architecture; weights are shared, not copied
        or processed.

        `backend`, `prepend_bos`: as `load` takes them. `name`: what results call the model (default:
        the checkpoint's own)."""
        # before the bridge re-registers parameters under other keys
        state = dict(hf.state_dict(keep_vars=True))
        lens = cls(
            wrap(hf, tokenizer, backend), tokenizer=tokenizer, prepend_bos=prepend_bos, name=name
        )
        held = {p.untyped_storage().data_ptr() for p in state.values()}
        every = {name: reader(0) for name, reader in lens._readers().items()}
        shared = {
            name
            for name, w in every.items()
            if w is not None and w.untyped_storage().data_ptr() in held
        }
        lens.checkpoint = Checkpoint(hf, state, lens.model, lens.backend == "bridge")
        lens._shared_names = frozenset(shared)
        if not {"W_out", "W_in", "W_O"} <= shared:
            raise ModelError(
                f"The hooked {type(hf).__name__} holds copies of the checkpoint's weights "
                f"({', '.join(sorted(set(every) - shared))}): edits would not reach it. Use the "
                "other backend."
            )
        return lens

    def __reduce__(self) -> str:
        raise ModelError(
            "A Lens is neither copied nor pickled: hooks and patches hang on its model. Load a second "
            "one, qv.load(...), and apply the patches to it."
        )

    def __repr__(self) -> str:
        return (
            f"Lens({self.name}, {self.backend}, {self.n_layers} layers, d_model {self.d_model}, "
            f"d_mlp {self.d_mlp}, {dtype_name(self.dtype)} on {self.device}, "
            f"patches {len(self._applied)}, interventions {len(self.interventions)})"
        )

    # ------------------------------------------------------------------ what it is

    @property
    def hf(self) -> Any:
        """The Hugging Face model that was wrapped; None for a hooked model of the user's."""
        return None if self.checkpoint is None else self.checkpoint.hf

    @property
    def backend(self) -> str:
        """'hooked' (HookedTransformer) or 'bridge' (TransformerBridge)."""
        return self.backend_adapter.name

    @property
    def n_layers(self) -> int:
        return self.backend_adapter.n_layers

    @property
    def d_model(self) -> int:
        return self.backend_adapter.cfg.d_model

    @property
    def d_mlp(self) -> int:
        return self.w_out(0).shape[0]

    @property
    def d_vocab(self) -> int:
        return self.backend_adapter.unembed()[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.backend_adapter.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backend_adapter.dtype

    def state(self) -> str:
        """Hash of all weights as they are now and of the interventions in force: the key under
        which results are kept on disk. With user-installed hooks it is unique on every call,
        because hooks cannot be compared."""
        description = (
            self.name,
            self.prepend_bos,
            [content(intervention) for intervention in self._in_force],
        )
        unlike = [os.urandom(8)] if self._own_hooks() else []
        weights = (
            name.encode() + checksum(weight) for name, weight in self.model.named_parameters()
        )
        return digest(description, itertools.chain(unlike, weights))

    @property
    def bare_state(self) -> str | None:
        """`state` of the model by itself, under which results of it can be kept for later; None
        while a patch, an intervention or a hook of the user's is in force."""
        return self.state() if self.bare else None

    @property
    def bare(self) -> bool:
        """Whether no patch, intervention or hook of the user's is in force."""
        return not (self.patches or self._in_force or self._own_hooks())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every weight as first seen and of the architecture: 16 hex digits. Patches record
        it."""
        if self._applied:
            raise PatchError(
                "The fingerprint belongs to the unpatched model: revert the patches first."
            )
        self._first_bits = self._bits()
        cfg, backend = self.backend_adapter.cfg, self.backend_adapter
        heads = cfg.n_heads, backend.n_kv_heads
        shape = cfg.n_layers, cfg.d_model, *heads, backend.activation_name, backend.rms
        return digest(shape, map(checksum, backend.every_weight()))

    def written_to(self) -> bool:
        """Whether the weights are others than those that the fingerprint names: patched, or written
        to by hand or through another lens."""
        named = self.fingerprint  # with the bits of the weights it names
        return bool(named) and self._bits() != self._first_bits

    def _bits(self) -> tuple[int, ...]:
        """A sum of the bits of every parameter, tied ones once."""
        places = {(w.data_ptr(), w.numel()): w for w in self.model.parameters()}
        bits = [bit_sum(weight).to(self.device) for weight in places.values()]
        return tuple(torch.stack(bits).tolist())

    def check_layer(self, layer: int) -> int:
        """The layer as an int (also from a frame's column); raises `ConfigError` for one that does
        not exist. Negative numbers never wrap."""
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise ConfigError(
                f"A layer is an integer from 0 to {self.n_layers - 1}, got {layer!r}."
            )
        if not 0 <= layer < self.n_layers:
            raise ConfigError(
                f"Layer {layer} does not exist: this model has layers 0 to {self.n_layers - 1}."
            )
        return int(layer)

    def w_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """The live W_out of a layer: row k is the value vector fc2_k, and writing to it changes the
        next pass."""
        return self.backend_adapter.w_out(self.check_layer(layer))

    def parameter(self, layer: int, name: str) -> Tensor:
        """A live weight by name: 'W_out', 'W_in', 'W_gate', 'W_O', 'W_Q', 'W_K', 'W_V', 'b_in' or
        'b_out'.

        Heads and channels share one axis. Raises `ConfigError` for a weight that the model does not
        have."""
        self.check_layer(layer)
        readers = self._readers()
        weight = readers[name](layer) if name in readers else None
        if weight is None:
            raise ConfigError(
                f"This model has no parameter {name!r} in layer {layer}. Names: "
                f"{', '.join(self.parameter_names)}."
            )
        return weight

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names that `parameter` takes for this model."""
        return tuple(name for name, reader in self._readers().items() if reader(0) is not None)

    def _readers(self) -> dict[str, Callable[[int], Tensor | None]]:
        """A reader for every weight that can be written: for a wrapped checkpoint, the weights that
        the hooked model shares with it."""
        backend = self.backend_adapter
        attention = {
            f"W_{which}": partial(backend.live_w_qkv, which=which) for which in ("Q", "K", "V")
        }
        every = {"W_out": backend.w_out, "W_in": backend.w_in, "W_O": backend.w_o, **attention}
        # its biases are zeros that the hooked classes make up and no checkpoint holds
        if backend.gated:
            every |= {"W_gate": backend.w_gate}
        else:
            every |= {"b_in": backend.b_in, "b_out": backend.stored_b_out}
        return {
            name: reader
            for name, reader in every.items()
            if self._shared_names is None or name in self._shared_names
        }

    # ------------------------------------------------------------------ tokens

    def tokenize(self, facts: Facts) -> list[Prompt]:
        """The prompts as tokens, with the positions of subject and answer (`spans.Prompt`)."""
        return [tokenize(self.tokenizer, fact, self.prepend_bos) for fact in as_list(facts)]

    def str_tokens(self, fact: Fact | str) -> list[str]:
        """The prompt's tokens as readable text."""
        return [self.token_label(i) for i in tokenize(self.tokenizer, fact, self.prepend_bos).ids]

    def token_label(self, token: int) -> str:
        """One vocabulary row as text, as it stands behind a word: with its blank, where it brings
        one. Rows that no token uses are '<unused N>'."""
        if token >= len(self.tokenizer):
            return f"<unused {token}>"
        return following(self.tokenizer.decode, self._word, [token])

    @cached_property
    def _word(self) -> list[int]:
        """Tokens of a word, to read others behind."""
        return list(self.tokenizer("a", add_special_tokens=False)["input_ids"])

    def warn_of_fragments(self, texts: Sequence[str], tokens: Sequence[int]) -> None:
        """Warn where a prompt's answer is asked for by a first token that says nothing of the
        answer: a blank alone, or some bytes of a letter."""
        labels = [self.token_label(token) for token in tokens]
        fragments = {
            text: "a blank alone" if not label.strip() else "a part of a letter"
            for text, label in zip(texts, labels, strict=True)
            if not label.strip() or "\N{REPLACEMENT CHARACTER}" in label
        }
        if fragments:
            text, what = next(iter(fragments.items()))
            others = f" (and {len(fragments) - 1} others)" if len(fragments) > 1 else ""
            remedy = "End the prompt with it, or ask" if what == "a blank alone" else "Ask"
            warnings.warn(
                f"The answer after {text!r:.200}{others} begins with a token that is {what}, as other "
                f"answers there may: what is scored is that alone. {remedy} for the whole answer "
                "(target='sequence', or lens.logprob(..., whole=True)).",
                stacklevel=3,
            )

    # ------------------------------------------------------------------ running

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        hooks: Sequence[Hook] = (),
        start: Start | None = None,
        *,
        last: Sequence[int] | None = None,
    ) -> Float[Tensor, "prompt seq d_vocab"]:
        """One forward pass over token rows of any lengths (right-padded), interventions in force
        and `hooks` applied.

        Keeps the autograd graph if gradients are enabled and something requires them. `start`:
        (layer, the stream in front of it), to leave out the layers below, whose hooks then do not
        run. `last`: where each row's prompt ends, for interventions at its last token (default: at
        the row's end; an answer may follow the prompt)."""
        return self._forward(rows, hooks, start, None, last=last)

    def stream(
        self,
        rows: Sequence[Sequence[int]],
        layer: int,
        hooks: Sequence[Hook] = (),
        start: Start | None = None,
        past: Past | None = None,
        *,
        last: Sequence[int] | None = None,
        under: Sequence[Hook] = (),
    ) -> Float[Tensor, "prompt seq d_model"]:
        """The stream in front of a layer (`n_layers`: after the last one); what lies after it is
        not run.

        `past` (see that method) leaves out the first tokens as well: rows, hooks, `start` and
        result are then those of the tokens after it. `last` as for `logits`. `under`: hooks that run
        before the interventions in force, which then act on what these hooks leave."""
        return self._forward(rows, hooks, start, layer, past, last, under)

    def past(self, start: Start, first: Int[Tensor, " row"]) -> Past | None:
        """Keys and values of each row's tokens in front of `first`, for passes over the tokens
        after it alone.

        None where that is not possible: on a TransformerBridge, and while interventions, or hooks
        of the user's, are in force, which count tokens from the row's beginning."""
        free = self.backend == "hooked" and not self._in_force and not self._own_hooks()
        return self.backend_adapter.past(start, first) if free else None

    def logits_at(
        self,
        rows: Sequence[Sequence[int]],
        where: Sequence[tuple[int, int]],
        hooks: Sequence[Hook] = (),
        start: Start | None = None,
        *,
        last: Sequence[int] | None = None,
    ) -> Float[Tensor, "asked d_vocab"]:
        """`logits` at chosen places alone, each (row, position): with a large vocabulary the
        unembedding of all others would cost as much as many layers.

        `rows`, `hooks`, `start` and `last`: as `logits` takes them."""
        row, position = torch.tensor(where, device=self.device).T
        if self._acts_on_read_out(hooks):
            return self.logits(rows, hooks, start, last=last)[row, position]
        stream = self.stream(rows, self.n_layers, hooks, start, last=last)
        return self._read_out(stream[row, position])

    def answer_logits(
        self, prompts: Sequence[Prompt], hooks: Sequence[Hook] = (), start: Start | None = None
    ) -> Float[Tensor, "token d_vocab"]:
        """Logits of every token of every prompt's answer, each behind those before it, in one pass.

        `hooks` and `start`: as `logits` takes them. Raises `FactError` for a prompt without
        answer."""
        rows = [prompt.row("answer") for prompt in prompts]
        where = [(i, at) for i, prompt in enumerate(prompts) for at in prompt.positions("answer")]
        return self.logits_at(rows, where, hooks, start, last=[prompt.last for prompt in prompts])

    def answer_logprobs(
        self,
        prompts: Sequence[Prompt],
        hooks: Sequence[Hook] = (),
        start: Start | None = None,
        labels: Sequence[tuple[int, ...]] | None = None,
    ) -> Float[Tensor, " token"]:
        """log P(y_j | x, y_<j) of every token of every prompt's answer, in one pass, in order; or of
        other `labels` there. Nats.

        `hooks` and `start`: as `logits` takes them. Raises `FactError` for a prompt without
        answer."""
        targets = [prompt.answer for prompt in prompts] if labels is None else labels
        tokens = [
            token
            for prompt, own in zip(prompts, targets, strict=True)
            for _, token in zip(prompt.answer, own, strict=True)
        ]
        logp = log_probs(self.answer_logits(prompts, hooks, start))
        return logp.gather(1, torch.tensor(tokens, device=logp.device)[:, None])[:, 0]

    def read_out(
        self,
        stream: Float[Tensor, "*batch d_model"],
        scale: Float[Tensor, "*batch 1"] | None = None,
    ) -> Float[Tensor, "*batch d_vocab"]:
        """Logits of final stream vectors: the final norm and the unembedding. `scale`: the final
        norm's sigma (default: the vectors' own). Raises what `check_read_out` raises."""
        self.check_read_out()
        return self._read_out(stream, scale)

    def _read_out(
        self,
        stream: Float[Tensor, "*batch d_model"],
        scale: Float[Tensor, "*batch 1"] | None = None,
    ) -> Float[Tensor, "*batch d_vocab"]:
        """The same where it is known that nothing acts there."""
        weight, bias = self.backend_adapter.unembed()
        normed = self.backend_adapter.norm(None)(stream, scale)
        return capped(normed @ weight + bias, self.backend_adapter.logit_cap)

    def check_read_out(self) -> None:
        """Raise `ConfigError` while anything acts on the final norm or the unembedding: whatever
        reads vectors out by their weights alone would not hear it."""
        if self._acts_on_read_out(()):
            raise ConfigError(
                "A hook or an intervention of your own acts on the final norm, the unembedding or "
                "the model's output, which this reads by their weights: take it off "
                "(model.reset_hooks()). lens.logprob, lens.trace and lens.generate hear it."
            )

    def _acts_on_read_out(self, hooks: Sequence[Hook]) -> bool:
        """Whether anything acts after the last layer: one of these hooks, an intervention in force,
        or a hook of the user's."""
        if any(name.startswith(READ_OUT) for name, _ in (*self._forced(), *hooks)):
            return True
        within = (getattr(self.model, part).modules() for part in READ_OUT)
        behind = getattr(self.model, "original_model", None)
        around = [self.model, behind, getattr(behind, "base_model", None)]
        outer = [module for module in around if module is not None]
        return bool(own_hooks(itertools.chain(outer, *within)))

    def _forced(self) -> list[Hook]:
        """Fresh hooks of the interventions in force."""
        return [hook for intervention in self._in_force for hook in intervention.hooks(self)]

    def _forward(
        self,
        rows: Sequence[Sequence[int]],
        hooks: Sequence[Hook],
        start: Start | None,
        stop: int | None,
        past: Past | None = None,
        last: Sequence[int] | None = None,
        under: Sequence[Hook] = (),
    ) -> Tensor:
        self._check_context(rows)
        check_mode(self.device)
        ids = pad(rows).to(self.device)
        ends = [len(row) - 1 for row in rows] if last is None else list(last)
        with self.turn.one_pass():
            outer = self.last
            self.last = torch.tensor(ends, device=self.device)
            try:
                forced = self._forced()
                start = None if forced else start  # an intervention may act, or look, below
                installed = [*under, *ordered([*forced, *hooks])]
                with self.backend_adapter.hooks(installed, ids.shape):
                    return self.backend_adapter.run(ids, start, stop, past)
            finally:
                self.last = outer

    def _check_context(self, rows: Sequence[Sequence[int]]) -> None:
        last = max(max(row, default=0) for row in rows)
        if last >= self.d_vocab:
            raise ModelError(
                f"The token {self.tokenizer.decode([last])!r} has number {last}, and the model has "
                f"{self.d_vocab} tokens: this tokenizer is not its own, or the model was not resized "
                "for tokens that were added."
            )
        lengths = [len(row) for row in rows]
        longest, limit = max(lengths), self.backend_adapter.cfg.n_ctx
        if longest > limit:
            config = getattr(self._hugging_face, "config", None)
            held = getattr(config, "max_position_embeddings", None) or limit
            more = f", or load it with backend='bridge', which has the checkpoint's {held}"
            raise ConfigError(
                f"A prompt of {longest} tokens is longer than the model's context of {limit}. "
                f"Shorten it{more if held > limit else ''}."
            )
        if self._short is not None and min(lengths) <= self._short < longest:
            raise ConfigError(
                f"The rotary positions of {self.name} are others in passes of more than {self._short} "
                f"tokens, for every prompt of the pass; here one has {longest}, another "
                f"{min(lengths)}. Ask them apart."
            )

    @cached_property
    def _short(self) -> int | None:
        """Up to which length of a pass the rotary positions are those of short texts."""
        return None if self._hugging_face is None else short_context(self._hugging_face.config)

    @property
    def _hugging_face(self) -> Any | None:
        """The Hugging Face model that was wrapped; None for a HookedTransformer of the user's."""
        return self.hf or getattr(self.model, "original_model", None)

    @torch.no_grad()
    def next_token_logits(
        self, facts: Facts, batch_size: int = 64
    ) -> Float[Tensor, "prompt d_vocab"]:
        """Logits of the token after each prompt, in the order given (float32 or better); `batch_size`
        prompts a pass, those of like length together."""
        check_count("batch_size", batch_size)
        rows = [prompt.ids for prompt in self.tokenize(facts)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out: dict[int, Tensor] = {}
        for at in range(0, len(order), batch_size):
            chunk = order[at : at + batch_size]
            ends = [(r, len(rows[i]) - 1) for r, i in enumerate(chunk)]
            logits = at_least_float32(self.logits_at([rows[i] for i in chunk], ends))
            out.update(zip(chunk, logits, strict=True))
        return torch.stack([out[i] for i in range(len(rows))])

    @overload
    def logprob(
        self, fact: Fact | str, answer: str | None = None, *, whole: bool = False
    ) -> float: ...
    @overload
    def logprob(
        self, fact: Sequence[Fact | str], answer: str | None = None, *, whole: bool = False
    ) -> list[float]: ...

    def logprob(
        self, fact: Facts, answer: str | None = None, *, whole: bool = False
    ) -> float | list[float]:
        """log p(first token of the answer | prompt), natural log, or with `whole` that of all its
        tokens, each behind those before it. `answer` asks for another answer by name."""
        facts = as_list(fact)
        targets = [self.answer_ids(each, answer) for each in facts]
        if whole:
            values = self._of_whole_answers(facts, targets)
        else:
            texts = [each if isinstance(each, str) else each.text for each in facts]
            self.warn_of_fragments(texts, [target[0] for target in targets])
            logp = log_probs(self.next_token_logits(facts))
            values = [logp[i, target[0]].item() for i, target in enumerate(targets)]
        return values[0] if isinstance(fact, (Fact, str)) else values

    @torch.no_grad()
    def _of_whole_answers(
        self, facts: Sequence[Fact | str], targets: Sequence[tuple[int, ...]]
    ) -> list[float]:
        pairs = zip(self.tokenize(facts), targets, strict=True)
        prompts, values = [replace(prompt, answer=target) for prompt, target in pairs], []
        for begin in range(0, len(prompts), TOGETHER):
            chunk = prompts[begin : begin + TOGETHER]
            lengths = [len(prompt.answer) for prompt in chunk]
            values += [float(own.sum()) for own in self.answer_logprobs(chunk).split(lengths)]
        return values

    def answer_ids(self, fact: Asked | str, answer: str | None = None) -> tuple[int, ...]:
        """Tokens of the fact's (or probe's) answer, or of another one by name, as they follow the
        prompt."""
        if answer is None and isinstance(fact, str):
            raise ConfigError(f"The bare prompt {fact!r} has no answer: pass a Fact or answer=.")
        text = fact if isinstance(fact, str) else fact.text
        wanted = fact.answer if answer is None and not isinstance(fact, str) else answer
        space = None if isinstance(fact, str) else fact.space
        return continuation(self.tokenizer, text, wanted, self.prepend_bos, space)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def generate(
        self,
        text: Facts,
        max_new_tokens: int = 32,
        batch_size: int = 16,
        *,
        top_k: int | None = None,
        seed: int = 0,
        enough: Callable[[str], bool] | None = None,
        runs_on: str = "",
    ) -> Any:
        """The continuation of a text or a fact's prompt, of at most `max_new_tokens`, or of each of
        several (`batch_size` a pass): greedy, or with `top_k` sampled from the likeliest tokens
        (`seed`; a text's draws depend on no other text, so the same text gets the same ones).

        Special tokens are left out. A continuation ends at an end-of-text token (the tokenizer's,
        or any of the checkpoint's generation_config, of which nothing else is used), where it fills
        the context (with a warning), or where `enough` says that the continuation so far is all
        that is wanted. `runs_on` is put behind one that was cut off before its end of text.

        Without interventions in force it runs on the Hugging Face model (same weights) with its
        cache; with them, or with user-installed hooks, on the hooked model without one."""
        check_count("max_new_tokens", max_new_tokens, 0)
        check_count("batch_size", batch_size)
        seed = check_seed(seed)
        if top_k is not None:
            check_count("top_k (None: greedy)", top_k)
            top_k = min(top_k, self.d_vocab)
        rows = [list(prompt.ids) for prompt in self.tokenize(text)]
        self._check_context(rows)
        check_mode(self.device)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        sample = None if top_k is None else Sampling(top_k, seed)
        finished = None if enough is None else lambda ids: enough(decode(ids))
        hf = None if self._in_force or self._own_hooks() else self._alike()
        way = partial(plain, self.logits) if hf is None else partial(cached, hf)
        step = partial(way, eos=self.ends_of_text, sampling=sample, enough=finished)
        # a token that only fills a row up gives NaN in a bridge's attention, and in BLOOM's in float64
        padded = self.backend != "bridge" and self.dtype != torch.float64
        of_one_length = hf is not None and not padded
        context = self.backend_adapter.cfg.n_ctx
        with self.turn.one_pass():
            new = continued(step, rows, max_new_tokens, context, batch_size, of_one_length)
        texts = [
            following(decode, row, ids)
            + (runs_on if len(ids) == min(max_new_tokens, context - len(row)) else "")
            for row, ids in zip(rows, new, strict=True)
        ]
        return texts[0] if isinstance(text, (str, Fact)) else texts

    @property
    def ends_of_text(self) -> frozenset[int]:
        """Every token that ends a text."""
        return ends_of_text(self.tokenizer, self.d_vocab, self._hugging_face)

    def _own_hooks(self) -> tuple[Any, ...]:
        """The user-installed hooks: between two passes there are no others. A forward that stood in
        its module's place when the model was wrapped is part of the model."""
        hooks = own_hooks(self.model.modules())
        return tuple(hook for hook in hooks if not any(hook is own for own in self._forwards))

    def _alike(self) -> Any | None:
        """The Hugging Face model that computes what the hooked model does: a bridge runs it, a
        HookedTransformer may share its weights with it. None where there is none."""
        if self.backend == "bridge":
            return self.model.original_model
        return self.hf if self.checkpoint is not None and self.checkpoint.alike() else None

    def rows(self, facts: Facts, positions: Positions = "last") -> Rows:
        """The prompts and their positions: one of each (a name or an index), 'all' of them, or those
        that predict the 'answer' token by token. Raises `FactError` for what does not tokenise."""
        records = as_list(facts)
        prompts = self.tokenize(records)
        where = [prompt.positions(positions) for prompt in prompts]
        prompt = [i for i, chosen in enumerate(where) for _ in chosen]
        position = [p for chosen in where for p in chosen]
        return Rows(
            tuple(records),
            tuple(prompts),
            torch.tensor(prompt, device=self.device),
            torch.tensor(position, device=self.device),
        )

    @torch.no_grad()
    def trace(
        self,
        facts: Facts,
        positions: Positions = "last",
        *,
        attention: bool = False,
        batch_size: int = 64,
    ) -> Trace:
        """Capture the passes of the prompts, `batch_size` in each, at the positions that `rows` gives.
        `attention` keeps patterns and value vectors as well."""
        check_count("batch_size", batch_size)
        rows = self.rows(facts, positions)
        prompts = rows.prompts
        where = [prompt.positions(positions) for prompt in prompts]
        ids = [prompt.row(positions) for prompt in prompts]
        parts = []
        for chunk in (slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)):
            run = partial(self.logits, ids[chunk], last=[prompt.last for prompt in prompts[chunk]])
            parts.append(capture(self.backend_adapter, run, where[chunk], attention))
        captured = joined(parts)
        return Trace(
            rows.facts,
            prompts,
            rows.prompt,
            rows.positions,
            **captured._asdict(),
            setup=self.setup,
            scale=scales_after(self.backend_adapter, captured.m, captured.z),
        )

    @property
    def label(self) -> dict[str, Any]:
        """What results are labelled with: the model, its layers and backend, and the fingerprint, or
        "patched" while a patch is applied; the interventions in force, where there are any; versions; no seed
        where nothing is drawn."""
        label = {
            "model": self.name,
            "layers": self.n_layers,
            "backend": self.backend,
            "fingerprint": "patched" if self.patches else self.fingerprint,
            "versions": versions(),
            "seed": None,
        }
        return (
            {**label, "interventions": "; ".join(map(repr, self._in_force))}
            if self._in_force
            else label
        )

    @property
    def setup(self) -> Setup:
        """What a trace is taken on: every parameter by a sum of its bits, tied ones once."""
        return Setup(
            self.fingerprint,
            self.patches,
            self._bits(),
            self.interventions,
            self._own_hooks(),
        )

    def traced(
        self, facts: Facts | Trace, positions: Positions = "last", *, attention: bool = False
    ) -> Trace:
        """A trace of the facts, or the one given. Raises `ConfigError` for one taken on other
        weights, or under other interventions or hooks."""
        if not isinstance(facts, Trace):
            return self.trace(facts, positions, attention=attention)
        if facts.setup is not None:
            facts.setup.check(self.setup, self.name)
        return facts

    # ------------------------------------------------------------------ interventions

    @contextmanager
    def intervene(self, *interventions: Intervention) -> Iterator[Lens]:
        """Put interventions in force for every forward pass inside the block; nests, also with
        `patched`."""
        own: list[Intervention] = []
        with self.turn.held():
            try:
                for intervention in interventions:
                    _check_intervention(intervention)
                    intervention.check(self)
                    self._in_force.append(intervention)
                    own.append(intervention)
                yield self
            finally:
                for intervention in reversed(own):  # a block begun inside may still be open
                    where = [i for i, entry in enumerate(self._in_force) if entry is intervention]
                    del self._in_force[where[-1]]

    # ------------------------------------------------------------------ patches

    def check_patch(self, patch: Patch) -> None:
        """Raise `PatchError` unless a patch was made for this lens's own base weights."""
        if patch.fingerprint != self.fingerprint:
            made_in = patch.info.get("dtype", "")
            raise PatchError(
                f"This patch was made for a model with fingerprint {patch.fingerprint}, not for "
                f"{self.name} ({self.fingerprint}). Load the model it names "
                f"({patch.info.get('model', 'unknown')}"
                f"{made_in and f', dtype={made_in!r}'}), weights unprocessed."
            )
        check_fits(patch, self.parameter)

    def apply(self, patch: Patch) -> None:
        """Write a patch into the live weights, on top of those applied before; `revert` takes it
        back bit for bit.

        Raises `PatchError` if the patch was made for other weights, or leads out of the range of
        their type; nothing is written then.
        """
        self._write(patch)

    def _write(self, patch: Patch, level: int = 3) -> None:
        if not hasattr(patch, "deltas"):
            raise PatchError(
                f"A patch is what qv.edit gives or Patch.load(folder), got {patch!r:.100}."
            )
        self.check_patch(patch)
        if any(patch is other for other in self.patches):
            warnings.warn(
                "This patch is in force already, and is now written twice: lens.revert() takes the "
                "second writing back.",
                stacklevel=level,
            )
        with self.turn.one_pass():
            self._applied.push(patch, self.parameter)

    def revert(self) -> Patch:
        """Take back the patch applied last: the saved tensors are restored, not subtracted. Returns
        the patch.

        Raises `PatchError` where there is none, or none inside the innermost `patched` block."""
        with self.turn.one_pass():
            return self._applied.pop(self.parameter)

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The interventions in force, in order."""
        return tuple(self._in_force)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches applied at present, oldest first."""
        return self._applied.patches

    def before_patches(self, first: int = 0) -> dict[tuple[int, str], Tensor]:
        """Every weight that the patches from the `first` on have changed, as it was before them."""
        return self._applied.replaced(first)

    @contextmanager
    def patched(self, *patches: Patch) -> Iterator[Lens]:
        """The model with patches applied inside the block; the weights are back bit for bit after
        it."""
        with self.turn.held():
            mark = self._applied.begin()
            try:
                for patch in patches:
                    self._write(patch, level=4)
                yield self
            finally:
                self._applied.leave(mark, self.parameter)

    def plain_model(self) -> Any:
        """The Hugging Face model behind the lens. Its weights are the lens's own, patches included;
        interventions it does not see.

        Raises `ModelError` where there is none, or it no longer holds the weights; `ConfigError`
        while interventions or hooks are in force."""
        if self._in_force or self._own_hooks():
            raise ConfigError(
                "Interventions or hooks are in force, which the Hugging Face model behind the lens "
                "does not see: leave them first, or write the change as a patch."
            )
        return self._holder().whole()

    def _holder(self) -> Checkpoint:
        """What the lens was made of. Raises `ModelError` for a hooked model of the user's."""
        if self.checkpoint is None:
            raise ModelError(
                "This Lens has no Hugging Face model behind it: build it with qv.load or "
                "qv.Lens.from_hf."
            )
        return self.checkpoint

    def save(self, folder: str | Path) -> Path:
        """Write the model as it now is, patches included, as a checkpoint that transformers alone
        can load.

        Raises `ModelError` without a Hugging Face model behind the lens, or where it no longer
        holds the weights; `ConfigError` for a folder in use, and while interventions or hooks are in
        force, which no checkpoint holds."""
        self.plain_model()
        return self._holder().save(folder, self.tokenizer)


def check_lens(lens: object) -> None:
    """Raise `ConfigError` for anything but a Lens, which is what every verb takes first."""
    made = "wrap it, qv.Lens(model)" if hasattr(lens, "hook_dict") else "qv.load(name) gives one"
    check_kind(lens, Lens, f"The first argument is a model as a qv.Lens ({made})")


def as_list(facts: Facts) -> list[Fact | str]:
    """One fact or many, as a list. Raises `ConfigError` for none."""
    records = list(one_or_more(facts))
    if not records:
        raise ConfigError("No facts were given: pass at least one Fact or prompt.")
    for record in records:
        if not isinstance(record, (Fact, str)):
            raise ConfigError(
                f"A prompt is a qv.Fact or a text, got {type(record).__name__}. Of a case or a "
                "request take its fact: case.request.fact, request.fact; a file of records is read "
                "by qv.read."
            )
    return records


def log_probs(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """log p of every next token, in float32 or better."""
    return at_least_float32(logits).log_softmax(-1)


def _check_intervention(intervention: object) -> None:
    """Raise `ConfigError` for anything else."""
    if not hasattr(intervention, "hooks") or isinstance(intervention, type):
        words = repr(intervention).splitlines()[0]
        raise ConfigError(
            f"An intervention is qv.Zero(neurons), Scale, Replace or Suppress; got {words:.100}."
        )
