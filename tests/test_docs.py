"""The documentation against the program: pages of methods, keys of the configuration, commands of the README."""

import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from headway import catalogue
from headway.catalogue import ROLES
from headway.cli import app
from headway.config import parse
from headway.config.methods import not_trained
from headway.config.schema import SECTIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODEL = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))  # wider than the default ranks
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(), re.DOTALL | re.MULTILINE)


def commands(file: Path) -> list[list[str]]:
    lines = "".join(blocks(file, "console")).replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:]) for line in lines if line.startswith(("$ make", "$ headway"))]


@pytest.fixture(params=catalogue.methods(), ids=lambda row: row.slug)
def row(request):
    return request.param


@pytest.fixture
def claims(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "CLAIMS", tmp_path)
    return tmp_path


def write_claim(folder: Path, slug: str, holds: bool = True):
    check = {"what": "share | steps", "measured": 0.51234, "relation": "<=", "threshold": 0.6, "baseline": 1.0}
    claim = {
        "holds": holds,
        "statement": "Fewer steps.",
        "paper": "half",
        "checks": [{**check, "holds": holds}],
        "seed": 7,
        "headway": "0.1.0",
        "torch": "2.13.0",
        "python": "3.12.1",
        "machine": "Linux x86_64, 2 threads",
    }
    (folder / f"{slug}.json").write_text(json.dumps(claim))
    (folder / f"{slug}.svg").write_text("<svg/>")


def test_every_method_has_a_page_with_paper_use_and_api(row):
    page = hooks.method_page(row)
    module, _, name = row.object.partition(":")
    for part in (row.title, row.summary, row.paper, f"arxiv.org/abs/{row.arxiv}", f"headway verify {row.slug}"):
        assert part in page
    assert f"from {module} import {name}" in page
    reason = not_trained(row.role, row.load())
    if ROLES[row.role].section:
        assert (reason in page) if reason else (f'name = "{row.slug}"' in page)
    assert f"::: {module}.{name}" in page.splitlines()


def test_a_pages_configuration_is_accepted(row):
    section = re.search(r"```toml\n(.*?)```", hooks.method_page(row), re.DOTALL)
    if not ROLES[row.role].section or not_trained(row.role, row.load()):
        assert section is None
    else:
        assert getattr(parse(section[1]), ROLES[row.role].section).name == row.slug


def test_a_pages_line_of_python_builds_the_method(row):
    code = re.search(r"```python\n(.*?)```", hooks.method_page(row), re.DOTALL)[1]
    optimizer = torch.optim.SGD(MODEL.parameters())
    names = {"model": MODEL, "optimizer": optimizer, "total_steps": 1000, "checkpoints": [1000]}
    names |= {"initial": 8, "max_batch": 64}
    if row.role in ("controller", "planner"):  # what these are given depends on the user's own measurements
        exec(code.partition("\n")[0], names)
        assert names[row.object.partition(":")[2]] is row.load()
        compile(code, row.slug, "exec")
        return
    exec(code, names)
    assert isinstance(names[row.role.rpartition(" ")[2]], row.load())


def test_a_page_shows_what_the_last_verified_claim_measured(row, claims):
    write_claim(claims, row.slug)
    page = hooks.method_page(row)
    assert r"| share \| steps | 0.5123 | 1 | ≤ 0.6 | holds |" in page
    assert "All 1 checks hold." in page
    assert "headway 0.1.0, torch 2.13.0, Python 3.12.1 on Linux x86_64, 2 threads, seed 7" in page
    assert f"](../claims/{row.slug}.svg)" in page


def test_a_claim_that_failed_is_shown_as_failing(row, claims):
    write_claim(claims, row.slug, holds=False)
    assert "**fails**" in hooks.method_page(row)
    assert "**0 of 1 checks hold.**" in hooks.methods_table()


def test_a_claim_that_was_not_run_is_said_to_be_so(row, claims):
    assert "Not verified yet" in hooks.method_page(row)
    assert "not verified yet" in hooks.methods_table()


def test_the_table_of_methods_links_every_page_and_that_of_baselines_names_them(row):
    assert f"[`{row.slug}`]({row.slug}.md)" in hooks.methods_table()
    assert all(f"`{baseline.slug}`" in hooks.baselines_table() for baseline in catalogue.baselines())


def test_the_site_gets_a_page_per_method_in_its_navigation():
    pytest.importorskip("material")
    from mkdocs.config import load_config
    from mkdocs.structure.files import Files

    config = load_config(str(ROOT / "mkdocs.yml"))
    config = config.plugins.on_config(config)
    files = {file.src_uri: file for file in config.plugins.on_files(Files([]), config=config)}
    files = {uri: file for uri, file in files.items() if uri.startswith("methods/")}
    assert set(files) == {f"methods/{row.slug}.md" for row in catalogue.methods()}
    assert files["methods/rex.md"].content_string == hooks.method_page(catalogue.get("rex"))
    assert all(uri in json.dumps(config.nav) for uri in files)


class TestConfigurationPage:
    @pytest.fixture(scope="class")
    def meanings(self):
        yaml = pytest.importorskip("yaml")
        return yaml.safe_load((DOCS / "configuration.md").read_text().split("---")[1])["meanings"]

    def test_every_key_has_a_meaning_and_no_meaning_is_left_over(self, meanings):
        assert {name: set(keys) for name, keys in meanings.items()} == {
            name: set(section.keys()) for name, section in SECTIONS.items()
        }

    def test_every_section_and_key_is_on_the_page(self, meanings):
        tables = hooks.configuration_tables(meanings)
        for name, section in SECTIONS.items():
            part = tables.split(f"### `[{name}]`")[1].split("###")[0]
            assert all(f"| `{key}` |" in part for key in section.keys())  # noqa: SIM118

    @pytest.mark.parametrize(
        "line",
        [
            "| `vocab_size` | `2048` | whole number ≥ 257, ≤ 1,000,000 |",
            "| `validation_fraction` | `0.05` | number > 0, < 1 |",
            '| `precision` | `"auto"` | `"auto"`, `"bf16"`, `"fp32"` |',
            "| `from` |",
            '| `name` | `"adamw"` |',
        ],
    )
    def test_defaults_and_ranges_are_those_of_the_schema(self, meanings, line):
        assert line in hooks.configuration_tables(meanings)

    def test_the_page_has_the_markers_of_its_tables(self):
        assert "<!-- configuration -->" in (DOCS / "configuration.md").read_text()
        index = (DOCS / "methods" / "index.md").read_text()
        assert "<!-- methods -->" in index
        assert "<!-- baselines -->" in index


@pytest.mark.parametrize("file", PROSE, ids=lambda file: str(file.relative_to(ROOT)))
class TestProse:
    def test_its_make_targets_exist(self, file):
        named = {words[1] for words in commands(file) if words[0] == "make"}
        named |= set(re.findall(r"`make (\w+)", file.read_text()))
        targets = re.findall(r"^([\w ]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert named <= {target for line in targets for target in line.split()}

    def test_its_commands_and_their_options_exist(self, file):
        for words in commands(file):
            if words[0] != "headway":
                continue
            path = words[1:3] if words[1:3] == ["methods", "show"] else words[1:2]
            result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
            assert result.exit_code == 0, words
            for option in (word for word in words if word.startswith("--")):
                assert option in re.sub(r"\x1b\[[0-9;]*m", "", result.output), words

    def test_its_overrides_name_keys_that_exist_or_are_shown_to_be_refused(self, file):
        wrong = {"optimizer.name=fugal", "optimizer.lr=-1", "train.stepz=4", "batch.size=6"}
        for words in commands(file):
            overrides = [value for option, value in pairwise(words) if option == "--set"]
            if words[0] == "headway" and not wrong & set(overrides):
                parse("", overrides)

    def test_its_configurations_are_accepted(self, file):
        for block in blocks(file, "toml"):
            if not block.startswith("[[method]]"):
                parse(block)


@pytest.mark.parametrize(
    ("override", "file"),
    [
        ("optimizer.name=fugal", "README.md"),
        ("optimizer.lr=-1", "README.md"),
        ("train.stepz=4", "docs/configuration.md"),
    ],
)
def test_errors_are_shown_as_they_are(override, file):
    result = CliRunner().invoke(app, ["train", "--set", override])
    assert result.exit_code == 2
    assert f"$ headway train --set {override}\n{result.output}" in (ROOT / file).read_text()


def test_the_readmes_lines_of_python_run():
    names = {"model": MODEL}
    (code,) = blocks(ROOT / "README.md", "python")
    exec(code, names)
    assert names["schedule"].optimizer is names["optimizer"]


def test_the_readme_lists_every_method_and_its_links_lead_somewhere(row):
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"^\| `{row.slug}` \| {row.role} \| arXiv {row.arxiv} \|", readme, re.MULTILINE)
    targets = re.findall(r"\]\((?!#)([^)#:]+)(?:#[^)]*)?\)", readme)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_contributing_shows_the_row_as_it_is_and_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (shown,) = tomllib.loads(next(block for block in blocks(ROOT / "CONTRIBUTING.md", "toml")))["method"]
    actual = dataclasses.asdict(catalogue.get("rex"))
    assert shown == {key: value for key, value in actual.items() if value}
    files = re.findall(r"`((?:src|tests|docs)/[\w./-]+\.(?:py|toml|json|svg|md))`", text)
    assert len(files) >= 8
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_doctests_outside_sections_are_fenced_and_literal_blocks_lose_a_colon():
    pytest.importorskip("griffe")
    as_markdown = load("docstrings").as_markdown
    assert as_markdown("One::\n\n    a = b\n\n>>> 1\n1") == "One:\n\n    a = b\n\n```pycon\n>>> 1\n1\n```"
    assert as_markdown("Example:\n    >>> f(a)\n    2\n\nAfter") == (
        "Example:\n    ```pycon\n    >>> f(a)\n    2\n    ```\n\nAfter"
    )
    assert as_markdown(">>> 'a::'\n'a::'") == "```pycon\n>>> 'a::'\n'a::'\n```"
