"""Read prompt files: a prompt a line, tables with a header, and JSON; each error names its line."""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.config import ConfigError
from rlhf.types import Prompt, row_of

TEXT, TABLES, JSON = ("", ".txt", ".text", ".lst", ".prompts"), (".csv", ".tsv"), (".json", ".jsonl", ".ndjson")
KINDS = f"a text file of a prompt a line (.txt), {', '.join(TABLES)} with a column 'prompt', or {', '.join(JSON)}"
ROW = 'a string, or a row such as {"prompt": "a cat"}'
# The first line of a table or of JSON in a file whose name says text.
NO_TEXT = re.compile(r'\{\s*"|\[\s*(["{]|$)|(?=.*[,;\t])("?\w*"?[,;\t])*"?prompt"?([,;\t]"?\w*"?)*$')
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"}  # Unicode categories
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # of other categories


def read_prompt_file(path: Path) -> list[Prompt]:
    """Return the prompts of a file with the fields of their rows.

    The ending says what is in the file, in any case of letters. Raises ConfigError, with the line,
    for a file that is empty, malformed, of another kind or not UTF-8.
    """
    where, ending = f"prompt file {path}", path.suffix.lower()
    read = next((read for kinds, read in READERS if ending in kinds), None)
    if read is None:
        raise ConfigError([f"{where}: got a file of kind {ending}, expected {KINDS}; save it as one of these"])
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows begins a file with
    except UnicodeDecodeError as error:
        raise ConfigError([f"{where}: got {error.reason}, expected UTF-8; save it as UTF-8"]) from error
    if "\0" in text:
        raise ConfigError([f"{where}: got NUL characters, as UTF-16 has, expected UTF-8; save it as UTF-8"])
    text = text.replace("\ufeff", "")  # the mark in the middle of files that were joined
    prompts = [as_prompt(row, f"{where}, {place}") for place, row in read(text, where)]
    if not prompts:
        raise ConfigError([f"{where}: got no prompts, expected {KINDS}; write at least one"])
    return prompts


def as_prompt(row: Any, where: str) -> Prompt:
    """Return a string, or a row with a "prompt", as a prompt. Raises ConfigError with `where`."""
    fields = dict(row) if isinstance(row, Mapping) else row_of(row)
    text, negative = fields.get("prompt"), fields.get("negative_prompt")
    if not isinstance(text, str) or not isinstance(negative, str | None):
        raise ConfigError([f"{where}: got {_shorten(row)}, expected {ROW}; correct it"])
    if "\0" in text or not any(map(_is_visible, text)):
        raise ConfigError([f"{where}: got {_shorten(text)}, expected visible text; write a prompt, or delete it"])
    try:
        fields = json.loads(json.dumps(fields, allow_nan=False, default=lambda value: value.tolist()))
        json.dumps(fields, ensure_ascii=False).encode()  # half of a pair of surrogates has no UTF-8
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        expected = "expected fields that JSON can hold, so that a resumed run reads the same"
        raise ConfigError([f"{where}: got {_shorten(row)} ({error}), {expected}; leave the field out"]) from None
    return Prompt(text, fields)


def _is_visible(letter: str) -> bool:
    """Return whether a letter prints anything."""
    return unicodedata.category(letter) not in INVISIBLE and letter not in BLANK_LETTERS


def _shorten(value: Any) -> str:
    """Return repr(value), cut off after 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _text_rows(text: str, where: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the prompt of each line that is neither blank nor a comment."""
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    for number, line in lines[:1]:
        if NO_TEXT.match(line):
            expected = "expected a prompt a line; let its name end in .csv, .tsv or .jsonl, as what it is"
            raise ConfigError([f"{where}, line {number}: got {_shorten(line)}, {expected}"])
    yield from ((f"line {number}", line) for number, line in lines)


def _table_rows(text: str, where: str) -> Iterator[tuple[str, dict]]:
    """Yield the place and the cells of each row by column; an empty cell is None."""
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter=max("\t;,", key=header.count), strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        named = [name for name in columns if name]  # tables of pandas have a first column without a name
        if "prompt" not in named or len(set(named)) < len(named):
            expected = "expected different ones, one of them 'prompt'; rename the column"
            raise ConfigError([f"{where}, line 1: got the columns {_shorten(columns)}, {expected}"])
        for cells in reader:
            if len(cells) != len(columns) and cells:
                raise csv.Error(f"{len(cells)} cells for {len(columns)} columns")
            if any(cells):
                row = zip(columns, cells, strict=True)
                yield f"line {reader.line_num}", {name: cell.strip() or None for name, cell in row if name}
    except csv.Error as error:
        cure = "put text that has the separator or a quote into double quotes, and double quotes inside it twice"
        raise ConfigError([f"{where}, line {reader.line_num}: got {error}, expected a cell a column; {cure}"]) from None


def _json_rows(text: str, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and the row of each item of a list, or else of each line."""
    is_list = text.lstrip().startswith("[")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, content in [(0, text)] if is_list else lines:
        try:
            found = json.loads(content, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            place = where if is_list else f"{where}, line {number}"
            raise ConfigError([f"{place}: got {error}, expected {ROW}; correct it"]) from None
        yield from ((f"row {i}", row) for i, row in enumerate(found, 1)) if is_list else [(f"line {number}", found)]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """Return a JSON object. Raise ValueError for a key twice, of which JSON keeps the last."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a key twice among {', '.join(key for key, _ in pairs)}")
    return found


READERS = ((TEXT, _text_rows), (TABLES, _table_rows), (JSON, _json_rows))
