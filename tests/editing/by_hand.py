"""Closed forms written out once more on Hugging Face's GPT-J alone: one fact, one row, one step at
a time, in float64.

Nothing of the package is called. A site is a Hugging Face module, whose output is read or added to
at some positions of a row; systems are solved by LU in their primal form."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

FFN, ATTENTION, BLOCK = (
    "transformer.h.{}.mlp.fc_out",
    "transformer.h.{}.attn.out_proj",
    "transformer.h.{}",
)


@dataclass
class Row:
    """Token ids, the positions where the fact is read and written, those that predict the answer,
    the answer's tokens."""

    ids: list[int]
    lookup: list[int]
    predicts: list[int]
    answer: list[int]


@dataclass
class Settings:
    """Of one search."""

    steps: int
    lr: float
    decay: float
    clamp: float
    kl: float
    drop: bool = False  # PMET's phi and stop
    mean: bool = False  # R-ROME's start


@dataclass
class Hand:
    """A Hugging Face model, its tokenizer, and the contexts."""

    hf: torch.nn.Module
    tokenizer: object
    templates: tuple[str, ...]
    stop: float = 0.05
    losses: list[list[float]] = field(default_factory=list)

    # ------------------------------------------------------------------ rows

    def row(self, prompt: str, subject: str | None, answer: str, token: str) -> Row:
        text = prompt if subject is None else prompt.replace("{}", subject)
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        whole = self.tokenizer(text + " " + answer)["input_ids"]
        asked = whole[len(ids) :]
        predicts = list(range(len(ids) - 1, len(ids) - 1 + len(asked)))
        if token == "last":
            return Row(whole[:-1], predicts, predicts, asked)
        end = prompt.index("{}") + len(subject)
        (at,) = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end <= b]
        return Row(whole[:-1], [at], predicts, asked)

    def rows(self, request, token: str, via: bool = False) -> list[list[Row]]:
        """By context, the bare one first: one row, or one per multi-hop prompt."""
        out = []
        for template in self.templates:
            if via and request.via:
                out.append(
                    [
                        self.row(template.replace("{}", text), None, request.new, token)
                        for text in request.via
                    ]
                )
            else:
                prompt = template.replace("{}", request.fact.prompt)
                out.append([self.row(prompt, request.fact.subject, request.new, token)])
        return out

    # ------------------------------------------------------------------ passes

    def run(self, ids, added=(), read=()):
        """Logits of one row; `added`: (module, positions, vector); `read`: modules, "<" in front
        for what they are given."""
        modules, handles, seen = dict(self.hf.named_modules()), [], {}

        def adder(positions, vector):
            def hook(_module, _inputs, output):
                bare = output[0] if isinstance(output, tuple) else output
                move = torch.zeros_like(bare)
                move[0, positions] = move[0, positions] + vector
                return (bare + move, *output[1:]) if isinstance(output, tuple) else bare + move

            return hook

        def reader(name):
            def hook(_module, inputs, output):
                value = (
                    inputs[0]
                    if name.startswith("<")
                    else output[0]
                    if isinstance(output, tuple)
                    else output
                )
                seen[name] = value[0]

            return hook

        for name, positions, vector in added:
            handles.append(modules[name].register_forward_hook(adder(positions, vector)))
        for name in read:
            handles.append(modules[name.lstrip("<")].register_forward_hook(reader(name)))
        try:
            logits = self.hf(torch.tensor([ids])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen

    def value(self, row: Row, name: str) -> torch.Tensor:
        """What a module gives (or is given) at the row's lookup positions, their mean."""
        with torch.no_grad():
            _, seen = self.run(row.ids, read=(name,))
        return seen[name][row.lookup].mean(0)

    def bare(self, rows: list[list[Row]], name: str) -> torch.Tensor:
        return torch.stack([self.value(row, name) for row in rows[0]]).mean(0)

    def mean(self, rows: list[list[Row]], name: str) -> torch.Tensor:
        return torch.stack([self.value(row, name) for context in rows for row in context]).mean(0)

    def halves(self, rows: list[list[Row]], name: str) -> torch.Tensor:
        if len(rows) == 1:
            return self.bare(rows, name)
        others = torch.stack(
            [self.value(row, name) for context in rows[1:] for row in context]
        ).mean(0)
        return (self.bare(rows, name) + others) / 2

    # ------------------------------------------------------------------ v*

    def search(
        self, request, token: str, rows: list[list[Row]], sites: list[str], s: Settings
    ) -> list[torch.Tensor]:
        asked = [row for context in rows for row in context]
        kl_row = self.row("{} is a", request.fact.subject, request.fact.answer, token)
        encoded = self.tokenizer(f"{request.fact.subject} is a")["input_ids"]
        kl_at = len(encoded) - 1 if token == "last" else kl_row.lookup[0]
        inits = [self.mean(rows, site) if s.mean else self.bare(rows, site) for site in sites]
        deltas = [torch.zeros_like(init, requires_grad=True) for init in inits]
        adam, phi, start = torch.optim.Adam(deltas, lr=s.lr), 1.0, None
        for step in range(s.steps):
            nlls, right = [], True
            for row in asked:
                logits, _ = self.run(
                    row.ids, [(site, row.lookup, d) for site, d in zip(sites, deltas, strict=True)]
                )
                logp = logits[row.predicts].log_softmax(-1)
                nlls.append(-logp[range(len(row.answer)), row.answer].mean())
                right = right and logp.argmax(-1).tolist() == row.answer
            logits, _ = self.run(
                encoded, [(site, [kl_at], d) for site, d in zip(sites, deltas, strict=True)]
            )
            now = logits[kl_at].log_softmax(-1)
            start = now.detach() if start is None else start
            kl = s.kl * (now.exp() * (now - start)).sum()
            decay = s.decay * sum(
                d.norm() / init.norm() ** 2 for d, init in zip(deltas, inits, strict=True)
            )
            loss = phi * torch.stack(nlls).mean() + kl + decay
            self.losses.append([float(loss), float(torch.stack(nlls).mean()), float(kl)])
            if loss < self.stop or (s.drop and right and kl <= 0.01) or step == s.steps - 1:
                break
            phi = 0.1 if s.drop and right else 1.0
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                for d, init in zip(deltas, inits, strict=True):
                    if d.norm() > s.clamp * init.norm():
                        d *= s.clamp * init.norm() / d.norm()
        return [(init + d).detach() for init, d in zip(inits, deltas, strict=True)]

    # ------------------------------------------------------------------ writing

    def weight(self, name: str) -> torch.Tensor:
        """[d_key, d_model], as W_out is laid out."""
        return dict(self.hf.named_parameters())[f"{name}.weight"].data.T

    def spread(
        self, requests, rows, z, sites, groups, share, solve, token, modules=("ffn",), bare=None
    ) -> None:
        """Write the groups' layers: `solve(name, layer, K, R)` gives dW; `z[i][s]` is request i's
        target at site s."""
        bare = bare or self.bare
        for group in groups:
            for i, layer in enumerate(group):
                names = [
                    (FFN if module == "ffn" else ATTENTION).format(layer) for module in modules
                ]
                keys = {
                    name: torch.stack([self.halves(r, f"<{name}") for r in rows], 1)
                    for name in names
                }
                for name, module in zip(names, modules, strict=True):
                    s = 0 if module == "ffn" else 1
                    cur = torch.stack([bare(r, sites[s]) for r in rows])
                    R = (torch.stack([targets[s] for targets in z]) - cur).T / share(len(group) - i)
                    self.weight(name).add_(solve(name, layer, keys[name], R))


def ridge(C0, lam):
    """MEMIT's system (Eq. 11): (lam C0 + K K^T) dW = K R^T."""
    return lambda name, layer, K, R: torch.linalg.solve(lam * C0[name] + K @ K.T, K @ R.T)
