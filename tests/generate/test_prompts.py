"""Prompt files: what is read, and the line that each complaint names."""

import json

import numpy as np
import pytest
import torch

from neox.generate.prompts import prompt_list, read_prompts, token_ids


def test_a_line_of_text_is_a_prompt_as_it_stands(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeff one \r\n\n  \t\nnaïve\\n\u2028two\nlast".encode())
    assert read_prompts(file) == [(" one ", f"{file}:1"), ("naïve\\n\u2028two", f"{file}:4"), ("last", f"{file}:5")]


def test_a_line_of_json_holds_prompt_or_context(tmp_path):
    file = tmp_path / "p.JSONL"
    lines = [{"prompt": "a\nb", "context": "no"}, {"context": "c", "text": "what gpt-neox writes"}, {"prompt": ""}]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_prompts(str(file)) == [("a\nb", f"{file}:1"), ("c", f"{file}:3"), ("", f"{file}:5")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "p.txt: no prompt in it; write one a line, or give prompt=''"),
        ("p.jsonl", b"\n \n", "p.jsonl: no prompt in it"),
        ("p.csv", b"a", "p.csv: prompts come from a .txt (one a line) or a .jsonl (key prompt or context)"),
        ("p.txt", b"a\nb\xff\n", "p.txt:2: not UTF-8 at byte 1 of the line"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: not JSON (Expecting value: column"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl:1: not JSON ("),
        ("p.jsonl", b'["a"]', 'p.jsonl:1: not a JSON object such as {"prompt": "..."}'),
        ("p.jsonl", b'{"text": "a", "id": 1}', "p.jsonl:1: no key prompt or context (keys here: text, id)"),
        ("p.jsonl", b'\n{"prompt": 3}', "p.jsonl:2: key prompt must hold a string"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_prompts(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.txt: no such file"):
        read_prompts(tmp_path / "absent.txt")


def test_prompts_of_numbers_as_lists_arrays_and_tensors():
    for prompts in ([1, 2, 3], np.array([1, 2, 3]), torch.tensor([1, 2, 3]), [np.int64(1), np.int64(2), np.int64(3)]):
        (one,) = prompt_list(prompts)
        assert token_ids(one) == [1, 2, 3]
    rows = [[1, 2], [3, 4]]
    for prompts in (rows, np.array(rows), torch.tensor(rows), [np.array([1, 2]), torch.tensor([3, 4])]):
        assert [token_ids(one) for one in prompt_list(prompts)] == rows
    assert prompt_list("text") == ["text"]
    assert prompt_list(["a", [1]]) == ["a", [1]]
    assert prompt_list([]) == []
    for wrong in ([5.7], [[5.7]], np.array([5.7]), [[[1]]], [["a"]], [[None]], torch.rand(2, 2), torch.ones(2, 2, 2)):
        with pytest.raises(ValueError, match="a prompt of token ids holds .*: give whole numbers, one list a prompt"):
            [token_ids(one) for one in prompt_list(wrong)]
