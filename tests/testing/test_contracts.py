"""Every row of the catalogue, and every baseline, passes the contract of its role."""

import pytest

from headway import catalogue

ROWS = [*catalogue.methods(), *catalogue.baselines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_method_keeps_the_contract_of_its_role(row):
    check = catalogue.import_object(catalogue.ROLES[row.role].contract)
    check(row.load())
