"""Prompts are found, read and ordered; wrong ones are refused before anything else happens."""

import pytest

from rlhf.config import ConfigError
from rlhf.prompts import as_prompts, load_prompts, shuffled_indices
from rlhf.run.folder import write_prompts


def test_a_file_gives_its_lines_without_comments_and_blanks(tmp_path):
    (tmp_path / "p.txt").write_text("# mine\n a cat \n\nzwölf Boxkämpfer\n", encoding="utf-8")
    assert load_prompts("p.txt", tmp_path, count=1) == ["a cat", "zwölf Boxkämpfer"]


def test_a_file_is_looked_for_beside_the_config_then_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "p.txt").write_text("far")
    monkeypatch.chdir(tmp_path)
    assert load_prompts("p.txt", tmp_path / "here", 1) == ["far"]
    (tmp_path / "here" / "p.txt").write_text("near")
    assert load_prompts("p.txt", tmp_path / "here", 1) == ["near"]


def test_a_file_of_windows_reads_as_any_other(tmp_path):
    (tmp_path / "p.txt").write_text("# mine\r\na cat\r\n", encoding="utf-8-sig")
    assert load_prompts("p.txt", tmp_path, count=1) == ["a cat"]


def test_rows_are_read_as_they_were_written(tmp_path):
    prompts = ["# no comment", "two\nlines", " zwölf \u2028 Boxkämpfer", ""]
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert load_prompts("p.jsonl", tmp_path, count=1) == prompts
    write_prompts(tmp_path / "p.jsonl", prompts[:2])  # as a run that goes on with fewer of them
    assert load_prompts("p.jsonl", tmp_path, count=1) == prompts
    write_prompts(tmp_path / "p.jsonl", prompts[1:])
    assert load_prompts("p.jsonl", tmp_path, count=1) == prompts[1:]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "id": 3}\n\n"a dog"\n')
    assert load_prompts("p.jsonl", tmp_path, count=1) == ["a cat", "a dog"]


def test_a_file_without_rows_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"p.jsonl: got no rows, expected strings or rows"):
        load_prompts("p.jsonl", tmp_path, count=1)


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


@pytest.mark.parametrize("dataset", [[], [{"prompt": 3}], [{"text": "a"}], [3], "a red fox", {"train": ["a"]}])
def test_empty_or_wrong_datasets_are_refused(dataset):
    with pytest.raises(ConfigError, match="expected strings or rows with a 'prompt'"):
        as_prompts(dataset)


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
