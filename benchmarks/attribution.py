"""Speed and memory of value attribution against the naive method of the literature, side by side in
one run.

    python benchmarks/attribution.py                       # N=4096, d=512, V=8000, 16 prompts, CPU, 2 threads
    python benchmarks/attribution.py --growth              # 1 to 64 prompts, 1,024 to 16,384 neurons
    python benchmarks/attribution.py --model smollm2-135m  # a real model (a name or a folder), 1 and 32 prompts
    python benchmarks/attribution.py --shape gpt-j-6b      # random weights of the real shape, on a CUDA GPU
    python benchmarks/attribution.py --shape qwen3-8b

Naive: per prompt, add each neuron's vector to the base, norm, unembed, log-softmax, in chunks; the
best of several chunk sizes counts. Ours: `qv.value_neurons` on the same Lens and Trace. Weights are
random; the coefficients are those of the bundled model's neurons on as many prompts, scaled so that
the scores spread as they do there. Of a real model the weights and the prompts are real: two-hop
prompts of the atlas; naive is timed on one prompt and counted for each; `locate` and the effects by
gradient are timed beside one forward and backward pass of transformers."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import GPTJConfig, GPTJForCausalLM, Qwen3Config, Qwen3ForCausalLM

import qv_lens as qv
from qv_lens.attribution.setting import setting
from qv_lens.facts.atlas import chains
from qv_lens.facts.spans import pad
from qv_lens.models.lens import at_least_float32
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

SHAPES = {
    "small": {
        "kind": "gptj",
        "n_layers": 1,
        "d_model": 512,
        "d_mlp": 4096,
        "heads": 8,
        "vocab": 8000,
    },
    "gpt-j-6b": {
        "kind": "gptj",
        "n_layers": 28,
        "d_model": 4096,
        "d_mlp": 16384,
        "heads": 16,
        "vocab": 50400,
    },
    "qwen3-8b": {
        "kind": "qwen3",
        "n_layers": 36,
        "d_model": 4096,
        "d_mlp": 12288,
        "heads": 32,
        "vocab": 151936,
    },
}
CHUNKS = (32, 128, 512, 2048)


def random_lens(shape: dict, device: str, dtype: torch.dtype) -> qv.Lens:
    """A model of the shape with random weights, wrapped as any other."""
    common = {
        "vocab_size": shape["vocab"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        if shape["kind"] == "gptj":
            config = GPTJConfig(
                n_positions=256, n_embd=shape["d_model"], n_layer=shape["n_layers"], n_head=shape["heads"],
                n_inner=shape["d_mlp"], rotary_dim=64, **common,
            )  # fmt: skip
            model = GPTJForCausalLM(config)
        else:
            config = Qwen3Config(
                hidden_size=shape["d_model"], intermediate_size=shape["d_mlp"], num_hidden_layers=shape["n_layers"],
                num_attention_heads=shape["heads"], num_key_value_heads=8, head_dim=128, max_position_embeddings=256, **common,
            )  # fmt: skip
            model = Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return qv.Lens.from_hf(
        model.to(dtype).eval().requires_grad_(False), qv.load("toy-gptj").tokenizer, name="random"
    )


def problem(lens: qv.Lens, prompts: int) -> qv.Trace:
    """A trace of the random model whose coefficients are a bundled model's, scaled to its spread of
    scores."""
    world = generator.build(0)
    facts = [world_cases.as_fact(world, chain) for chain in world.facts()][:prompts]
    facts += facts[: prompts - len(facts)]
    toy = qv.load("toy-gptj")
    source = toy.trace(facts)
    spread = qv.value_neurons(toy, source, None).frame["score"].std()
    trace = lens.trace(facts, batch_size=8)
    pool = source.m.permute(1, 0, 2).reshape(prompts, -1)
    wanted = lens.n_layers * lens.d_mlp
    index = torch.randint(pool.shape[1], (wanted,), generator=torch.Generator().manual_seed(0))
    m = pool[:, index].reshape(prompts, lens.n_layers, lens.d_mlp).permute(1, 0, 2).to(trace.m)
    trace = dataclasses.replace(trace, m=m)
    ours = qv.value_neurons(lens, trace, None, method="first_order").frame["score"].std()
    return dataclasses.replace(trace, m=(m * (spread / ours)).to(trace.m.dtype))


def naive(
    lens: qv.Lens, trace: qv.Trace, chunk: int, layers: range, prompts: range
) -> torch.Tensor:
    """The method of the literature, norm frozen: one vocabulary-sized log-softmax per neuron and
    prompt."""
    task = setting(lens, trace)
    out, norm = [], lens.backend_adapter.norm(None)
    gain = at_least_float32(norm.gain)
    W_U = at_least_float32(lens.backend_adapter.unembed()[0])
    for layer in layers:
        rows = at_least_float32(lens.w_out(layer))
        for prompt in prompts:
            x = at_least_float32(trace.mid[layer, prompt])
            m, sigma, token = (
                at_least_float32(trace.m[layer, prompt]),
                task.readout.sigma[prompt],
                int(task.token[prompt]),
            )
            base = (norm.center(x) / sigma * gain) @ W_U + task.readout.c
            for i in range(0, len(rows), chunk):
                y = x + m[i : i + chunk, None] * rows[i : i + chunk]
                logits = (norm.center(y) / sigma * gain) @ W_U + task.readout.c
                out.append(logits.log_softmax(-1)[:, token] - base.log_softmax(-1)[token])
    return torch.cat(out)


def timed(run: Callable[[], Any], repeats: int, device: str) -> tuple[float, float, Any]:
    """Median seconds, peak megabytes above what was there, and what the last run gave."""
    seconds, peak, result = [], 0.0, None
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        watch = Watch()
        start = time.perf_counter()
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        peak = max(
            peak,
            watch.stop() if device == "cpu" else (torch.cuda.max_memory_allocated() - before) / 1e6,
        )
    return statistics.median(seconds), peak, result


class Watch:
    """The largest resident memory of this process while it looks, in MB above the start."""

    def __init__(self) -> None:
        self.start = self.peak = self._now()
        self.on = True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _now(self) -> float:
        try:
            return (
                int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
            )
        except OSError:  # no /proc: the process's high-water mark
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    def _look(self) -> None:
        while self.on:
            self.peak = max(self.peak, self._now())
            time.sleep(0.002)

    def stop(self) -> float:
        self.on = False
        self.thread.join()
        return self.peak - self.start


def told(name: str, seconds: float, peak: float, result: Any) -> tuple[float, float, str]:
    """A method's row, told on the error stream as soon as it is measured."""
    settings = getattr(result, "settings", {})
    note = f"fallback {settings['fallback']:.2%}" if "fallback" in settings else ""
    note = f"scored {max(settings['scored'])}" if "scored" in settings else note
    print(f"{name}: {seconds:.3f} s, {peak:.0f} MB {note}", file=sys.stderr, flush=True)
    return seconds, peak, note


METHODS = {
    "exact": {"method": "exact", "top": None},
    "moments": {"method": "moments", "top": None},
    "topk 300": {"method": "topk", "top": 300},
    "topk 300 over the set": {"method": "topk", "top": 300, "over": "set"},
    "first_order": {"method": "first_order", "top": None},
}


def compare(
    shape: dict, prompts: int, device: str, dtype: torch.dtype, repeats: int
) -> pd.DataFrame:
    def step(name: str, run: Callable[[], Any]) -> Any:
        measured = timed(run, 1, device)
        told(name, *measured)
        return measured[-1]

    lens = step("the model", lambda: random_lens(shape, device, dtype))
    step("its fingerprint", lambda: lens.fingerprint)  # hashed once per model, part of no method
    trace = step("the trace", lambda: problem(lens, prompts))
    whole = device == "cpu"
    layers, some = (range(lens.n_layers), range(prompts)) if whole else (range(1), range(2))
    # on a GPU naive is timed on a part and said so
    scale = lens.n_layers * prompts / (len(layers) * len(some))
    rows = {}
    trials = {
        chunk: timed(lambda c=chunk: naive(lens, trace, c, range(1), range(1)), 1, device)[0]
        for chunk in CHUNKS
    }
    best = min(trials, key=trials.__getitem__)
    with torch.no_grad():
        seconds, peak, _ = timed(lambda: naive(lens, trace, best, layers, some), repeats, device)
    part = "" if whole else f", {1 / scale:.1%} timed"
    rows["naive"] = (*told("naive", seconds * scale, peak, None)[:2], f"chunks of {best}{part}")
    for name, options in METHODS.items():
        run = lambda o=options: qv.value_neurons(lens, trace, **o)  # noqa: E731
        rows[name] = told(name, *timed(run, repeats, device))
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["seconds", "peak_MB", "note"])
    frame.insert(1, "ratio", frame.loc["naive", "seconds"] / frame["seconds"])
    return frame


def compare_real(lens: qv.Lens, prompts: int, repeats: int) -> pd.DataFrame:
    """Every method on a real model, on so many two-hop prompts."""
    chosen = chains()[:: max(1, len(chains()) // prompts)][:prompts]
    facts = [qv.Fact("{}", chain.cloze, chain.second.answer) for chain in chosen]
    trace = lens.trace(facts)
    lens.fingerprint  # noqa: B018 - hashed once per model, not part of any method
    single = lens.trace(facts[:1])
    layers = range(lens.n_layers)
    with torch.no_grad():
        trials = {
            chunk: timed(lambda c=chunk: naive(lens, single, c, range(1), range(1)), 1, "cpu")[0]
            for chunk in CHUNKS
        }
        best = min(trials, key=trials.__getitem__)
        seconds, peak, _ = timed(lambda: naive(lens, single, best, layers, range(1)), 1, "cpu")
    rows = {"naive": (seconds * prompts, peak, f"chunks of {best}, one prompt timed")}
    for name, options in METHODS.items():
        if name == "exact" and prompts > 1:
            continue
        run = lambda o=options: qv.value_neurons(lens, trace, **o)  # noqa: E731
        rows[name] = told(name, *timed(run, repeats, "cpu"))
    for name, run in {
        "layer_scores": lambda: qv.layer_scores(lens, trace),
        "locate": lambda: qv.locate(lens, facts),
        "effects": lambda: qv.neuron_effects(lens, facts),
        "effects, RelP": lambda: qv.neuron_effects(lens, facts, method="relp"),
        "transformers": lambda: there_and_back(lens, facts),
    }.items():
        rows[name] = told(name, *timed(run, repeats, "cpu"))
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["seconds", "peak_MB", "note"])
    frame.insert(1, "ratio", frame.loc["naive", "seconds"] / frame["seconds"])
    return frame


def there_and_back(lens: qv.Lens, facts: list[qv.Fact]) -> None:
    """One forward and backward pass of transformers to the embeddings, prompts right-padded."""
    rows = [prompt.ids for prompt in lens.tokenize(facts)]
    last = torch.tensor([len(row) - 1 for row in rows])
    ids = pad(rows)
    token = torch.tensor([lens.answer_ids(fact)[0] for fact in facts])
    with torch.enable_grad():
        embedded = lens.hf.get_input_embeddings()(ids).detach().requires_grad_()
        hidden = lens.hf.base_model(inputs_embeds=embedded).last_hidden_state
        logits = lens.hf.get_output_embeddings()(hidden[torch.arange(len(rows)), last])
        logits.log_softmax(-1)[torch.arange(len(rows)), token].sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--repeats", type=int, help="by itself 5 on a CPU, 1 on a GPU")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    device = "cpu" if arguments.shape == "small" else "cuda"
    repeats = arguments.repeats or (5 if device == "cpu" else 1)
    if arguments.model:
        lens = qv.load(arguments.model)
        print(f"{arguments.model}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for count in dict.fromkeys((1, arguments.prompts or 32)):
            frame = compare_real(lens, count, 1 if count > 1 else repeats)
            print(f"\n{count} prompts")
            print(frame.round({"seconds": 2, "ratio": 1, "peak_MB": 0}).to_string(), flush=True)
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--shape {arguments.shape} needs a CUDA GPU; torch sees none here.")
    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    prompts = arguments.prompts or 16
    card = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{arguments.shape}, {prompts} prompts, {dtype}, {card}, torch {torch.__version__}")
    shape = SHAPES[arguments.shape]
    cells = [(prompts, shape["d_mlp"])]
    if arguments.growth:
        cells = [(p, shape["d_mlp"]) for p in (1, 4, 16, 64)] + [
            (prompts, n) for n in (1024, 16384)
        ]
    for count, neurons in cells:
        print(f"\n{count} prompts, {neurons} neurons per layer")
        frame = compare({**shape, "d_mlp": neurons}, count, device, dtype, repeats)
        print(frame.round({"seconds": 3, "ratio": 1, "peak_MB": 0}).to_string())


if __name__ == "__main__":
    main()
