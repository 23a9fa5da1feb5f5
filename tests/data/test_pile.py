"""The table of the Pile's components, against totals that were published apart from it."""

import pytest

from neox.data.pile import COMPONENTS, GROUPS, PILE


def test_the_rows_add_up_to_the_published_totals():
    assert len(COMPONENTS) == len(PILE) == 22
    assert sum(c.raw_gib for c in PILE) == pytest.approx(825.18, abs=0.005)
    assert sum(c.weight for c in PILE) == pytest.approx(100, abs=0.005)
    effective = sum(c.effective_gib for c in PILE)
    assert effective == pytest.approx(1254.20, abs=0.01)
    for component in PILE:  # weights are printed to 0.01, sizes to 0.01 GiB
        assert component.weight == pytest.approx(100 * component.effective_gib / effective, abs=0.006)
    documents = sum(c.effective_gib * 2**20 / c.document_kib for c in PILE)
    assert effective * 2**20 / documents == pytest.approx(5.91, abs=0.006)


def test_every_component_is_in_one_of_the_five_groups():
    assert {component.group for component in PILE} == set(GROUPS)
    assert [sum(c.group == group for c in PILE) for group in GROUPS] == [7, 4, 3, 5, 3]
