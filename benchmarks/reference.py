"""MEMIT and ROME beside their authors' code: seconds per edit, in one run.

    OMP_NUM_THREADS=1 python benchmarks/reference.py memit smollm2-135m --data counterfact.json

`memit`: a clone of the repository kmeng01/memit. Its code runs from there, in a copy changed so
that it runs on a CPU and on a Llama of today's transformers: the device, the name of the width, and
what a block returns (a tensor, no longer a tuple). Both get the same facts, contexts, C0 and
settings; the reference keeps its C0 between edits, ours the factors made of it. CPU seconds of one
thread; the deltas are compared."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import shutil
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qv_lens as qv
from qv_lens.editing.job import Factored
from qv_lens.editing.keys import contexts, rows_of
from qv_lens.editing.statistics import Statistics
from qv_lens.editing.targets import search

CHANGES = {
    '"cuda"': '"cpu"',
    "model.config.n_embd": "model.config.hidden_size",
    "cur_out[0][": "cur_out[",
    ".output[0][": ".output[",
}
#: modules that the searches do not need: text for C0, paths, generation, a plot's style
STUBS = {
    "matplotlib": {},
    "matplotlib.style": {"context": None},
    "rome.layer_stats": {"layer_stats": None},
    "util.globals": {"STATS_DIR": None},
    "util.generate": {"generate_fast": None},
}
PLACES = {
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "model.embed_tokens",  # tied
}
TEXT = {"mom2_dataset": "", "mom2_n_samples": 0, "mom2_dtype": "float32"}
SEARCH = {"steps": 25, "lr": 0.5, "weight_decay": 0.5, "kl": 0.0625}


def released(clone: Path, work: Path) -> dict[str, Any]:
    """The modules of the reference, from a changed copy of the clone."""
    for package in ("memit", "rome", "util"):
        shutil.copytree(clone / package, work / package)
        for file in (work / package).glob("*.py"):
            text = file.read_text()
            for old, new in CHANGES.items():
                text = text.replace(old, new)
            file.write_text(text)
    sys.path.insert(0, str(work))
    for name, names in STUBS.items():
        stub = types.ModuleType(name)
        stub.__dict__.update(names)
        sys.modules[name] = stub
    names = ("memit.memit_main", "rome.rome_main", "rome.compute_u")
    return {name: importlib.import_module(name) for name in names}


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what came out; what it prints is dropped."""
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = run()
    return time.process_time() - start, result


def asked(case: qv.EditCase) -> dict[str, Any]:
    """A request as the reference takes it."""
    request = case.request
    return {
        "prompt": request.fact.prompt,
        "subject": request.fact.subject,
        "target_new": {"str": request.new},
        "case_id": 0,
    }


def hparams(kind: type, layers: tuple[int, ...], last: int, **more: Any) -> Any:
    """The reference's settings."""
    out = kind.__new__(kind)
    settings = {
        "layers": list(layers), "layer_selection": "all", "fact_token": "subject_last",
        "v_num_grad_steps": SEARCH["steps"], "v_lr": SEARCH["lr"], "v_loss_layer": last,
        "v_weight_decay": SEARCH["weight_decay"], "kl_factor": SEARCH["kl"], "mom2_adjustment": True,
        "context_template_length_params": [], **PLACES, **TEXT, **more,
    }  # fmt: skip
    out.__dict__.update(settings)
    return out


def compare(
    name: str,
    editor: qv.MEMIT | qv.ROME,
    theirs: Callable[[qv.EditCase], dict[int, torch.Tensor]],
    lens: qv.Lens,
    cases: list[qv.EditCase],
    C0: Statistics,
    templates: tuple[str, ...],
) -> None:
    """Edits one by one, and the search of all together against the reference's edits."""
    factored, pairs, worst = Factored(C0), [], 0.0
    for case in cases:
        their_time, deltas = seconds(lambda c=case: theirs(c))
        run = lambda c=case: qv.edit(  # noqa: E731
            lens, c.request, editor, statistics=C0, templates=templates, factored=factored
        )
        our_time, patch = seconds(run)
        for (layer, _), delta in patch.deltas.items():
            dense, other = delta.dense(), deltas[layer].double()
            worst = max(worst, float((dense - other).norm() / other.norm()))
        pairs.append((their_time, our_time))
        print(
            f"{name} {case.request.fact.text!r}: {their_time:.1f} and {our_time:.1f} s", flush=True
        )
    their, our = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{name}, one by one: reference {their:.1f} s, ours {our:.1f} s, ratio {their / our:.1f}; deltas agree to {worst:.0e}"
    )
    (plan,) = editor.plan(lens)
    requests = [case.request for case in cases]
    rows = rows_of(lens, requests, templates, plan.fact_token, plan.prompts)
    together, _ = seconds(lambda: search(lens, requests, rows, plan.fact_token, plan.search))
    each = together / len(cases)
    print(
        f"{name}, {len(cases)} searched together: {each:.1f} s each, ratio to the reference's edit {their / each:.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=9)
    arguments = parser.parse_args()
    lens = qv.load(arguments.model)
    cases = list(qv.read(arguments.data).cases[: arguments.facts])
    layers = (3, 4, 5, 6, 7)
    C0 = qv.corpus_statistics(lens, layers=layers, modules=("ffn",))
    tok, last = lens.tokenizer, lens.n_layers - 1
    tok.pad_token, tok.padding_side = tok.eos_token, "right"
    with tempfile.TemporaryDirectory() as work:
        modules = released(arguments.clone, Path(work))
        memit, rome = modules["memit.memit_main"], modules["rome.rome_main"]
        moment = {PLACES["rewrite_module_tmp"].format(i): C0.C0[i].float() for i in layers}
        inverse = {name: torch.inverse(C.double()).float() for name, C in moment.items()}
        memit.get_cov = lambda model, tok, name, *_, **__: moment[name]
        modules["rome.compute_u"].get_inv_cov = lambda model, tok, name, *_: inverse[name]
        print(f"{arguments.model}, {torch.get_num_threads()} threads, torch {torch.__version__}")

        templates = contexts(lens)
        memit.CONTEXT_TEMPLATES_CACHE = [["{}"], list(templates[1:])]
        editor = qv.MEMIT(layers=layers, lam=15000.0, clamp=0.75, **SEARCH)
        own = hparams(
            memit.MEMITHyperParams, layers, last, clamp_norm_factor=0.75, mom2_update_weight=15000.0
        )

        def by_memit(case: qv.EditCase) -> dict[int, torch.Tensor]:
            written = memit.execute_memit(lens.hf, tok, [asked(case)], own)
            return {int(name.split(".")[2]): K @ R.T for name, (K, R) in written.items()}

        compare("MEMIT", editor, by_memit, lens, cases, C0, templates)

        templates = contexts(lens, 0, "rome")
        rome.CONTEXT_TEMPLATES_CACHE = list(templates)
        own = hparams(rome.ROMEHyperParams, (5,), last, clamp_norm_factor=4.0)

        def by_rome(case: qv.EditCase) -> dict[int, torch.Tensor]:
            written = rome.execute_rome(lens.hf, tok, asked(case), own)
            return {int(name.split(".")[2]): torch.outer(u, v) for name, (u, v) in written.items()}

        compare("ROME", qv.ROME(layer=5, clamp=4.0, **SEARCH), by_rome, lens, cases, C0, templates)


if __name__ == "__main__":
    main()
