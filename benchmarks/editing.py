"""Speed of editing: many facts at once and partial passes, against one by one with full passes.

    OMP_NUM_THREADS=2 python benchmarks/editing.py             # 32 facts on toy-gptj in float64; C0 of all layers
    python benchmarks/editing.py --shape gpt-j-6b              # seconds per edit, random weights, on a CUDA GPU
    python benchmarks/editing.py --shape qwen3-8b

Both ways solve the same joint system; their z* agree to 1e-6 (checked). One by one: every search
and every reading of keys runs one fact at a time through all layers. C0: all layers in one pass,
against the same pass plus the Gram products alone. KNE's ensembles: the scales of a matrix in one
pass, against a pass for each (equal to 1e-5)."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt

import torch

import qv_lens as qv
from qv_lens.attribution.ensembles import weight_attributions
from qv_lens.editing.keys import clean_values, contexts, mean_over_contexts, read, rows_of
from qv_lens.editing.presets import presets
from qv_lens.editing.solve import inverse_of, solve
from qv_lens.editing.statistics import Statistics, covariance
from qv_lens.editing.targets import search
from qv_lens.models.backend import Backend
from qv_lens.models.deltas import delta_hooks
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

WORLD = generator.build(0)
SEARCH = {"steps": 20, "lr": 1.0, "weight_decay": 0.1, "clamp": 2.0, "lam": 5.0}


@contextmanager
def full_passes() -> Iterator[None]:
    """Every pass from the first layer to the last, over all tokens."""
    partial, past = Backend.run, qv.Lens.past

    def run(self: Backend, ids, start=None, stop=None, past=None):
        if stop is None:
            return partial(self, ids)
        kept = []
        site = self.resid_pre(stop) if stop < self.n_layers else self.resid_post(stop - 1)
        with self.hooks([(site, kept.append)]):
            partial(self, ids)
        return kept[0]

    Backend.run, qv.Lens.past = run, lambda self, start, first: None
    try:
        yield
    finally:
        Backend.run, qv.Lens.past = partial, past


def one_by_one(
    lens: qv.Lens, requests: list, editor, statistics: Statistics, templates: tuple[str, ...]
) -> torch.Tensor:
    """The same edit, a fact at a time: searches, then per layer every fact's keys and values, one
    joint solve."""
    (plan,) = editor.plan(lens)
    rows = [rows_of(lens, [r], templates, "subject_last") for r in requests]
    z = torch.cat(
        [
            search(lens, [r], row, "subject_last", plan.search).z
            for r, row in zip(requests, rows, strict=True)
        ]
    )
    saved = {}
    for group in plan.groups:
        for i, layer in enumerate(group):
            left = len(group) - i
            site, key = plan.search.sites[0], lens.backend_adapter.coefficient(layer)
            seen = [read(lens, row, (key, site)) for row in rows]
            K = torch.cat(
                [mean_over_contexts(row, s[key]) for row, s in zip(rows, seen, strict=True)]
            ).T
            cur = torch.cat([clean_values(row, s[site]) for row, s in zip(rows, seen, strict=True)])
            delta = solve(
                inverse_of(statistics.of(lens, layer)),
                K,
                (z - cur).T / (left if plan.share == "linear" else sqrt(left)),
                editor.lam,
            )
            saved.setdefault(layer, lens.w_out(layer).clone())
            lens.w_out(layer).add_(delta.dense())
    for layer, weight in saved.items():
        lens.w_out(layer).copy_(weight)
    return z


def bundled() -> None:
    lens = qv.load("toy-gptj", dtype="float64")
    requests = [case.request for case in world_cases.edit_cases(WORLD, 32)]
    texts = [
        generator.text(d)
        for d in itertools.islice(generator.documents(WORLD, random.Random("statistics")), 1500)
    ]
    statistics, templates = covariance(lens, texts, range(1, 7)), contexts(lens)
    editors = [
        qv.MEMIT(layers=(3, 4, 5), **SEARCH), qv.PMET(layers=(3, 4, 5), **SEARCH),
        qv.ACE(value_layers=(4, 5), query_layers=(2, 3), joint=True, **SEARCH),
    ]  # fmt: skip
    for editor in editors:
        start = time.perf_counter()
        patch = qv.edit(lens, requests, editor, statistics=statistics, templates=templates)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        with full_passes():
            z = one_by_one(lens, requests, editor, statistics, templates)
        naive = time.perf_counter() - start
        (plan,) = editor.plan(lens)
        z_here = search(
            lens,
            requests,
            rows_of(lens, requests, templates, "subject_last"),
            "subject_last",
            plan.search,
        ).z
        error = float(((z_here - z).norm(dim=1) / z.norm(dim=1)).max())
        print(
            f"{type(editor).__name__:<6} 32 facts: {ours:6.2f} s together, {naive:6.2f} s one by "
            f"one, ratio {naive / ours:4.1f}; z* agree to {error:.1e}",
            flush=True,
        )
        assert patch.deltas
    moments(lens, texts)
    ensembles()
    evaluation()


def moments(lens: qv.Lens, texts: list[str]) -> None:
    """C0 of all layers, against one pass of the same batches and the Gram products timed alone."""
    lens = qv.load("toy-gptj")
    layers = range(lens.n_layers)
    start = time.perf_counter()
    covariance(lens, texts, layers)
    ours = time.perf_counter() - start
    rows = sorted((lens.tokenizer(text)["input_ids"] for text in texts), key=len)
    start = time.perf_counter()
    with torch.no_grad():
        tokens = []
        for i in range(0, len(rows), 128):
            lens.logits(rows[i : i + 128])
            tokens.append(sum(map(len, rows[i : i + 128])))
    forward = time.perf_counter() - start
    sums = [torch.zeros(lens.d_mlp, lens.d_mlp, dtype=torch.float64) for _ in layers]
    keys = [torch.randn(n, lens.d_mlp) for n in tokens]
    start = time.perf_counter()
    for k in keys:
        for total in sums:
            total.add_((k.T @ k).double())
    gram = time.perf_counter() - start
    print(
        f"C0 of {len(sums)} layers, {sum(tokens)} tokens: {ours:.2f} s; one pass {forward:.2f} s + "
        f"Gram products {gram:.2f} s; ratio {ours / (forward + gram):.2f}"
    )


def evaluation(count: int = 16) -> None:
    """evaluate() of single edits: z* of all cases searched together against one after another
    (batch_size 1)."""
    cases = world_cases.edit_cases(WORLD, count)
    for model in ("toy-gptj", "toy-qwen3"):
        lens = qv.load(model)
        texts = [
            generator.text(d)
            for d in itertools.islice(generator.documents(WORLD, random.Random("statistics")), 1500)
        ]
        statistics, templates = (
            covariance(lens, texts, range(1, 8), modules=("ffn", "attn")),
            contexts(lens),
        )
        for method in ("ROME", "MEMIT", "ACE"):
            editor, seconds, frames = presets(model)[method].editor, [], []
            for size in (32, 1):
                start = time.perf_counter()
                frames.append(
                    qv.evaluate(
                        lens,
                        cases,
                        editor=editor,
                        statistics=statistics,
                        templates=templates,
                        batch_size=size,
                    )
                )
                seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            few = qv.evaluate(
                lens, cases, ["efficacy_acc"], editor, statistics=statistics, templates=templates
            )
            seconds.append(time.perf_counter() - start)
            same = frames[0]["after"].equals(frames[1]["after"])
            print(
                f"evaluate {model} {method:<6} {count} single edits: {seconds[0]:5.1f} s together, "
                f"{seconds[1]:5.1f} s one by one, ratio {seconds[1] / seconds[0]:.1f}; every "
                f"metric the same: {same}",
                flush=True,
            )
            efficacy = frames[0][frames[0]["metric"] == "efficacy_acc"]
            print(
                f"evaluate {model} {method:<6} one metric: {seconds[2]:5.1f} s, all: ratio "
                f"{seconds[0] / seconds[2]:.1f}; the same: "
                f"{few['after'].tolist() == efficacy['after'].tolist()}",
                flush=True,
            )


def ensembles(steps: int = 20) -> None:
    """KNE's attribution of one fact: a matrix's scales side by side from its layer on, against a
    whole pass for each."""
    for model in ("toy-gptj", "toy-qwen3"):
        lens = qv.load(model)
        fact = world_cases.edit_cases(WORLD, 1)[0].request.target
        prompts, names = lens.tokenize([fact]), [(layer, "W_out") for layer in range(lens.n_layers)]
        start = time.perf_counter()
        at_once = {name: weight_attributions(lens, [fact], [name], steps)[name] for name in names}
        ours = time.perf_counter() - start
        start, worst = time.perf_counter(), 0.0
        for name in names:
            weight, total = lens.parameter(*name), torch.zeros(lens.parameter(*name).shape)
            for i in range(1, steps + 1):
                with torch.enable_grad():
                    leaf = ((i / steps - 1) * weight).requires_grad_(True)
                    p = lens.answer_logprobs(prompts, delta_hooks(lens, {name: leaf})).exp().sum()
                    total += torch.autograd.grad(p, leaf)[0]
            naive = weight * total / steps
            worst = max(worst, float((naive - at_once[name]).norm() / naive.norm()))
        naive_time = time.perf_counter() - start
        print(
            f"KNE's ensemble, {model}, one fact: {ours:5.2f} s side by side, {naive_time:5.2f} s "
            f"pass by pass, ratio {naive_time / ours:4.1f}; they agree to {worst:.0e}",
            flush=True,
        )


def real_shape(name: str) -> None:
    """Seconds per edit and peak memory, random weights in bf16, three layers, C0 = I."""
    from attribution import SHAPES, random_lens

    lens = random_lens(SHAPES[name], "cuda", torch.bfloat16)
    statistics = Statistics(
        {layer: torch.eye(lens.d_mlp, dtype=torch.float64) for layer in (5, 6, 7, 8)},
        1,
        "identity",
        lens.fingerprint,
    )
    requests = [case.request for case in world_cases.edit_cases(WORLD, 8)]
    settings = {**SEARCH, "steps": 25}
    for editor in (
        qv.MEMIT(layers=(6, 7, 8), **settings),
        qv.PMET(layers=(6, 7, 8), **settings),
        qv.ACE(value_layers=(7, 8), query_layers=(5, 6), **settings),
    ):
        torch.cuda.reset_peak_memory_stats()
        for count in (1, 8):
            start = time.perf_counter()
            qv.edit(
                lens,
                requests[:count],
                dataclasses.replace(
                    editor, **({"joint": True} if isinstance(editor, qv.ACE) else {})
                ),
                statistics=statistics,
            )
            torch.cuda.synchronize()
            print(
                f"{type(editor).__name__:<6} {count} facts: "
                f"{(time.perf_counter() - start) / count:.2f} s per edit, peak "
                f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("gpt-j-6b", "qwen3-8b"))
    shape = parser.parse_args().shape
    if shape is None:
        bundled()
    elif not torch.cuda.is_available():
        raise SystemExit(f"--shape {shape} needs a CUDA GPU; torch sees none here.")
    else:
        real_shape(shape)


if __name__ == "__main__":
    main()
