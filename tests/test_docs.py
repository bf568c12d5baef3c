"""Tests that the docs name are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "scenarios.md"


def test_the_scenarios_name_tests_that_exist_in_the_files_beside_them():
    named = 0
    for row in PAGE.read_text().splitlines():
        file = None
        for token in re.findall(r"(?:callbacks/)?test_\w+\.py|`test_\w+`", row) if row.startswith("|") else ():
            if token.endswith(".py"):
                file = TESTS / token
                assert file.exists(), token
            else:
                assert file is not None, f"no file before {token}"
                assert f"def {token.strip('`')}(" in file.read_text(), f"{token} is not in {file.name}"
                named += 1
    assert named > 60


def test_every_row_of_the_scenarios_names_a_test():
    rows = [row for row in PAGE.read_text().splitlines() if row.startswith("|")][2:]
    assert len(rows) > 30
    assert all("test_" in row.rsplit("|", 2)[1] for row in rows)
