"""Tokenizers of other kinds than the bundled ones, by hand: what the user passes is what is used, and
every token is read as it stands in a text."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import qv_lens as qv
from qv_lens.attribution.projection import surface_forms
from qv_lens.errors import ConfigError, ModelError
from qv_lens.models.lens import Lens
from tests.models import BACKENDS, tiny_of, tokenizer


def fast(of: Tokenizer, **special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=of, **special)


def like_sentencepiece(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A blank is part of the token behind it, and stands in front of every text."""
    letters = "abcdefghijklmnopqrstuvwxyzTP(."
    vocabulary = ["<unk>", "<s>", "</s>", *letters, "▁", "▁n", "is", "▁is"]
    merges = [("▁", "n"), ("i", "s"), ("▁", "is")]
    made = Tokenizer(
        models.BPE({text: i for i, text in enumerate(vocabulary)}, merges, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return fast(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def digit_by_digit() -> PreTrainedTokenizerFast:
    """The bundled one with every digit a token of its own, as SmolLM2 and Qwen have them."""
    said = json.loads(tokenizer().backend_tokenizer.to_str())
    digits = {"type": "Digits", "individual_digits": True}
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, said["pre_tokenizer"]]}
    return fast(Tokenizer.from_str(json.dumps(said)), eos_token="<|endoftext|>")


def without_ends() -> PreTrainedTokenizerFast:
    return fast(Tokenizer.from_str(tokenizer().backend_tokenizer.to_str()))


def of(which: PreTrainedTokenizerFast, backend: str = "auto", **options) -> Lens:
    return Lens.from_hf(tiny_of("Llama", torch.float64), which, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", [tokenizer, without_ends, like_sentencepiece])
def test_the_users_tokenizer_stays_as_it_was(made, backend):
    """TransformerLens makes up an end of text, a BOS and padding, in place."""
    mine = made()
    before = copy.deepcopy(mine)
    lens = of(mine, backend)
    assert lens.tokenizer is mine
    assert mine.special_tokens_map == before.special_tokens_map
    assert len(mine) == len(before)
    own = {before.eos_token_id} - {None}
    assert lens.ends_of_text == own | {0}  # the checkpoint's


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_bos_is_made_up(backend):
    with pytest.raises(ModelError, match="this tokenizer has no BOS token"):
        of(without_ends(), backend, prepend_bos=True).tokenize("Olga")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bos", [True, False])
def test_a_tokenizer_made_in_memory_can_be_wrapped(backend, bos):
    lens = of(like_sentencepiece(bos=bos), backend)
    assert lens.str_tokens("n is") == ["<s>"] * bos + [" n", " is"]
    assert of(like_sentencepiece(), backend, prepend_bos=True).str_tokens("n")[0] == "<s>"


def test_what_closes_every_text_is_refused():
    mine = without_ends()
    mine.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    with pytest.raises(ModelError, match=r"puts '<\|endoftext\|>' behind every prompt"):
        of(mine)


def test_a_label_keeps_the_blank():
    lens = of(like_sentencepiece())
    ids = dict(lens.tokenizer.get_vocab())
    shown = {text: lens.token_label(ids[text]) for text in ("▁n", "n", "▁", "▁is", "is")}
    assert shown == {"▁n": " n", "n": "n", "▁": " ", "▁is": " is", "is": "is"}


def test_forms_of_an_answer_with_and_without_a_blank():
    lens = of(like_sentencepiece())
    ids = lens.tokenizer.get_vocab()
    assert {ids["is"], ids["▁is"]} <= surface_forms(lens, "is")


def test_a_first_token_that_is_a_blank_is_told_of():
    lens = of(digit_by_digit())
    facts = [qv.Fact("{} works in the year", "Olga", year) for year in ("1912", "1666")]
    assert [lens.token_label(lens.answer_ids(fact)[0]) for fact in facts] == [" ", " "]
    for ask in (
        lambda: lens.logprob(facts),
        lambda: qv.value_neurons(lens, facts, 3),
        lambda: qv.neuron_effects(lens, facts, 3),
        lambda: qv.neuron_effects(lens, "Olga works in the year", 3, target=("1666", "Oslo")),
        lambda: qv.faithfulness(lens, facts, {}, (1,), seeds=1),
    ):
        with pytest.warns(UserWarning, match="begins with a token that is a blank alone"):
            ask()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qv.value_neurons(lens, facts, 3, target="sequence")
        qv.value_neurons(lens, qv.Fact("{} works in the year ", "Olga", "1912"), 3)
        qv.value_neurons(lens, facts, 3, target="predicted")
    blank = lens.tokenizer.get_vocab()["Ġ"]
    assert blank not in surface_forms(lens, "1912")
    assert lens.tokenizer.get_vocab()["1"] in surface_forms(lens, "1912")


@pytest.mark.parametrize("end", [-1, 5000, [0, 5000], [[0]], "x"])
def test_ends_that_are_no_tokens_end_nothing(end):
    hf = tiny_of("Llama", torch.float64)
    hf.generation_config.eos_token_id = end
    lens = Lens.from_hf(hf, tokenizer())
    assert lens.ends_of_text == {0}
    prompts = ["Olga works for", "Oslo"]
    assert lens.generate(prompts, 3) == [lens.generate(prompt, 3) for prompt in prompts]


def test_a_token_that_the_model_does_not_have():
    mine = tokenizer()
    mine.add_tokens(["Zzyzx"])
    lens = of(mine)
    assert len(lens.next_token_logits("Olga works for")) == 1
    with pytest.raises(ModelError, match="'Zzyzx' has number 1536, and the model has 1536"):
        lens.next_token_logits("Olga works for Zzyzx")


def test_a_checkpoint_with_tensors_that_its_config_has_no_place_for(tmp_path):
    tiny_of("Llama, biases").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        qv.load(tmp_path)
    assert not [one for one in said if "no place" in str(one.message)]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))
    with pytest.warns(UserWarning, match="holds 9 tensors that its config has no place for"):
        qv.load(tmp_path)


def test_positions_that_depend_on_the_longest_prompt_of_a_pass():
    """Phi-3's longrope: one long prompt would change the numbers of every short one."""
    table = {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 6, "rope_theta": 10000.0,
    }  # fmt: skip
    hf = tiny_of("Phi-3", torch.float64, rope_parameters=table, original_max_position_embeddings=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bridge is taken
        lens = Lens.from_hf(hf, tokenizer())
    short, long = "Olga works for", "Tim Duncan, a player of great fame, plays the sport of"
    assert len(lens.next_token_logits([short, "Oslo"])) == 2
    assert len(lens.next_token_logits([long, long])) == 2
    with pytest.raises(ConfigError, match=r"passes of more than 6 tokens.*Ask them apart"):
        lens.next_token_logits([short, long])
