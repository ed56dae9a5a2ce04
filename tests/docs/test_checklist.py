"""Every entry of the checklist has a test, and every mark an entry."""

import pytest

from tests.docs.checklist import files_by_id, find_marks, markdown_table, read_checklist


def test_every_id_has_a_test_and_every_mark_an_entry() -> None:
    ids = [id for entries in read_checklist().values() for id in entries]
    assert ids == sorted(set(ids))
    marked = files_by_id().keys()
    assert sorted(set(ids) - marked) == [], "no test is marked with these ids"
    assert sorted(marked - set(ids)) == [], "marks that tests/docs/checklist.yaml does not have"


def test_marks_are_found() -> None:
    source = """
@pytest.mark.alone
@pytest.mark.checklist("A01", "B02")
async def test_a() -> None: ...
class TestB:
    @pytest.mark.checklist("C03")
    @pytest.mark.parametrize("x", [1])
    def test_b(self) -> None: ...
def helper(): "pytest.mark.checklist('D04')"
"""
    assert list(find_marks(source)) == ["A01", "B02", "C03"]


@pytest.mark.parametrize("id", ["A01", "G11"])
def test_the_table_links_to_tests(id: str) -> None:
    (row,) = [line for line in markdown_table().splitlines() if line.startswith(f"| {id} ")]
    assert row.count("](tests/") == len(files_by_id()[id])
