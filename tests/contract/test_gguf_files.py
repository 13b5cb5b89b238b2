"""GGUF files, written from tiny models by llama.cpp's conventions: the model that is loaded computes
what the one they were written from computes, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import qv_lens as qv
from qv_lens.errors import ModelError
from qv_lens.models.fetch import _convert
from qv_lens.models.zoo import n_layers
from tests.models import tiny_of, tokenizer

PROMPT = "Tim Duncan, a player of great fame, plays the sport of"


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp turns neighbours where Hugging Face turns halves."""
    rows, *rest = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def written(path: Path, hf, family: str, header=(), tensors=()) -> Path:
    """A model as a GGUF file; `header` and `tensors` come on top."""
    config, names = hf.config, {}
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add = {
        str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
    }  # fmt: skip
    for key, value in header:
        whole = key if key.startswith("tokenizer") else f"{family}.{key}"
        add[type(value)](whole, value)
    _write_tokenizer(writer, config.vocab_size)
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[family]
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, weight in hf.state_dict().items():
        base, _, suffix = name.rpartition(".")
        stored = weight.float().numpy()
        if family == "llama" and ".q_proj" in name:
            stored = paired(stored, config.num_attention_heads)
        if family == "llama" and ".k_proj" in name:
            stored = paired(stored, config.num_key_value_heads)
        names[f"{table.get_name(base)}.{suffix}"] = np.ascontiguousarray(stored)
    for name, tensor in [*names.items(), *tensors]:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    said = json.loads(tokenizer().backend_tokenizer.to_str())
    by_id = {token: text for text, token in said["model"]["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([3 if i == 0 else 1 if i in by_id else 5 for i in range(size)])
    writer.add_token_merges([" ".join(merge) for merge in said["model"]["merges"]])
    writer.add_eos_token_id(0)


@pytest.mark.parametrize(("name", "family"), [("Llama", "llama"), ("Qwen2", "qwen2")])
def test_a_file_gives_the_model_that_it_was_written_from(tmp_path, name, family):
    hf = tiny_of(name)
    base = ("rope.freq_base", 10000.0)
    lens = qv.load(written(tmp_path / "a.gguf", hf, family, [base, ("rope.dimension_count", 8)]))
    ids = tokenizer()(PROMPT)["input_ids"]
    assert lens.tokenize(PROMPT)[0].ids == tuple(ids)
    theirs = hf(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(lens.logits([ids])[0], theirs, atol=1e-4, rtol=1e-4)
    assert n_layers(str(tmp_path / "a.gguf")) == hf.config.num_hidden_layers


REFUSED = {
    "the linear scaling": [("rope.scaling.type", "linear"), ("rope.scaling.factor", 8.0)],
    "the yarn scaling": [("rope.scaling.type", "yarn"), ("rope.scaling.factor", 4.0)],
    "linear scaling of its rotary": [("rope.scale_linear", 4.0)],
    "a sliding window of 6 tokens": [("attention.sliding_window", 6)],
    "30 as the cap of its logits": [("final_logit_softcapping", 30.0)],
    "that a BOS stands in front": [("tokenizer.ggml.add_bos_token", True)],
    "that a BOS stands in front of every text": [("tokenizer.ggml.pre", "llama-bpe")],
}


@pytest.mark.parametrize("said", REFUSED)
def test_settings_that_are_not_taken_are_refused(tmp_path, said):
    file = written(tmp_path / "a.gguf", tiny_of("Llama"), "llama", REFUSED[said])
    with pytest.raises(ModelError, match=f"another model than the file holds.*{said}"):
        qv.load(file)


def test_a_bos_that_the_tokenizer_leaves_out_may_be_put_there(tmp_path):
    """Llama 3's tokenizer puts a BOS without being told; transformers makes one that puts none."""
    header = [("tokenizer.ggml.pre", "llama-bpe"), ("tokenizer.ggml.bos_token_id", 0)]
    file = written(tmp_path / "a.gguf", tiny_of("Llama"), "llama", header)
    with pytest.raises(ModelError, match="prepend_bos=True puts it there"):
        qv.load(file)
    ids = tokenizer()(PROMPT)["input_ids"]
    assert qv.load(file, prepend_bos=True).tokenize(PROMPT)[0].ids == (0, *ids)


def test_how_many_dimensions_turn_is_compared(tmp_path):
    """transformers takes the count for the size of a head in Llama's files, and nowhere else."""
    file = written(tmp_path / "a.gguf", tiny_of("Qwen2"), "qwen2", [("rope.dimension_count", 4)])
    with pytest.raises(ModelError, match="that 4 dimensions of a head are turned"):
        qv.load(file)


@pytest.mark.parametrize(
    "tensor", [("rope_freqs.weight", np.ones(4, np.float32)), ("blk.0.attn_q.bias", np.ones(32, np.float32))]
)  # fmt: skip
def test_tensors_that_are_not_taken_are_refused(tmp_path, tensor):
    file = written(tmp_path / "a.gguf", tiny_of("Llama"), "llama", tensors=[tensor])
    with pytest.raises(ModelError, match=f"1 of its tensors, first '{tensor[0]}'"):
        qv.load(file)


def test_what_lies_beside_a_file_is_not_taken_for_its_own(tmp_path):
    file = written(tmp_path / "a.gguf", tiny_of("Llama"), "llama")
    other = tokenizer()
    other.add_tokens(["Tim"], special_tokens=False)
    other.save_pretrained(tmp_path)
    wanted = tuple(tokenizer()(PROMPT)["input_ids"])
    assert tuple(other(PROMPT)["input_ids"]) != wanted
    assert qv.load(file).tokenize(PROMPT)[0].ids == wanted
    _convert(file, tmp_path / "made", tmp_path / "kept")
    assert qv.load(tmp_path / "kept").tokenize(PROMPT)[0].ids == wanted


def test_a_file_cut_in_its_header_has_no_layers(tmp_path):
    file = written(tmp_path / "a.gguf", tiny_of("Llama"), "llama")
    file.write_bytes(file.read_bytes()[:5000])
    for read in (n_layers, qv.load):
        with pytest.raises(ModelError, match="Cannot read the"):
            read(str(file))
