"""Prompts are found, read and ordered; wrong ones are refused before anything else happens."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from rlhf.config import ConfigError
from rlhf.prompts import as_prompts, load_prompts, shared_message, shuffled_indices, unread_message
from rlhf.run.folder import write_prompts
from rlhf.types import Prompt, row_of, rows_of

FAULTS = Path(__file__).parents[1] / "data" / "faults"
CIRCLE, STARS = "a small red circle moving left", "two large blue stars growing"
ROWS = [{"prompt": CIRCLE}, {"prompt": STARS}]
READ = {  # files of other tools are quoted as these wrote them
    "data.csv": [{"prompt": "a small red circle, moving left", "category": "shape"}, ROWS[1] | {"category": "count"}],
    "data.tsv": [{"prompt": "a small red circle", "category": "shape"}],
    **dict.fromkeys(("data.json", "rows.JSONL", "rows.ndjson"), ROWS),
    "mine.txt": (
        b"# mine\n a cat \n\nzw\xc3\xb6lf\xc2\xa0K\xe2\x80\xa8a\n",
        [{"prompt": "a cat"}, {"prompt": "zwölf\xa0K\u2028a"}],
    ),
    "windows.TXT": (b"\xef\xbb\xbf# mine\r\na cat\r\n\xef\xbb\xbfa dog", [{"prompt": "a cat"}, {"prompt": "a dog"}]),
    "sqlite.CSV": (
        b'prompt,target,n\n"a ""red"" kite, high up",red,3\n"two boats\nat dusk",,1\n',
        [
            {"prompt": 'a "red" kite, high up', "target": "red", "n": "3"},
            {"prompt": "two boats\nat dusk", "target": None, "n": "1"},
        ],
    ),
    "sqlite.tsv": (b'prompt\ttarget\r\na "red" kite\tred\r\n', [{"prompt": 'a "red" kite', "target": "red"}]),
    "pandas.csv": (b',prompt,n\n0,"a, b",1.0\n1,c,\n', [{"prompt": "a, b", "n": "1.0"}, {"prompt": "c", "n": None}]),
    "excel.csv": (b"\xef\xbb\xbfn;prompt\r\n3; a, b \r\n;\r\n", [{"prompt": "a, b", "n": "3"}]),
    "one_column.csv": (b"prompt\na cat, asleep\n", [{"prompt": "a cat, asleep"}]),
    "jq.json": (
        b'[\n {\n "prompt": "a caf\xc3\xa9",\n "target": null,\n "tags": [\n "x"\n ]\n },\n "rain"\n]\n',
        [{"prompt": "a café", "target": None, "tags": ["x"]}, {"prompt": "rain"}],
    ),
    "lines.json": (
        b'{"prompt":"a b","n":1.0}\n\n"# no comment"\n',
        [{"prompt": "a b", "n": 1}, {"prompt": "# no comment"}],
    ),
}
REFUSED = {
    "utf16le_nobom.txt": "utf16le_nobom.txt: got NUL characters, as UTF-16 has, expected UTF-8; save it as UTF-8",
    "zwsp.txt": r"zwsp.txt, line 3: got '\\u200b', expected visible text",
    "iconv.txt": (b"\0a\0 \0c\0a\0t\0\n", "got NUL characters"),
    "iconv_mark.txt": (b"\xff\xfea\0\n\0", "got invalid start byte, expected UTF-8"),
    "filler.txt": ("a cat\n\u3164\u2063".encode(), "line 2: got .*, expected visible text"),
    "null.json": (b'["a cat", "a\\u0000b"]', "null.json, row 2: got .*, expected visible text"),
    "empty.jsonl": (b"\n", "got no prompts, expected a text file of a prompt a line"),
    "rows.txt": (b'\n{"prompt": "a cat"}\n', "line 2: got .*, expected a prompt a line; let its name end in .csv"),
    "list.txt": (b"[\n", "line 1: got .*, expected a prompt a line"),
    "table.txt": (b"id,prompt\n1,a cat\n", "line 1: got .*, expected a prompt a line"),
    "rows.parquet": (b"PAR1", "got a file of kind .parquet, expected a text file .* save it as one of these"),
    "rows.yaml": (b"- a cat\n", "got a file of kind .yaml"),
    "head.csv": (b"a cat\na dog\n", r"head.csv, line 1: got the columns \['a cat'\], .* one of them 'prompt'; rename"),
    "twice.csv": (b"prompt,prompt\na,b\n", "line 1: got the columns .*, expected different ones"),
    "cells.csv": (b"prompt,n\na cat, asleep,3\n", "line 2: got 3 cells for 2 columns, .* into double quotes"),
    "open.csv": (b'prompt,n\n"a cat,3\n', "line 2: got unexpected end of data, expected a cell a column"),
    "blank.csv": (b"prompt,n\n,3\n", "blank.csv, line 2: got .*, expected a string, or a row such as"),
    "empty_row.jsonl": (b'{"prompt": "a"}\n{"prompt": ""}\n', "empty_row.jsonl, line 2: got '', expected visible text"),
    "blank_row.jsonl": (b'{"prompt": " \\n"}\n', "line 1: got .*, expected visible text; write a prompt, or delete it"),
    "number.jsonl": (
        b'{"prompt": "a"}\n\n{"prompt": 3}\n',
        "number.jsonl, line 3: got {'prompt': 3}, expected a string",
    ),
    "nan.jsonl": (b'{"prompt": "a", "n": NaN}\n', "line 1: got .*nan.*, expected fields that JSON can hold"),
    "negative.jsonl": (b'{"prompt": "a", "negative_prompt": ["b"]}', "line 1: got .*, expected a string, or a row"),
    "again.jsonl": (
        b'{"prompt": "a", "prompt": "b"}\n',
        "line 1: got a key twice among prompt, prompt, expected a string",
    ),
    "half.jsonl": (b'{"prompt": "a", "n": "\\ud83d"}\n', "line 1: got .*surrogates not allowed.*, expected fields"),
    "deep.jsonl": (b"[" * 10**5, "deep.jsonl: got .*, expected a string, or a row"),
}


def files(table: dict) -> list:
    """Rows of a table as parameters: path or content, and what is expected."""
    return [
        pytest.param(name, *(row if isinstance(row, tuple) else (None, row)), id=name) for name, row in table.items()
    ]


@pytest.mark.parametrize(("name", "content", "rows"), files(READ))
def test_a_file_is_read_as_what_its_name_says(tmp_path, name, content, rows):
    if content:
        (tmp_path / name).write_bytes(content)
    prompts = load_prompts(name, tmp_path if content else FAULTS, count=1)
    assert [row_of(prompt) for prompt in prompts] == rows
    assert prompts == [row["prompt"] for row in rows]


@pytest.mark.parametrize(("name", "content", "told"), files(REFUSED))
def test_a_file_that_is_no_list_of_prompts_is_refused_with_its_line(tmp_path, name, content, told):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=told) as error:
        load_prompts(name, tmp_path if content else FAULTS, count=1)
    assert len(error.value.problems) == 1
    assert len(error.value.problems[0]) < 800


def test_a_file_is_looked_for_beside_the_config_then_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "p.txt").write_text("far")
    monkeypatch.chdir(tmp_path)
    assert load_prompts("p.txt", tmp_path / "here", 1) == ["far"]
    (tmp_path / "here" / "p.txt").write_text("near")
    assert load_prompts("p.txt", tmp_path / "here", 1) == ["near"]


def test_rows_are_read_as_they_were_written(tmp_path):
    prompts = ["# no comment", "two\nlines", Prompt(" zwölf \u2028 Boxkämpfer", {"n": [1, None]})]
    write_prompts(tmp_path / "p.jsonl", prompts)
    read = load_prompts("p.jsonl", tmp_path, count=1)
    assert [row_of(prompt) for prompt in read] == [row_of(prompt) for prompt in prompts]
    assert read == prompts
    write_prompts(tmp_path / "p.jsonl", prompts[:2])  # as a run that goes on with fewer of them
    assert load_prompts("p.jsonl", tmp_path, count=1) == prompts
    write_prompts(tmp_path / "p.jsonl", prompts[1:])
    assert load_prompts("p.jsonl", tmp_path, count=1) == prompts[1:]


def test_built_in_sets_are_drawn_from_the_seed_and_share_no_prompt():
    train, held_out = load_prompts("nano_train", None, 300, seed=1), load_prompts("nano_held_out", None, 300)
    assert len(train) == len(held_out) == 300
    assert train == load_prompts("nano_train", None, 300, seed=1) != load_prompts("nano_train", None, 300, seed=2)
    assert not set(train) & set(held_out)


@pytest.mark.parametrize("dataset", [["a", "b"], ({"prompt": p} for p in "ab"), [{"prompt": "a", "x": 1}, "b"]])
def test_datasets_are_strings_or_rows(dataset):
    assert as_prompts(dataset) == ["a", "b"]


def test_a_datasets_dataset_works():
    datasets = pytest.importorskip("datasets")
    assert as_prompts(datasets.Dataset.from_dict({"prompt": ["a", "b"]})) == ["a", "b"]


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        ([], "got no rows, expected strings or rows with a 'prompt'"),
        ("a red fox", "got the string 'a red fox', expected strings or rows with a 'prompt'"),
        ({"train": ["a"]}, "got a dict of 'train', expected strings or rows with a 'prompt'"),
        (["a", " "], "dataset, row 1: got ' ', expected visible text"),
        (["a", {"prompt": 3}], "dataset, row 1: got {'prompt': 3}, expected a string, or a row"),
        ([{"text": "a" * 10**6}], "dataset, row 0: got {'text': 'aaa.* ..., expected a string, or a row"),
        ([{"prompt": "a", "image": object()}], "row 0: .* expected fields that JSON can hold.*leave the field out"),
    ],
)
def test_empty_or_wrong_datasets_are_refused(dataset, told):
    with pytest.raises(ConfigError, match=told) as error:
        as_prompts(dataset)
    assert len(str(error.value)) < 800


def test_fields_of_a_dataset_are_kept_as_a_resumed_run_reads_them():
    (prompt,) = as_prompts([{"prompt": "a", "size": (1, 2), "n": np.int64(3), "box": np.ones(2)}])
    assert row_of(prompt) == {"prompt": "a", "size": [1, 2], "n": 3, "box": [1, 1]}
    assert row_of(as_prompts([prompt])[0]) == row_of(prompt)
    assert vars(pickle.loads(pickle.dumps(prompt))) == vars(prompt), "as it goes to another process"


@pytest.mark.parametrize(
    "read",
    [
        lambda row: row["a"],
        lambda row: row.get("a"),
        lambda row: list(row),
        lambda row: json.dumps(row),
        lambda row: dict(row),
        lambda row: dict(**row),
        lambda row: row.keys(),
        lambda row: row.items(),
        None,
    ],
)
def test_a_field_that_nothing_reads_is_named(read):
    prompts = [Prompt("x", {"a": 1}), "plain", Prompt("y", {"negative_prompt": "z"})]
    for row in rows_of(prompts[: bool(read)]):
        read(row)
    told = unread_message(prompts, guided=False)
    expected = "Fields of the prompts' rows that nothing has read: "
    if read is None:
        assert told == f"{expected}a, negative_prompt."
        assert unread_message(prompts, guided=True) == f"{expected}a."
        assert unread_message(["plain"], guided=False) is None
    else:
        assert told is None or told == f"{expected}negative_prompt."


def test_held_out_prompts_that_are_trained_on_are_counted():
    assert shared_message([CIRCLE, Prompt(STARS, {"a": 1})], [STARS, "rain"]).startswith("1 of 2 held-out prompts are")
    assert shared_message([CIRCLE], [STARS, "rain"]) is None
    assert shared_message([CIRCLE], []) is None


def test_a_reward_cannot_change_a_row_for_others():
    prompt = Prompt("x", {"a": [1]})
    (row,) = rows_of([prompt])
    row["a"].append(2)
    row["b"] = 3
    assert rows_of([prompt]) == [{"prompt": "x", "a": [1]}]


def test_what_yields_names_instead_of_rows_is_no_dataset():
    """Names would be trained on: "train" of what load_dataset returns, "prompt" of a table."""
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"prompt": ["a", "b"]}))
    with pytest.raises(ConfigError, match=r"eval_set: got a DatasetDict of 'train', expected .*; pass one of these"):
        as_prompts(splits, "eval_set")
    table = pandas.DataFrame({"prompt": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"dataset: got a DataFrame of 'prompt', expected .*; pass one of these"):
        as_prompts(table)
    assert as_prompts(splits["train"]) == as_prompts(table["prompt"]) == ["a", "b"]


def test_order_visits_every_prompt_once_an_epoch_and_starts_anywhere():
    whole = shuffled_indices(7, seed=3, start=0, count=21)
    epochs = [whole[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert shuffled_indices(7, seed=3, start=5, count=9) == whole[5:14]
    assert shuffled_indices(7, seed=4, start=0, count=7) != epochs[0]
