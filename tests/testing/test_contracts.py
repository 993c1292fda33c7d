"""Every row of the catalogue, and every baseline, passes the contract of its role."""

from pathlib import Path

import pytest

from headway import catalogue

ROWS = [*catalogue.methods(), *catalogue.baselines()]
# What these are given to work on differs from method to method: their own test files say it.
GIVEN_DATA = ("controller", "planner")
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("row", [row for row in ROWS if row.role not in GIVEN_DATA], ids=lambda row: row.slug)
def test_method_keeps_the_contract_of_its_role(row):
    check = catalogue.import_object(catalogue.ROLES[row.role].contract)
    check(row.load())


@pytest.mark.parametrize("row", [row for row in ROWS if row.role in GIVEN_DATA], ids=lambda row: row.slug)
def test_method_is_given_to_the_contract_of_its_role_by_its_own_tests(row):
    package = catalogue.ROLES[row.role].package.rpartition(".")[2]
    contract = catalogue.ROLES[row.role].contract.rpartition(":")[2]
    tests = (TESTS / package / f"test_{row.slug.replace('-', '_')}.py").read_text(encoding="utf-8")
    name = row.object.rpartition(":")[2]
    assert any(
        f"{contract}({given}" in tests for given in (name, f"\n        {name}", "make", "KineticsCostModel().cost")
    )
