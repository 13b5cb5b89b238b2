"""Train the two bundled models, toy-gptj and toy-qwen3, on the bundled world.

    python -m experiments.toys.train toy-gptj --minutes 40 --threads 1 --lr 6e-3 --out runs/toy-gptj
    python -m experiments.toys.train toy-qwen3 --minutes 40 --threads 1 --lr 6e-3 \\
        --out runs/toy-qwen3

1. A byte-level BPE tokenizer is trained so that every object that is not a person's name is one
   token.
2. Documents of the world are packed into rows; attention never crosses from one document into
   another. The loss counts the answers' tokens fully and all others at 5%.
3. In half of the batches of short documents (37% of the steps) a part of attention is hidden while
   training: after a subject, only its last token can be read, and that only from layer `cut` on
   (`cut` drawn again each time, up to half of the layers). So a fact has to be looked up at the
   subject's last token in lower layers, where the papers edit, as real models do. The architecture
   is untouched: at inference nothing is hidden.
4. Muon (hidden matrices) and AdamW (all else), learning rate warmed up, held, and brought down to 0
   over the last 40% of the time. Time, not steps, sets the schedule, so that a run fits the
   machine.
5. A checkpoint every two minutes: starting the same command again resumes. At the end a Hugging
   Face folder and card.json (seeds, steps, tokens, minutes, machine, versions, accuracies).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import qv_lens as qv
from qv_lens.world import generator, words
from qv_lens.world.acceptance import knowledge

EOT = "<|endoftext|>"
VOCAB = 1536
# batch, tokens, share of steps
ROWS = {"short": (48, 96, 0.74), "cot": (24, 192, 0.19), "long": (9, 512, 0.07)}


def train_tokenizer(world: generator.World, folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE; objects are frequent in its corpus and become one token, names stay in
    pieces."""
    lines = [
        f" {name}"
        for name in (
            *world.objects,
            *world.entities["company"],
            *world.entities["sport"],
            *world.entities,
        )
    ] * 400
    lines += [*world.entities["country"], *world.entities["sport"], *world.entities["company"]] * 40
    phrases = [
        p.replace("{}", ".") for r in words.RELATIONS for p in (*r.phrasings, *r.noun, r.label)
    ]
    lines += [w for p in phrases for w in (p, " " + p[:1].lower() + p[1:])] * 60
    lines += [
        "Question: Who\nThoughts: a.\nAnswer: b\n\nQuestion: What\nThoughts:",
        " is a",
        "? .",
    ] * 200
    lines += [name for pair in world.aliases.items() for name in (pair[0], *pair[1])] * 3
    lines += [name for kind in ("person", "firm", "work") for name in world.entities[kind]] * 3
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOT,
        eos_token=EOT,
        unk_token=EOT,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    long = [o for o in world.objects if len(tokenizer.encode(f" {o}")) != 1]
    if long:
        raise SystemExit(f"objects of more than one token: {long}")
    return tokenizer


def new_model(name: str, vocab: int) -> GPTJForCausalLM | Qwen3ForCausalLM:
    """The architecture of each toy, randomly initialised from the global seed."""
    if name == "toy-gptj":
        config = GPTJConfig(
            vocab_size=vocab,
            n_positions=1024,
            n_embd=128,
            n_layer=12,
            n_head=4,
            rotary_dim=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
        return GPTJForCausalLM(config)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, [rows, tokens] each: token ids, loss weights, and what attention
    may see."""

    ids: torch.Tensor
    weight: torch.Tensor
    doc: torch.Tensor
    sentence: torch.Tensor
    subject: torch.Tensor  # 1: inside the subject, 2: its last token
    after: torch.Tensor  # after the subject, same sentence

    def to(self, device: str) -> Batch:
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def masks(self, hide: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Additive attention masks [rows, 1, query, key] for the layers below `cut` and from `cut`
        on."""
        T = self.ids.shape[1]
        allowed = (self.doc[:, :, None] == self.doc[:, None, :]) & torch.ones(
            T, T, dtype=torch.bool, device=self.ids.device
        ).tril()
        low = high = allowed
        if hide:
            behind = (self.sentence[:, :, None] == self.sentence[:, None, :]) & self.after[
                :, :, None
            ]
            low = allowed & ~(behind & (self.subject[:, None, :] > 0))
            high = allowed & ~(behind & (self.subject[:, None, :] == 1))
        bias = [
            torch.zeros(m.shape, device=m.device).masked_fill_(~m, -1e9)[:, None]
            for m in (low, high)
        ]
        return bias[0], bias[1]


def encode(
    tokenizer: PreTrainedTokenizerFast, document: generator.Document, bos: bool
) -> list[list[int]]:
    """Columns ids, weight (percent), sentence, subject, after; one entry per token."""
    encoding = tokenizer.backend_tokenizer.encode(generator.text(document))
    ids, spans = encoding.ids, encoding.offsets
    weight, sentence, subject, after = (
        [5] * len(ids),
        [0] * len(ids),
        [0] * len(ids),
        [0] * len(ids),
    )
    start, t = 0, 0
    for number, piece in enumerate(document):
        stop = start + len(piece.text)
        last = None if piece.subject is None else start + piece.subject[1]
        while t < len(ids) and spans[t][0] < stop:
            a, b = spans[t]
            sentence[t] = number
            if any(a >= start + x and b <= start + y for x, y in piece.answers):
                weight[t] = 100
            if last is not None and b > start + piece.subject[0] and a < last:
                subject[t] = 2 if b >= last else 1
            after[t] = int(last is not None and a >= last)
            t += 1
        start = stop
    columns = [ids, weight, sentence, subject, after]
    if bos:
        columns = [[first, *c] for first, c in zip((0, 0, 0, 0, 0), columns, strict=True)]
    return [[*c, end] for c, end in zip(columns, (0, 5, len(document), 0, 0), strict=True)]


def batches(
    tokenizer: PreTrainedTokenizerFast, world: generator.World, rng: random.Random, kind: str
) -> Iterator[Batch]:
    """Documents packed greedily into rows, in the order in which they are written."""
    rows, length, _ = ROWS[kind]
    streams = [
        generator.cot_documents(world, rng, k) for k in ((1, 2) if kind == "cot" else (5, 8))
    ]
    stream = [generator.documents(world, rng)] if kind == "short" else streams
    waiting: list[list[int]] | None = None
    while True:
        packed = torch.zeros(6, rows, length, dtype=torch.long)
        packed[2] = -1
        for row in range(rows):
            used, number = 0, 0
            while True:
                if waiting is None:
                    waiting = encode(tokenizer, next(rng.choice(stream)), bos=rng.random() < 0.15)
                size = len(waiting[0])
                if size > length:
                    waiting = None
                    continue
                if used + size > length:
                    break
                packed[[0, 1, 3, 4, 5], row, used : used + size] = torch.tensor(waiting)
                packed[2, row, used : used + size] = number
                used, number, waiting = used + size, number + 1, None
        yield Batch(packed[0], packed[1] / 100, packed[2], packed[3], packed[4], packed[5].bool())


def forward(
    model: torch.nn.Module, ids: torch.Tensor, low: torch.Tensor, high: torch.Tensor, cut: int
) -> torch.Tensor:
    """Logits [rows, tokens, vocab]; layers below `cut` read through mask `low`, the others through
    `high`."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape)
    if isinstance(model, GPTJForCausalLM):
        x, blocks, norm = model.transformer.wte(ids), model.transformer.h, model.transformer.ln_f
        extra = {"position_ids": positions}
    else:
        x, blocks, norm = model.model.embed_tokens(ids), model.model.layers, model.model.norm
        extra = {"position_embeddings": model.model.rotary_emb(x, positions)}
    for layer, block in enumerate(blocks):
        out = block(x, attention_mask=low if layer < cut else high, **extra)
        x = out[0] if isinstance(out, tuple) else out
    return model.lm_head(norm(x))


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the next token inside a document, weighted."""
    weight = batch.weight[:, 1:] * (batch.doc[:, 1:] == batch.doc[:, :-1]) * (batch.doc[:, 1:] >= 0)
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none"
    )
    return (loss * weight.flatten()).sum() / weight.sum()


def optimizers(model: torch.nn.Module, lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, head, gains and biases."""
    blocks = [
        p for n, p in model.named_parameters() if p.ndim == 2 and (".h." in n or ".layers." in n)
    ]
    ids = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(blocks, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def rate(progress: float) -> float:
    """Learning-rate factor at share `progress` of the time: warm-up 1%, flat, then linearly down over
    the last 40%."""
    return min(progress / 0.01, 1.0, max(0.0, (1 - progress) / 0.4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("toy-gptj", "toy-qwen3"))
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    world = generator.build(args.seed)
    tokenizer = train_tokenizer(world, args.out)
    model = new_model(args.name, len(tokenizer)).to(args.device).train()
    opts = optimizers(model, args.lr, args.decay)
    step = tokens = 0
    spent = 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        step, tokens, spent = state["step"], state["tokens"], state["spent"]
    rng = random.Random(f"train:{args.seed}:{step}")
    streams = {kind: batches(tokenizer, world, rng, kind) for kind in ROWS}
    last = saved_at = time.monotonic()
    bar = tqdm(total=round(args.minutes * 60), initial=round(spent), unit="s")
    log = (args.out / "log.csv").open("a")
    while spent < args.minutes * 60:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * rate(spent / (args.minutes * 60))
        kind = rng.choices(list(ROWS), [share for *_, share in ROWS.values()])[0]
        batch = next(streams[kind]).to(args.device)
        hide = kind == "short" and rng.random() < 0.5
        cut = rng.randint(2, model.config.num_hidden_layers // 2) if hide else 0
        # the weights stay fp32; 2.1 times the speed of fp32 here
        with torch.autocast(args.device, torch.bfloat16):
            logits = forward(model, batch.ids, *batch.masks(hide), cut)
        loss = answer_loss(logits, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + batch.ids.numel()
        now = time.monotonic()
        spent, last = spent + now - last, now
        bar.update(round(spent) - bar.n)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()} at step {step}; start again with a lower --lr")
        log.write(f"{step},{spent:.1f},{kind},{cut},{loss.item():.4f}\n")
        if now - saved_at > 120 or spent >= args.minutes * 60:
            log.flush()
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in opts],
                "step": step,
                "tokens": tokens,
                "spent": spent,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            saved_at = now
    model.save_pretrained(args.out)
    knows = knowledge(qv.load(args.out, device=args.device))
    machine = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads"
    )
    card = {
        "model": args.name,
        "seed": args.seed,
        "steps": step,
        "tokens": tokens,
        "minutes": round(spent / 60, 1),
        "lr": args.lr,
        "weight_decay": args.decay,
        "rows": ROWS,
        "mix": generator.MIX,
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "accuracies": {row.measure: round(row.measured, 4) for row in knows.itertuples()},
    }
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
