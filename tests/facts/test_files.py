"""Files and tables as records and texts: the same facts whatever holds them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qv_lens as qv
from qv_lens.editing.statistics import covariance
from qv_lens.errors import ConfigError, EditError
from qv_lens.facts.benchmarks import parse, read
from qv_lens.facts.corpora import corpus
from qv_lens.facts.files import plain, read_texts
from qv_lens.facts.records import Fact
from tests.facts.test_benchmarks import COUNTERFACT, FLAT, KNOWEDIT, MQUAKE_T
from tests.models import tiny_lens

PLAIN = {"prompt": "{} plays", "subject": "Pele", "answer": "football"}
OTHER = {"prompt": "{} plays", "subject": "Ann", "answer": "golf"}
LINES = json.dumps(PLAIN) + "\n" + json.dumps(OTHER) + "\n"
FACTS = (Fact("{} plays", "Pele", "football"), Fact("{} plays", "Ann", "golf"))
#: what str.splitlines splits at, besides line feeds
ODD = ["\u2028", "\u2029", "\u0085", "\u000b", "\u001c"]


@pytest.mark.parametrize("odd", ODD)
def test_lines_end_at_a_line_feed_alone(odd, tmp_path):
    subject = f"Tim{odd}Duncan"
    record = json.dumps({**PLAIN, "subject": subject}, ensure_ascii=False)
    path = tmp_path / "x.jsonl"
    path.write_text(record + "\n" + json.dumps(OTHER) + "\n", encoding="utf-8")
    got = read(path)
    assert [fact.subject for fact in got.facts] == [subject, "Ann"]
    path.write_text(record + "\n\n" + json.dumps({**OTHER, "answer": ""}) + "\n", encoding="utf-8")
    assert read(path, skip=True).refused.loc[0, ["record", "line"]].tolist() == [1, 3]


@pytest.mark.parametrize(("name", "text"), [
    ("x.jsonl", LINES), ("x.JSONL", LINES), ("x.ndjson", LINES), ("x.jsonl", LINES.replace("\n", "\r\n")), ("x.jsonl", "\ufeff" + LINES),
    ("x.jsonl", LINES.replace("\n", "\n\ufeff")), ("x.jsonl", LINES.rstrip("\n")), ("x.json", LINES), ("x.JSON", LINES), ("x.json", "\n" + LINES),
    ("x.json", f"[{LINES.strip().replace(chr(10), ',')}]"), ("x.Json", json.dumps([PLAIN, OTHER], indent=2)), ("x.jsonl", json.dumps([PLAIN, OTHER], indent=2)),
])  # fmt: skip
def test_the_same_facts_whatever_the_files_name_and_lines(name, text, tmp_path):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert read(path).facts == FACTS


@pytest.mark.parametrize(("name", "sign"), [("x.csv", ","), ("x.CSV", ","), ("x.tsv", "\t")])
def test_facts_in_a_table(name, sign, tmp_path):
    """A cell with a comma, a sign or a line's end stands in quotation marks; an empty one is
    missing."""
    path, names = tmp_path / name, ("subject", "category", "prompt", "answer")
    rows = [
        names,
        ("Duncan, Tim", "sport", "{} plays", "1912"),
        ('Ann "A" Lee', "", "{}\nplays", "golf"),
        ("Ben", "", "{} plays", ""),
        ("Cid", "x", "{} plays", "chess"),
    ]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=sign).writerows(rows)
    got = read(path, skip=True)
    assert [(f.subject, f.prompt, f.answer, f.category) for f in got.facts] == [
        ("Duncan, Tim", "{} plays", "1912", "sport"),
        ('Ann "A" Lee', "{}\nplays", "golf", None),
        ("Cid", "{} plays", "chess", "x"),
    ]
    assert got.refused[["record", "line", "field"]].to_numpy().tolist() == [[2, 5, "answer"]]
    with path.open("a", encoding="utf-8", newline="") as file:  # what a spreadsheet leaves
        file.write("\r\n" + 3 * sign + "\r\n" + sign.join("ab") + "\r\n")
    assert read(path, skip=True).refused[["record", "line"]].to_numpy().tolist() == [[2, 5], [4, 9]]
    path.write_text(";".join(names) + "\n")
    with pytest.raises(
        qv.QVLensError, match=f"parted by ';', not by {sign!r}".replace("\\", r"\\")
    ):
        read(path)
    path.write_text("\n".join(sign.join(cells) for cells in (names, rows[4], "abc")))
    with pytest.raises(qv.QVLensError, match=r"line 3, .*not as many cells as the first row"):
        read(path)
    path.write_text(sign.join(names) + '\n"abc' + "\n")
    with pytest.raises(qv.QVLensError, match="is no table: unexpected end of data"):
        read(path)


def test_one_record_is_a_file_of_records(tmp_path):
    path = tmp_path / "one.json"
    path.write_text("\n" + json.dumps(PLAIN, indent=2))
    assert read(path).facts == FACTS[:1]
    path.write_text("\n" + json.dumps({**PLAIN, "answer": 3}))
    with pytest.raises(qv.QVLensError, match=r"one\.json, line 2, record 0 .*field 'answer'"):
        read(path)


def test_a_line_that_is_no_json_in_a_json_file_costs_that_record_alone(tmp_path):
    path = tmp_path / "torn.json"
    path.write_text(json.dumps(PLAIN) + "\n{torn\n" + json.dumps(OTHER) + "\n")
    got = read(path, skip=True)
    assert got.facts == FACTS
    assert got.refused["line"].tolist() == [2]


@pytest.mark.parametrize(
    "record",
    [COUNTERFACT, FLAT, KNOWEDIT, MQUAKE_T, PLAIN],
    ids=["counterfact", "flat", "knowedit", "mquake", "plain"],
)
def test_data_frames_and_parquet_hold_the_same_records(record, tmp_path):
    """Lists come back as arrays, and what one record lacks as None or NaN."""
    bare = (
        {key: value for key, value in record.items() if key != "case_id"}
        if record is FLAT
        else record
    )
    records = [record, bare]
    frame = pd.DataFrame(records)
    path = tmp_path / "records.PARQUET"
    frame.to_parquet(path)
    want = parse(records)
    for got in (
        parse(frame),
        read(path),
        parse(pd.read_parquet(path)),
        parse(row for row in records),
        parse([row for _, row in frame.iterrows()]),
    ):
        assert got.format == want.format
        assert got.facts == want.facts
        for ours, theirs in zip(got.cases, want.cases, strict=True):
            assert ours.requests == theirs.requests
            assert {**ours.__dict__, "extra": ()} == {**theirs.__dict__, "extra": ()}


def test_zsre_from_a_frame():
    record = {
        "src": "Pele plays",
        "subject": "Pele",
        "answers": ["football", "soccer"],
        "alt": "golf",
        "rephrase": "q",
        "loc": "l",
        "loc_ans": "g",
    }
    frame = pd.DataFrame(
        [{**record, "answers": np.array(record["answers"])}, {**record, "alt": np.nan}]
    )
    got = parse(frame, skip=True)
    assert got.cases == parse([record]).cases
    assert got.refused[["record", "field", "reason"]].values.tolist() == [
        [1, "alt", "is None, not a text"]
    ]


def test_values_as_json_would_hold_them():
    value = {
        "a": np.array([1, 2]),
        "b": np.float32(0.5),
        "c": np.nan,
        "d": [pd.NA, {"e": pd.NaT, "f": np.array([np.array(["x"])])}],
        "g": True,
    }
    assert plain(value) == {
        "a": [1, 2],
        "b": 0.5,
        "c": None,
        "d": [None, {"e": None, "f": [["x"]]}],
        "g": True,
    }


@pytest.mark.parametrize("records", [{"a": 1}, "facts.json", b"x", 3, None])
def test_what_is_no_list_of_records_is_told(records):
    with pytest.raises(qv.QVLensError, match="parse takes a list of records"):
        parse(records)
    if not isinstance(records, str):
        with pytest.raises(qv.QVLensError, match="read takes a file"):
            read(records)


def test_a_damaged_parquet_file_is_told(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(qv.QVLensError, match=r"x\.parquet is no parquet file"):
        read(tmp_path / "x.parquet")


# ------------------------------------------------------------------ texts

TEXTS = ["The capital of Norway is Oslo.", "Tim\u2028Duncan plays, and plays", "詹姆斯是哪国人"]
ROWS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
IN_LINES = "".join(
    json.dumps(row, ensure_ascii=False) + "\n" for row in [*ROWS[:1], {"text": " \n"}, *ROWS[1:]]
)


@pytest.mark.parametrize(("name", "content"), [
    ("x.txt", "\n\n".join(TEXTS) + "\n"), ("x.TXT", "\r\n".join(TEXTS)), ("x.txt", "\ufeff" + "\n\ufeff".join(TEXTS)), ("x", "\n".join(TEXTS)),
    ("x.jsonl", IN_LINES), ("x.JSONL", IN_LINES), ("x.ndjson", "\ufeff" + IN_LINES), ("x.txt", IN_LINES), ("x.json", IN_LINES), ("x.jsonl", IN_LINES.replace("\n", "\r\n")),
    ("x.json", json.dumps(ROWS, indent=1)), ("x.JSON", json.dumps(TEXTS)), ("x.jsonl", "".join(json.dumps(text) + "\n" for text in TEXTS)),
    ("x.jsonl", IN_LINES.replace('"text": "The', '"text": "\ufeffThe')),
])  # fmt: skip
def test_texts_of_a_file(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert list(corpus(str(path))) == TEXTS


def test_a_text_may_quote_json(tmp_path):
    """The first line tells whether a file holds JSON lines; later ones are what they are."""
    texts = ["A record is", json.dumps(ROWS[0]), "{", json.dumps(["text"])]
    for lines in (texts, texts[2:], texts[3:]):
        (tmp_path / "x.txt").write_text("\n".join(lines))
        assert list(corpus(str(tmp_path / "x.txt"))) == lines


def test_texts_of_tables_and_folders(tmp_path):
    frame = pd.DataFrame(ROWS)
    frame.to_parquet(tmp_path / "x.parquet")
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_csv(tmp_path / "x.TSV", sep="\t", index=False, encoding="utf-8-sig")
    for name in ("x.parquet", "x.csv", "x.TSV"):
        assert list(corpus(str(tmp_path / name))) == TEXTS
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.{'TXT' if number else 'txt'}").write_text(
            text + "\n", encoding="utf-8-sig"
        )
    assert list(corpus(str(folder))) == TEXTS


def test_texts_of_a_table_are_taken_as_they_stand(tmp_path):
    """Not as pandas would: "NA" as nothing, "1984" as a number; blank ones are left out, as in
    JSON."""
    path = tmp_path / "x.csv"
    path.write_text('text,number\nNA,1\n1984,2\n"",3\nnull,4\n')
    assert list(corpus(str(path))) == ["NA", "1984", "null"]
    path = tmp_path / "x.jsonl"
    path.write_text('\n[{"text": "a"},\n {"text": "b"}]\n')
    assert list(corpus(str(path))) == ["a", "b"]


@pytest.mark.parametrize(("name", "content", "words"), [
    ("x.jsonl", json.dumps(ROWS[0]) + "\n" + json.dumps({"content": "a"}), r"x\.jsonl, line 2: texts are expected in a field \"text\", the record has \['content'\]"),
    ("x.jsonl", json.dumps({"text": None}), r"line 1: texts are expected in a field \"text\", it holds None"),
    ("x.jsonl", "NaN\n", "it holds nan"),
    ("x.jsonl", "The capital\n", "line 1: it is no JSON"),
    ("x.json", json.dumps([*ROWS, {"text": 3}]), r"x\.json, record 3: .* it holds 3"),
    ("x.json", "{}", "no JSON list of records"),
    ("x.csv", "a,b\n1,2\n", r"record 0: .* the record has \['a', 'b'\]"),
    ("x.parquet", "no", "Cannot read the text"),
    ("x.txt", "\udcff", "Cannot read the text"),
])  # fmt: skip
def test_records_without_texts_are_told(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=words):
        list(corpus(str(path)))


@pytest.mark.parametrize("name", ["x.JSONL", "x.Txt", "x.parquet", "x.csv"])
def test_a_file_that_is_not_there_is_no_dataset(name):
    with pytest.raises(qv.QVLensError, match="There is no file"):
        list(corpus(name))


ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(
    lambda text: text.strip("\ufeff \t\r\n")
)


@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_text_comes_back_from_json_lines_as_it_was(texts, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    )
    assert list(corpus(str(path))) == [text.lstrip("\ufeff") for text in texts]


def test_statistics_of_json_lines_are_those_of_the_texts(tmp_path):
    lens = tiny_lens("gptj")
    path = tmp_path / "x.jsonl"
    path.write_text(IN_LINES, encoding="utf-8")
    got, want = (covariance(lens, texts, [1]) for texts in (corpus(str(path)), TEXTS))
    assert (got.tokens, got.corpus) == (want.tokens, want.corpus)
    assert (got.C0[1] == want.C0[1]).all()


@pytest.mark.parametrize(
    ("texts", "number"),
    [
        (["a b", None], 1),
        (["a b", "c", float("nan")], 2),
        ([b"x"], 0),
        ([["a"]], 0),
        (pd.Series(["a", np.nan]), 1),
    ],
)
def test_statistics_say_which_text_is_none(texts, number, tmp_path):
    with pytest.raises(EditError, match=f"Text {number} of the statistics is"):
        covariance(tiny_lens("gptj"), texts, [1], folder=tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


def test_statistics_of_a_column_of_a_frame():
    lens, frame = tiny_lens("gptj"), pd.DataFrame(ROWS)
    assert covariance(lens, frame["text"], [1]).corpus == covariance(lens, TEXTS, [1]).corpus
    for texts in (frame, {"text": TEXTS}, b"abc"):
        with pytest.raises(EditError, match=r"frame\['text'\]"):
            covariance(lens, texts, [1])


@pytest.mark.parametrize(("options", "words"), [
    ({"layers": []}, "at least one layer"), ({"layers": iter(())}, "at least one layer"), ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    ({"batch_size": -1}, "batch_size"), ({"max_tokens": 0}, "max_tokens"), ({"every": 0}, "every"),
])  # fmt: skip
def test_statistics_of_nothing_are_told(options, words):
    with pytest.raises(EditError, match=words):
        covariance(tiny_lens("gptj"), TEXTS, **{"layers": [1], **options})


TWICE = {
    "head.csv": ("prompt,subject,answer,subject\nThe capital of {} is,France,Paris,Spain\n", "its column 'subject' stands there twice"),
    "list.json": ('[{"prompt": "{} is", "subject": "a", "answer": "b", "answer": "c"}]', "record 0: its 'answer' stands there twice"),
    "one.json": ('{"prompt": "{} is", "subject": "a", "answer": "b", "answer": "c"}', "record 0: its 'answer' stands there twice"),
    "lines.jsonl": ('{"prompt": "{} is", "subject": "a", "answer": "b", "answer": "c"}\n', "its 'answer' stands there twice"),
    "lines.json": ('{"prompt": "{} is", "subject": "a", "answer": "b", "answer": "c"}\n{"prompt": "{} is", "subject": "a", "answer": "b"}\n', "stands there twice"),
    "small.csv": ("Prompt,Subject,Answer\nThe capital of {} is,France,Paris\n", "Write the names of its fields small"),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_a_field_that_stands_twice_is_refused(tmp_path, name):
    """Of two answers no reader knows which one is meant."""
    text, said = TWICE[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(qv.QVLensError, match=said):
        qv.read(tmp_path / name)


def test_a_text_that_stands_twice_is_no_line_of_plain_text(tmp_path):
    (tmp_path / "x.txt").write_text('{"text": "a", "text": "b"}\n{"text": "c"}\n')
    with pytest.raises(qv.QVLensError, match="line 1: its 'text' stands there twice"):
        list(read_texts(tmp_path / "x.txt"))


@pytest.mark.parametrize(
    ("name", "content"), [("x.txt", "\n \n"), ("x.json", "[]"), ("x.csv", "text\n")]
)
def test_a_file_without_a_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(qv.QVLensError, match=rf"{name}.* no (text|records)"):
        list(read_texts(tmp_path / name))


def test_one_record_with_a_field_twice_is_skipped_alone(tmp_path):
    good = '{"prompt": "{} is", "subject": "a", "answer": "b"}'
    bad = good.replace("}", ', "answer": "c"}').replace('{, "answer": "c"} is', "{} is")
    (tmp_path / "x.json").write_text(f"[{good}, {bad}]")
    found = qv.read(tmp_path / "x.json", skip=True)
    assert [fact.answer for fact in found.facts] == ["b"]
    assert found.refused["record"].tolist() == [1]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl"])
def test_another_encoding_is_named_as_the_cause(tmp_path, name, encoding):
    text = (
        "prompt,subject,answer\n{} is,São Paulo,b\n"
        if name == "x.csv"
        else '[{"prompt": "São {}"}]'
    )
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(qv.QVLensError, match=r"not in UTF-8 .* save it in that encoding"):
        qv.read(tmp_path / name)
