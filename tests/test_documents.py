"""What the documents name exists: files, flags, metrics, links. What they say is for people to check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine import batch, top
from server import cli
from server.app import ROUTES
from server.openapi import plain_path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("nvdriver/*.md"), *ROOT.glob("deploy/*.md")])

# Flags of useradd, systemctl and docker, which deploy/README.md has people run.
OTHER_PROGRAMS = {"--system", "--home-dir", "--now", "--rm", "--init", "--cap-drop", "--security-opt", "--build-arg"}
OTHER_PROGRAMS |= {"--gpus", "--what"}


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def test_the_file_map_is_whole() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE))
    files = {path.relative_to(ROOT) for package in ("engine", "server", "nvdriver") for path in (ROOT / package).rglob("*.py")}
    real = {path.as_posix() for path in files if path.name != "__init__.py"} | {"engine/__init__.py"}
    assert listed == real


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_flags_exist(document: Path) -> None:
    """Every --flag in code marks is one of the server's, of a job's, or of the benchmarks in bench/."""
    known = {
        flag
        for parser in (cli.make_parser(), batch.make_parser(), top.make_parser())
        for action in parser._actions
        for flag in action.option_strings
    }
    for path in [
        *(ROOT / "bench").rglob("*.py"),
        *(ROOT / "tests/clients").rglob("*.py"),
    ]:  # and other programs' that tests run
        known |= set(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    text = document.read_text(encoding="utf-8")
    code = " ".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
    assert named - known - OTHER_PROGRAMS == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_metrics_exist(document: Path) -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "server").glob("*metrics.py")))
    for name in re.findall(r"\bsluice_\w+", document.read_text(encoding="utf-8")):
        plain = name.removesuffix("_total").removeprefix("sluice_")
        assert f'"{plain}"' in source or f'"sluice_{plain}"' in source, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_modules_that_are_run_exist(document: Path) -> None:
    for module in re.findall(r"python -m ((?:engine|server|bench|nvdriver)[\w.]*)", document.read_text(encoding="utf-8")):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_every_route_is_in_the_table() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`((?:GET|POST|DELETE) /\S+)`", text))
    assert listed == {f"{route.method} {plain_path(route.path)}" for route in ROUTES}


@pytest.mark.parametrize("document", ["docs/faults.md", "docs/api.md", "SECURITY.md"])
def test_the_tests_that_are_named_exist(document: str) -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / document).read_text(encoding="utf-8")))
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    real = set(re.findall(r"^ *(?:async )?def (test_\w+)\(", text, re.MULTILINE))
    assert named
    assert named - real == set()
