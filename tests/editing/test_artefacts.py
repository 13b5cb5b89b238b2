"""What an edit leaves behind: adapters that PEFT loads, statistics that survive a kill, warnings,
presets, the verbs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qv_lens as qv
from qv_lens.editing import statistics
from qv_lens.editing.presets import presets
from qv_lens.editing.statistics import Statistics, covariance, enough
from qv_lens.models.fetch import FETCHABLE
from qv_lens.models.zoo import MODELS
from qv_lens.patch import Delta, Patch
from tests.attribution.test_value import FACTS
from tests.editing.test_closed_form import REQUESTS, TEXTS
from tests.editing.test_methods import EVERY
from tests.models import tiny_hf, tiny_lens
from tests.processes import started, wait_for_more_than


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize(
    "editor",
    [
        qv.PMET(layers=(0, 1), lam=1.0, attention=True, steps=4), qv.LoRA(steps=3), qv.RECT(layers=(1,), lam=1.0, steps=4),
        qv.KNE(lr=1e-2, steps=3, share=0.1, steps_ig=2, parameters=("W_in", "W_Q", "W_V")),
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_peft_gives_the_edited_models_logits(kind, editor, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra lora)")
    lens = tiny_lens(kind, dtype=torch.float32)
    patch = qv.edit(
        lens,
        REQUESTS,
        editor,
        statistics=covariance(lens, TEXTS, range(3), modules=("ffn", "attn")),
    )
    patch.to_lora(tmp_path / "adapter")
    ids = [list(lens.tokenize(FACTS[0])[0].ids)]
    with lens.patched(patch):
        expected = lens.logits(ids)
    base = tiny_hf(kind, torch.float32)
    before = base(torch.tensor(ids)).logits
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    got = adapted(torch.tensor(ids)).logits
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert (before - expected).abs().max() > 1e-2


def test_what_no_adapter_can_hold_is_refused(tmp_path):
    lens = tiny_lens("gptj", dtype=torch.float32)
    with pytest.raises(qv.QVLensError, match="b_out"):
        qv.edit(lens, REQUESTS[0], qv.FT(layer=1, lr=1e-2, steps=2)).to_lora(tmp_path)
    patch = qv.Patch(
        {(1, "W_out"): Delta(torch.randn(*lens.w_out(1).shape, dtype=torch.float64))},
        lens.fingerprint,
        {"modules": {"1.W_out": "x"}},
    )
    with pytest.raises(qv.QVLensError, match="rank 32"):
        patch.to_lora(tmp_path, max_rank=8)


def slow_statistics(folder: Path) -> None:
    def slow():
        for i, text in enumerate(TEXTS):
            if i % 10 == 0:
                time.sleep(0.05)
            yield text

    lens = tiny_lens("gptj", dtype=torch.float32)
    covariance(lens, slow(), (1, 2), folder=folder, every=10, modules=("ffn", "attn"))


#: fewer than there are times at which something is kept
KILLS = 5


def test_statistics_survive_kills(tmp_path):
    lens, rng = tiny_lens("gptj", dtype=torch.float32), random.Random(0)
    whole = covariance(lens, TEXTS, (1, 2), modules=("ffn", "attn"))
    kept = tmp_path / "C0" / "partial.json"

    def last_kept() -> int:
        return kept.stat().st_mtime_ns if kept.exists() else 0

    for attempt in range(KILLS + 1):
        process = started(slow_statistics, tmp_path / "C0")
        if attempt < KILLS:
            wait_for_more_than(last_kept(), last_kept)
            time.sleep(rng.uniform(0.0, 0.06))
            process.kill()
        process.join(timeout=120)
    assert process.exitcode == 0
    resumed = Statistics.load(tmp_path / "C0")
    assert (resumed.tokens, resumed.corpus, resumed.fingerprint) == (
        whole.tokens,
        whole.corpus,
        whole.fingerprint,
    )
    for mine, theirs in ((resumed.C0, whole.C0), (resumed.attention, whole.attention)):
        for layer in (1, 2):
            # batches differ, in float32
            torch.testing.assert_close(mine[layer], theirs[layer], atol=1e-6, rtol=1e-4)
    assert not list((tmp_path / "C0").glob("partial*"))


def test_statistics_of_other_text_or_layers_are_refused(tmp_path):
    lens = tiny_lens("gptj", dtype=torch.float32)

    def broken():
        yield from TEXTS[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        covariance(lens, broken(), (1,), folder=tmp_path, every=10)
    for texts, layers, says in (
        (TEXTS[5:], (1,), "another text"),
        (TEXTS, (1, 2), "another model, length or layers"),
    ):
        with pytest.raises(qv.QVLensError, match=says):
            covariance(lens, texts, layers, folder=tmp_path, every=10)
    done = covariance(lens, TEXTS[:60], (1,), folder=tmp_path, every=10)
    assert done.tokens == covariance(lens, TEXTS[:60], (1,)).tokens
    kept = (tmp_path / "statistics.safetensors").read_bytes()
    # given back
    torch.testing.assert_close(
        covariance(lens, TEXTS[:60], (1,), folder=tmp_path).C0[1], done.C0[1]
    )
    other = tiny_lens("qwen3-gqa", dtype=torch.float32)
    for model, texts, layers in (
        (lens, TEXTS[:59], (1,)),
        (lens, TEXTS[:60], (1, 2)),
        (other, TEXTS[:60], (1,)),
    ):
        with pytest.raises(qv.QVLensError, match="holds finished statistics"):
            covariance(model, texts, layers, folder=tmp_path)
    with pytest.raises(qv.QVLensError, match="cut to 3"):
        covariance(lens, TEXTS[:60], (1,), folder=tmp_path, max_tokens=3)
    with pytest.raises(qv.QVLensError, match="holds statistics already"):
        done.save(tmp_path)
    assert (tmp_path / "statistics.safetensors").read_bytes() == kept


@pytest.mark.parametrize("block", [5, 16, 512])
def test_C0_is_the_mean_of_every_tokens_k_kT(block, monkeypatch, true_float64):
    """Text by text, whatever the blocks in which it is summed."""
    monkeypatch.setattr(statistics, "BLOCK", block)
    lens, few = tiny_lens("qwen3-gqa"), TEXTS[:20]
    keys = torch.cat([lens.trace(text, "all").m[1] for text in few])
    C0 = covariance(lens, few, [1]).C0[1]
    torch.testing.assert_close(C0, keys.T @ keys / len(keys), atol=1e-12, rtol=1e-10)
    assert torch.equal(C0, C0.T)


def test_little_of_what_runs_for_C0_is_padding():
    """Long and short texts do not share a pass (they once did, and C0 took three times as long)."""
    lens = tiny_lens("qwen3-gqa")
    mixed = [" ".join(["fencing"] * (1 + i * i % 97)) for i in range(400)]
    batches = list(statistics._batches(lens, mixed, 128, 1000))
    padded = sum(len(rows) * max(map(len, rows)) for rows in batches)
    real = sum(len(row) for rows in batches for row in rows)
    assert padded <= 1.15 * real
    assert sorted(len(row) for rows in batches for row in rows) == sorted(
        len(lens.tokenizer(text)["input_ids"]) for text in mixed
    )
    assert len(batches) <= real / statistics.WORTH + 1


def test_attention_statistics_against_a_loop(true_float64):
    lens = tiny_lens("qwen3-gqa")
    got = covariance(lens, TEXTS[:10], (1,), modules=("attn",))
    kept = []
    handle = lens.hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: kept.append(args[0][0])
    )
    for text in TEXTS[:10]:
        lens.hf(torch.tensor([lens.tokenizer(text)["input_ids"]]))
    handle.remove()
    keys = torch.cat(kept)
    torch.testing.assert_close(got.attention[1], keys.T @ keys / len(keys), atol=1e-10, rtol=1e-8)


def test_rounding_and_collapse_are_told():
    lens = tiny_lens("gptj", dtype=torch.bfloat16)
    patch = qv.edit(
        lens,
        REQUESTS[0],
        qv.MEMIT(layers=(1,), steps=3, lam=1.0),
        statistics=covariance(lens, TEXTS, (1,)),
    )
    delta, before = patch.deltas[1, "W_out"].dense(), lens.w_out(1).double()
    with lens.patched(patch):
        lost = lens.w_out(1).double() - (before + delta)
    assert float(lost.norm() / delta.norm()) == pytest.approx(
        patch.info["rounding_error"]["1.W_out"], rel=1e-6
    )
    assert lost.norm() > 0
    assert delta.dtype == torch.float64
    with pytest.warns(UserWarning, match="usually ruin a model"):
        qv.edit(
            tiny_lens("gptj", dtype=torch.float32),
            REQUESTS[0],
            qv.FT(layer=1, lr=1.0, steps=5, stop=0.0),
        )


#: editors of 2025, whose releases have settings for some models
NEWER = {"SPHERE", "BetaEdit", "ENCORE", "LocFT", "NSE", "SimIE", "UltraEdit"}


@pytest.mark.parametrize("model", [entry.name for entry in MODELS if entry.name not in FETCHABLE])
def test_every_method_has_a_preset_that_fits_the_model(model):
    table, layers = presets(model), next(entry.n_layers for entry in MODELS if entry.name == model)
    every = {type(editor).__name__ for editor in EVERY} | {"ACE.paper", "ACE.official"}
    assert every - NEWER <= set(table) <= every
    for preset in table.values():
        source = preset.source
        assert source
        for name in ("layer", "layers", "value_layers", "query_layers", "deep_layers"):
            value = getattr(preset.editor, name, None)
            for layer in (value,) if isinstance(value, int) else value or ():
                # its v28 is dropped with a warning
                assert 0 <= layer < layers or source.startswith("Appendix F")


def test_stats_and_edit_on_the_command_line(tmp_path):
    def call(*words):
        done = subprocess.run(
            [sys.executable, "-m", "qv_lens", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    out = call(
        "stats",
        "--text",
        str(text),
        "--layers",
        "2",
        "--layers",
        "3",
        "--layers",
        "4",
        "--layers",
        "5",
        "--out",
        str(tmp_path / "C0"),
    )
    assert "C0 of layers [2, 3, 4, 5]" in out
    fact = (
        "{} plays the sport of",
        "--subject",
        "Elena Morefeld",
        "--answer",
        "fencing",
        "--new",
        "golf",
    )
    out = call(
        "edit", *fact, "--statistics", str(tmp_path / "C0"), "--out", str(tmp_path / "patch")
    )
    assert "golf" in out
    assert qv.Patch.load(tmp_path / "patch").info["method"] == "MEMIT"


def test_enough_text_is_counted_as_it_is_read():
    """Texts are cut before they are counted, and too short a text is warned of."""
    lens = tiny_lens("gptj")
    lines = [" ".join(TEXTS[:3])] * 50
    tokens = len(lens.tokenize(lines[0])[0].ids)
    assert 20 < tokens < 128
    assert len(enough(lens, lines, 100, max_tokens=20)) == 5
    assert len(enough(lens, lines, tokens + 1)) == 2
    C0 = covariance(lens, enough(lens, lines, 100, max_tokens=20), [1], max_tokens=20)
    assert C0.tokens == 100
    with pytest.warns(UserWarning, match=f"holds {tokens} tokens, and 100000 are wanted"):
        assert enough(lens, lines[:1], 100_000) == lines[:1]


def test_an_adapter_of_unequal_ranks_is_every_weights_own_delta(tmp_path):
    """Read as PEFT reads it: alpha / r of each module times B A. A dense delta keeps its small
    singular values."""
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*s, generator=generator).double() for s in ((6, 2), (2, 4)))
    Q, P = (torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0] for n in (5, 4))
    dense = Q[:, :3] @ torch.diag(torch.tensor([1.0, 0.1, 0.005]).double()) @ P[:3]
    deltas = {(0, "W_out"): Delta(left, right), (1, "W_out"): Delta(dense)}
    patch = qv.Patch(deltas, "0" * 16, {"modules": {"0.W_out": "h.0.out", "1.W_out": "h.1.out"}})
    folder = patch.to_lora(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    told = load_file(folder / "adapter_model.safetensors")
    for module, wanted in (("h.0.out", left @ right), ("h.1.out", dense)):
        A, B = (told[f"base_model.model.{module}.lora_{which}.weight"] for which in "AB")
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        rank = config["rank_pattern"].get(module, config["r"])
        torch.testing.assert_close(alpha / rank * (B @ A).T.double(), wanted, atol=1e-6, rtol=0)
    frame = patch.frame()
    assert frame["norm"].tolist() == pytest.approx(
        [(left @ right).norm().item(), dense.norm().item()]
    )
    assert frame["rank"].tolist() == [2, 4]


def without_digest(folder):
    """The patch as versions before 2026-12 wrote it."""
    header = json.loads((folder / "patch.json").read_text())
    del header["sha256"]
    (folder / "patch.json").write_text(json.dumps(header))


def test_weights_that_are_not_those_saved_are_told(tmp_path):
    """A flipped bit is a number like any other, and weights of another patch have the same names."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, value in ((first, 1.0), (second, 2.0)):
        Patch({(0, "W_out"): Delta(torch.full((4, 3), value))}, "f" * 16).save(folder)
    whole = (first / "patch.safetensors").read_bytes()
    for content in (
        whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
        (second / "patch.safetensors").read_bytes(),
    ):
        (first / "patch.safetensors").write_bytes(content)
        with pytest.raises(qv.QVLensError, match="not what was saved with"):
            Patch.load(first)
    (first / "patch.safetensors").write_bytes(whole)
    without_digest(second)
    for folder, value in ((first, 1.0), (second, 2.0)):
        delta = Patch.load(folder).deltas[0, "W_out"]
        assert delta.left.unique().tolist() == [value]


def test_a_patch_lies_in_memory_as_one_just_made(tmp_path):
    """Products of tensors that begin elsewhere are rounded otherwise: a row of edits that goes on
    from a file would be another one in its last digits."""
    for length in range(1, 9):  # the header's length moves the tensors
        folder = tmp_path / ("x" * length)
        info = {"note": "x" * length}
        Patch({(0, "W_out"): Delta(torch.ones(4, 3), torch.ones(3, 5))}, "f" * 16, info).save(
            folder
        )
        delta = Patch.load(folder).deltas[0, "W_out"]
        assert delta.left.data_ptr() % 64 == 0
        assert delta.right.data_ptr() % 64 == 0


def test_factors_that_do_not_fit_are_told_when_they_are_read(tmp_path):
    patch = Patch({(0, "W_out"): Delta(torch.ones(4, 2), torch.ones(2, 3))}, "f" * 16)
    patch.save(tmp_path)
    tensors = load_file(tmp_path / "patch.safetensors")
    save_file({**tensors, "0.W_out.right": torch.ones(1, 3)}, tmp_path / "patch.safetensors")
    without_digest(tmp_path)
    with pytest.raises(qv.QVLensError, match=r"factors of shapes \(4, 2\) and \(1, 3\) have no"):
        Patch.load(tmp_path)
