"""Overlap with evaluation sets: against a slow search by strings, lm-eval's own janitor, and real LAMBADA passages."""

import gzip
import json
import string
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox.corpus.clean.overlap import LEAST, MARGIN, MOST, RUN, Overlaps, cut, evaluation_texts
from neox.corpus.clean.shingles import placed, words

LAMBADA = Path(__file__).resolve().parents[4] / "shared" / "data" / "lambada_test.jsonl"

# Few words, so that runs meet by chance; punctuation, case and spaces that must not count.
WORDS = st.sampled_from(["a", "b", "B", "a,", "b.", "—", "«a»", "it’s", "it's", "\xa0", "\x1c", "é", "É", "Σ", "&"])
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from([" ", "\n", "  ", " "])), max_size=60).map(
    lambda parts: "".join(word + space for word, space in parts)
)


def slow_words(text: str) -> list[tuple[str, int, int]]:
    """Words by the description, a character at a time: lower case, between white space, without punctuation."""
    found, begin = [], 0
    for place, character in enumerate(text + " "):
        if character.isspace():
            letters = [
                c for c in text[begin:place] if c not in string.punctuation and unicodedata.category(c)[0] != "P"
            ]
            if letters:
                found.append(("".join(letters).lower(), begin, place))
            begin = place + 1
    return found


@given(TEXTS)
def test_shingle_words_are_those_of_the_description(text: str):
    assert list(placed(text)) == slow_words(text)
    assert words(text) == [word for word, _, _ in slow_words(text)]


@given(st.lists(TEXTS, min_size=1, max_size=3), TEXTS)
def test_decontamination_finds_exactly_the_shared_runs(examples: list[str], text: str):
    runs = set()
    for example in examples:
        spelled = [word for word, _, _ in slow_words(example)]
        runs |= {tuple(spelled[i : i + RUN]) for i in range(len(spelled) - RUN + 1)}
    spelled = slow_words(text)
    marked: set[int] = set()  # words that lie in a shared run
    for i in range(len(spelled) - RUN + 1):
        if tuple(word for word, _, _ in spelled[i : i + RUN]) in runs:
            marked |= set(range(i, i + RUN))
    starts = [spelled[i][1] for i in sorted(marked) if i - 1 not in marked]
    ends = [spelled[i][2] for i in sorted(marked) if i + 1 not in marked]
    found = Overlaps.of([("set", examples)]).find(text)
    assert [(overlap.start, overlap.end) for overlap in found] == list(zip(starts, ends, strict=True))


def test_decontamination_equals_the_janitor_of_lm_eval():
    """On ASCII text whose words all hold a letter: there the janitor's words are those of the description."""
    janitor_module = pytest.importorskip("lm_eval.decontamination.janitor")
    examples = [f"The {i}th question: which of the {i} numbers, if any, is (for all we know) one?" for i in range(9)]
    janitor = janitor_module.Janitor()
    for example in examples:
        janitor.register_contaminant_python(example)
    filler = [" ".join(f"Word{i}x{j}." for j in range(120)) for i in range(5)]
    text = filler[0]
    for number, between in zip((3, 5, 7), filler[1:], strict=False):
        # Thirteen words: the janitor cuts at each run apart, and where a match is one run that is the same.
        text += " " + " ".join(examples[number].upper().split()[:RUN]) + " " + between
    overlaps = Overlaps.of([("questions", examples)]).find(text)
    assert len(overlaps) == 3
    first, second, third, last = janitor.clean_python(text)
    # Between two cuts its margin is one character short.
    assert cut(text, overlaps) == [first, second[1:], third[1:], last]


def test_decontamination_cuts_as_described():
    run = " ".join(f"w{i}" for i in range(RUN))
    index = Overlaps.of([("set", [run])])

    def left(text: str) -> list[str]:
        return cut(text, index.find(text))

    assert left("short but clean") == ["short but clean"]
    assert left(run) == []
    kept = "x" * (LEAST + 1)
    margin = " " + "y" * (MARGIN - 2) + " "
    assert left(kept + margin + run + margin + kept) == [kept, kept]
    assert left(kept[1:] + margin + run + margin + kept) == [kept]  # 200 characters are not more than 200
    between = f" {'y' * (2 * MARGIN + LEAST)} "
    assert len(left(between.join([run] * (MOST - 1)) + between)) == MOST - 1
    assert left(between + between.join([run] * MOST) + between) == []  # eleven pieces


def test_decontamination_of_lambada_passages_in_a_book(tmp_path):
    if not LAMBADA.exists():
        pytest.skip("needs ../shared/data/lambada_test.jsonl")
    texts = list(evaluation_texts(str(LAMBADA)))
    index = Overlaps.of([("lambada", texts)])
    assert index.sets[0].examples == len(texts) == 5153
    for number in range(0, 5000, 500):
        filler = " ".join(f"Sentence{i} says{i}." for i in range(100))
        quoted = texts[number].upper().replace(" ", "\n")
        found = index.find(f"{filler} {quoted} {filler}")
        assert [overlap.set for overlap in found] == ["lambada"]
        assert (found[0].start, found[0].end) == (len(filler) + 1, len(filler) + 1 + len(quoted.rstrip()))


def test_evaluation_sets_from_files(tmp_path):
    rows = [{"question": "Why?", "choices": ["a b", {"text": "c"}], "label": 1}, {"question": "How?", "choices": []}]
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (tmp_path / "one.txt").write_text("all\nof it")
    (tmp_path / "bad.jsonl").write_text('{"a": "b"}\n{')
    assert list(evaluation_texts(str(tmp_path / "set.jsonl.gz"))) == ["Why? a b c", "How?"]
    assert list(evaluation_texts(str(tmp_path / "one.txt"))) == ["all\nof it"]
    with pytest.raises(ValueError, match=r"bad.jsonl:2: not a line of JSON"):
        list(evaluation_texts(str(tmp_path / "bad.jsonl")))
    (tmp_path / "set.csv").write_text("")
    with pytest.raises(ValueError, match=r"set.csv: must be a .jsonl, .json or .txt file"):
        list(evaluation_texts(str(tmp_path / "set.csv")))


def test_evaluation_sets_from_lm_eval_tasks(tmp_path, monkeypatch: pytest.MonkeyPatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    (tmp_path / "data.json").write_text(
        "\n".join(json.dumps({"q": f"question {i}", "a": f"answer {i}"}) for i in (1, 2))
    )
    (tmp_path / "task.yaml").write_text(
        "task: two_questions\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/data.json}}}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
    )
    manager = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda: manager(include_path=tmp_path, include_defaults=False))
    assert list(evaluation_texts("two_questions")) == ["question 1 answer 1", "question 2 answer 2"]
    with pytest.raises(ValueError, match="no_such_task is neither a file nor a task of lm-eval"):
        list(evaluation_texts("no_such_task"))
    (tmp_path / "data.json").unlink()
    with pytest.raises(ValueError, match=r"the data of the task two_questions cannot be had \(FileNotFound"):
        list(evaluation_texts("two_questions"))
