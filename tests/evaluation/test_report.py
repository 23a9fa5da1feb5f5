"""Tables: the lines of lm-eval's own, in Markdown and HTML, groups before what they hold."""

import re

from lm_eval.utils import make_table

from neox.evaluation import report

RESULTS = {
    "results": {
        "sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        "sums_easy": {"alias": "sums_easy", "acc,none": 0.75, "acc_stderr,none": 0.125},
        "sums_hard": {"alias": "sums_hard", "acc,none": 0.25, "acc_stderr,none": 0.0625, "sample_len": 4},
        "alone": {
            "alias": "alone",
            "exact_match,strict": 0.1,
            "exact_match_stderr,strict": 0.01,
            "exact_match,flexible|any": 1,
            "exact_match_stderr,flexible|any": 0.02,
        },
    },
    "groups": {"sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": "N/A"}},
    "group_subtasks": {"sums": ["sums_easy", "sums_hard"], "all": ["sums"]},
    "versions": {"sums_easy": 1.0, "sums_hard": 2.0, "alone": "Yaml"},
    "n-shot": {"sums_easy": 5, "sums_hard": 0, "alone": 0},
    "model_name": "<tiny>",
    "lm_eval_version": "0.4",
}


def test_the_lines_are_those_of_lm_evals_table():
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in make_table(RESULTS).splitlines()[2:]]
    theirs = {(line[2], line[4], line[6].rstrip("0"), line[8]) for line in table if "flexible" not in line[2]}
    ours = list(report.rows(RESULTS))
    assert theirs == {(row[2], row[4], row[5].rstrip("0"), row[6]) for row in ours if "flexible" not in row[2]}
    assert [row[0] for row in ours] == ["  sums", "    sums_easy", "    sums_hard", "alone", "alone"]
    assert [row[3] for row in ours] == ["", "5", "0", "0", "0"]
    assert ours[-1] == ["alone", "Yaml", "flexible|any", "0", "exact_match", "1", "0.0200"]


def test_markdown_and_html_hold_the_rows():
    expected = list(report.rows(RESULTS))
    lines = report.markdown(RESULTS).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.replace("\\|", "|").rstrip() for cell in re.split(r" \| ", line[2:-2])] for line in lines]
    assert cells[0] == list(report.HEADS)
    assert cells[2:] == expected
    page = report.page(RESULTS)
    assert "<title>&lt;tiny&gt;</title>" in page
    assert [re.findall(r"<td>(.*?)</td>", line) for line in page.splitlines() if "<td>" in line] == expected


def test_a_limit_is_said_and_only_a_limit():
    for limit, words in ((None, ""), (20, "the first 20 documents of"), (0.1, "the first 0.1 of the documents of")):
        results = {**RESULTS, "config": {"limit": limit}}
        assert words in report.limited(results), limit
        assert bool(report.limited(results)) == (limit is not None), limit
        assert report.markdown(results).endswith("|\n") == (limit is None), limit
        assert ("<strong>" in report.page(results)) == (limit is not None), limit
