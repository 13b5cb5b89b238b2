"""Continuations: one rule for where they end, and "greedy" is the argmax whatever the checkpoint's
settings say."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import qv_lens as qv
from qv_lens.errors import ConfigError
from qv_lens.models.generation import Sampling, following, plain
from tests.models import BACKENDS, PROMPTS, tiny_lens, tiny_of, tokenizer

WINDOW = {"Qwen3": {"use_sliding_window": True, "max_window_layers": 0}}
NOTHING = qv.Scale(qv.NeuronSet.of([(0, 0)]), 1.0)


def argmaxes(lens, text, steps):
    """Greedy by hand: one pass and one argmax per token."""
    ids = list(lens.tokenize(text)[0].ids)
    start = len(ids)
    for _ in range(steps):
        ids.append(int(lens.logits([ids])[0, -1].argmax()))
    return ids[start:]


def both_ways(lens, *arguments, **options):
    """On the wrapped model with its cache, and on the hooked one."""
    fast = lens.generate(*arguments, **options)
    with lens.intervene(NOTHING):
        slow = lens.generate(*arguments, **options)
    assert fast == slow
    return fast


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_every_end_of_text_token_ends_a_text(kind, backend):
    lens = tiny_lens(kind, backend, torch.float32)
    prompt = next(text for text in PROMPTS if len(set(argmaxes(lens, text, 6))) > 1)
    steps = argmaxes(lens, prompt, 6)
    second = next(token for token in steps if token != steps[0])
    lens.hf.generation_config.eos_token_id = [lens.tokenizer.eos_token_id, second]
    expected = lens.tokenizer.decode(steps[: steps.index(second)], skip_special_tokens=True)
    assert both_ways(lens, prompt, 6) == expected


@pytest.mark.parametrize("name", ["Gemma 3", "Mistral", "Qwen3"])
def test_a_window_that_slides_is_the_same_with_the_cache(name):
    """Prompts longer than the window, and texts that grow out of it."""
    hf = tiny_of(name, **WINDOW.get(name, {}), sliding_window=4)
    lens = qv.Lens.from_hf(hf, tokenizer(), backend="bridge")
    assert len({len(prompt.ids) for prompt in lens.tokenize(PROMPTS)}) == len(PROMPTS)
    both_ways(lens, list(PROMPTS), 12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_is_read_once_where_nothing_is_in_force(backend, monkeypatch):
    lens = tiny_lens("qwen3-gqa", backend, torch.float32)
    lengths, embedding = [], torch.nn.functional.embedding

    def counted(ids, *arguments):  # a hook would send the prompt to the hooked model
        lengths.append(ids.shape[1])
        return embedding(ids, *arguments)

    monkeypatch.setattr(torch.nn.functional, "embedding", counted)
    lens.generate(PROMPTS[0], 3)
    assert lengths == [len(lens.tokenize(PROMPTS[0])[0].ids), 1, 1]


def test_a_continuation_keeps_the_blank_that_a_tokenizer_drops_at_a_texts_beginning():
    pieces = ["The", " capital", " is", " Paris", "."]
    dropping = lambda ids: "".join(pieces[i] for i in ids).lstrip()  # noqa: E731
    assert dropping([3, 4]) == "Paris."
    assert following(dropping, [0, 1, 2], [3, 4]) == " Paris."
    cut = {(0,): "�", (0, 1): "é!", (1,): "!"}  # half a letter, then the other half
    assert following(lambda ids: cut[tuple(ids)], [0], [1]) == "!"


SETTINGS = {
    "repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "num_beams": 3, "max_time": 1e-9, "guidance_scale": 2.0,
    "exponential_decay_length_penalty": (1, 5.0), "min_new_tokens": 6, "bad_words_ids": None, "suppress_tokens": None,
    "forced_eos_token_id": 0, "temperature": 0.1, "do_sample": True, "top_k": 1, "max_new_tokens": 1, "max_length": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_is_the_argmax_whatever_the_checkpoint_asks_for(name):
    lens = tiny_lens("gptj", dtype=torch.float32)
    steps = argmaxes(lens, PROMPTS[2], 8)
    value = (
        [[steps[0]]]
        if name == "bad_words_ids"
        else [steps[0]]
        if name == "suppress_tokens"
        else SETTINGS[name]
    )
    setattr(lens.hf.generation_config, name, value)
    assert both_ways(lens, PROMPTS[2], 8) == lens.tokenizer.decode(steps, skip_special_tokens=True)
    assert getattr(lens.hf.generation_config, name) == value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_a_continuation_ends_where_it_fills_the_context(kind, backend):
    lens = tiny_lens(kind, backend, torch.float32)
    word = " Norway"
    assert len(lens.tokenizer(word)["input_ids"]) == 1
    texts = ["Norway" + word * (n - 1) for n in (128, 125, 4)]
    lengths = [len(lens.tokenize(text)[0].ids) for text in texts]
    with pytest.warns(
        UserWarning, match="continuations end where they fill the model's context of 128 tokens"
    ):
        out = both_ways(lens, texts, 6)
    short = [min(6, 128 - length) for length in lengths]
    assert short[0] == 0
    assert 0 < short[1] < 6
    expected = [
        lens.tokenizer.decode(argmaxes(lens, text, n), skip_special_tokens=True)
        for text, n in zip(texts, short, strict=True)
    ]
    assert out == expected
    with pytest.raises(ConfigError, match="longer than the model's context"):
        lens.generate([PROMPTS[0], texts[0] + word * 2], 3)


def test_no_tokens_are_no_text_and_less_is_refused():
    lens = tiny_lens("gptj", dtype=torch.float32)
    assert both_ways(lens, list(PROMPTS), 0) == ["", "", ""]
    with pytest.raises(ConfigError, match="max_new_tokens"):
        lens.generate(PROMPTS[0], -1)
    drawn = [lens.generate(PROMPTS[0], 8, top_k=50, seed=seed) for seed in (3, np.int64(3), 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ConfigError, match="top_k"):
        lens.generate(PROMPTS[0], 3, top_k=0)


def test_a_checkpoint_with_odd_settings_is_saved_whole(tmp_path):
    lens = tiny_lens("gptj", dtype=torch.float32)
    lens.hf.generation_config = GenerationConfig(do_sample=False, eos_token_id=0)
    lens.hf.generation_config.temperature = 0.6
    folder = lens.save(tmp_path / "new" / "model")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.6
    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([lens.tokenize(PROMPTS[0])[0].ids])
    torch.testing.assert_close(again(ids).logits, lens.logits(ids.tolist()), atol=1e-5, rtol=0)


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    lens = tiny_lens("gptj", dtype=torch.float32)

    def full(*_arguments, **_options):
        raise OSError("No space left on device")

    monkeypatch.setattr(lens.tokenizer, "save_pretrained", full)
    with pytest.raises(ConfigError, match="No space left"):
        lens.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    lens.save(tmp_path / "model")


# ------------------------------------------------------------------ threads


def test_passes_of_several_threads_do_not_mix():
    lens = tiny_lens("gptj", dtype=torch.float32)
    texts = [
        f"{name} works for"
        for name in ["Olga", "Tim", "Ann", "Norway", "Intel", "Pelodan", "Duncan", "Elena"]
    ] * 3
    facts = [qv.Fact("{}", text, "Nortek") for text in texts]
    alone = [qv.value_neurons(lens, fact, 10).units for fact in facts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda fact: qv.value_neurons(lens, fact, 10).units, facts))
    assert together == alone


def test_what_one_thread_has_in_force_does_not_act_in_another():
    lens = tiny_lens("gptj", dtype=torch.float32)
    clean = lens.next_token_logits(PROMPTS)
    with ThreadPoolExecutor(1) as pool:
        with lens.intervene(qv.Zero(qv.NeuronSet.of([(0, n) for n in range(40)]))):
            assert (lens.next_token_logits(PROMPTS) - clean).abs().max() > 1e-2
            with pytest.raises(ConfigError, match="Another thread has interventions"):
                pool.submit(lens.next_token_logits, PROMPTS).result()
            with pytest.raises(ConfigError, match="Another thread"):
                pool.submit(lens.generate, PROMPTS[0], 2).result()
        assert torch.equal(pool.submit(lens.next_token_logits, PROMPTS).result(), clean)


def test_inference_mode_is_refused_in_a_sentence():
    lens = tiny_lens("gptj", dtype=torch.float32)
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"torch.no_grad\(\)"):
        lens.logprob("Olga Pelodan works for", "Nortek")


def test_draws_are_from_the_likeliest_by_their_probabilities_and_follow_the_seed():
    """Of tokens with 4/10, 3/10, 2/10 and 1/10, top_k=3: 4/9, 3/9 and 2/9 of 900 draws."""
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])

    def logits(rows, last):
        return p.log().expand(len(rows), max(map(len, rows)), 4)

    def drawn(rows, seed, steps=900):
        return plain(logits, rows, steps, frozenset(), Sampling(3, seed))

    (one,) = drawn([[1]], seed=0)
    counts = torch.bincount(torch.tensor(one), minlength=4) / 900
    assert counts[0] == 0
    assert counts.tolist() == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.06)
    # a row's draws depend on no other row, and on the seed
    assert drawn([[2, 3], [1]], seed=0, steps=30)[1] == one[:30]
    assert drawn([[1]], seed=1, steps=30)[0] != one[:30]
    assert drawn([[2]], seed=0, steps=30)[0] != one[:30]
