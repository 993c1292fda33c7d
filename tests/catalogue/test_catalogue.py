import importlib
import re
from pathlib import Path

import pytest

from headway import catalogue

ROOT = Path(__file__).parents[2]
PACKAGES = {role.package: role for role in catalogue.ROLES.values()}
# Modules that stand below several methods of their package, or are no method.
SHARED = {
    "headway.optim": {
        "adagrad_norm",
        "adam_rule",
        "checks",
        "consensus",
        "damped_solve",
        "evaluation_point",
        "grouping",
        "inner_adam",
        "line_search",
        "mirror",
        "opposing_pairs",
        "polar",
        "quantile",
        "quantized_state",
        "spikes",
        "state",
        "subspace",
        "wrapper",
    },
    "headway.schedules": {
        "batch_ramp",
        "batch_schedule",
        "fixed_batch",
        "gradient_noise",
        "gradient_norms",
        "loss_forecast",
        "profile",
    },
    "headway.budget": {
        "annealing_fit",
        "distillation",
        "fresh_data",
        "inference_plan",
        "local_search",
        "logit_ensemble",
        "training_run",
    },
}


def module_name(slug: str) -> str:
    return slug.replace("-", "_")


@pytest.fixture(params=catalogue.methods(), ids=lambda row: row.slug)
def row(request):
    return request.param


def test_slugs_are_unique_and_written_in_one_way():
    slugs = [row.slug for row in [*catalogue.methods(), *catalogue.baselines()]]
    assert len(slugs) == len(set(slugs))
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) for slug in slugs)


def test_a_row_is_complete(row):
    assert row.role in catalogue.ROLES
    assert all((row.title, row.summary, row.paper, row.claim))
    assert re.fullmatch(r"\d{4}\.\d{4,5}", row.arxiv)


def test_a_method_is_one_file_of_its_roles_package(row):
    assert row.module == f"{catalogue.ROLES[row.role].package}.{module_name(row.slug)}"
    assert row.load().__module__ == row.module


def test_a_claim_is_the_file_of_the_same_name(row):
    assert row.claim == f"headway.claims.{module_name(row.slug)}:claim"
    assert callable(catalogue.import_object(row.claim))


def test_a_method_has_its_facts_and_its_claim_under_test(row):
    package = catalogue.ROLES[row.role].package.removeprefix("headway.").replace(".", "/")
    assert (ROOT / "tests" / package / f"test_{module_name(row.slug)}.py").is_file()
    assert (ROOT / "tests" / "claims" / f"test_{module_name(row.slug)}.py").is_file()


def test_the_last_verified_claim_is_kept_for_the_docs(row):
    assert (ROOT / "docs" / "claims" / f"{row.slug}.json").is_file()
    assert (ROOT / "docs" / "claims" / f"{row.slug}.svg").is_file()


def test_a_docstring_names_the_source_and_has_an_example(row):
    documentation = row.load().__doc__ + (importlib.import_module(row.module).__doc__ or "")
    assert "Source" in documentation
    assert row.arxiv in documentation
    assert ">>>" in documentation


def test_every_file_of_a_method_package_has_a_row():
    rows = {row.module for row in catalogue.methods()}
    for package in PACKAGES:
        folder = ROOT / "src" / package.replace(".", "/")
        found = {f.stem for f in folder.glob("*.py")} - {"__init__"} - SHARED.get(package, set())
        assert {f"{package}.{name}" for name in found} <= rows


def test_every_claim_file_has_a_row():
    claims = {row.claim.partition(":")[0] for row in catalogue.methods()}
    found = {f.stem for f in (ROOT / "src/headway/claims").glob("*.py")} - {"__init__", "show"}
    assert {f"headway.claims.{name}" for name in found} == claims


def test_the_changelog_names_every_method(row):
    assert f"`{row.slug}`" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("row", catalogue.baselines(), ids=lambda row: row.slug)
def test_baselines_load(row):
    assert isinstance(row.load(), type)
    assert row.role in catalogue.ROLES


def test_a_misspelled_slug_gets_the_nearest_right_one():
    with pytest.raises(KeyError, match="did you mean 'frugal'"):
        catalogue.get("fruggal")


def test_find_takes_every_word_in_any_field():
    assert [row.slug for row in catalogue.find("memory subspace")] == ["frugal"]
    assert catalogue.find("memory", role="schedule") == []


def test_a_missing_extra_says_what_to_install():
    with pytest.raises(ImportError, match=r'pip install "headway\[rl\]"'):
        catalogue.import_object("no_such_package_anywhere:Name", extra="rl")
