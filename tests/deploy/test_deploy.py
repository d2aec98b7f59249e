"""deploy/: what it names exists, its commands parse, its queries ask for metrics that are there."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import RawConfigParser
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from prometheus_client.parser import text_string_to_metric_families
from serving import MESSAGES, make_engine, serving

from engine.config import config_from_args
from server.cli import make_parser, parse_args
from server.config import server_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


class _Repeated(dict[str, str]):
    """Keys may come again in a unit file: their values are kept, a line each."""

    def __setitem__(self, key: str, value: object) -> None:
        if isinstance(value, list) and key in self:
            value = [*self[key], *value]
        super().__setitem__(key, value)  # type: ignore[assignment]


def unit() -> RawConfigParser:
    parser = RawConfigParser(dict_type=_Repeated, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "sluice.service")
    return parser


def check_command(words: list[str], keys: Path, config: Path) -> None:
    """`words` begin with a Python that runs the server; the rest are its flags."""
    assert Path(words[0]).name == "python" and words[1:3] == ["-m", "engine.server"]
    words = [str(keys) if word.endswith("api-keys") else str(config) if word.endswith(".yaml") else word for word in words[3:]]
    args = parse_args(make_parser(), words)
    config_from_args(args)
    server_config(vars(args)).check_exposure()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("k\n")
    return file


def test_the_units_command_parses_with_its_config(keys: Path) -> None:
    service = unit()["Service"]
    check_command(shlex.split(service["ExecStart"]), keys, DEPLOY / "sluice.yaml")
    assert int(service["TimeoutStopSec"]) > server_config({}).shutdown_timeout, "the drain fits"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    file = tmp_path / "sluice.service"  # its program is not installed here
    file.write_text((DEPLOY / "sluice.service").read_text().replace("/opt/sluice/.venv/bin/python", shutil.which("true") or ""))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if "sluice.service" in line] == []


def test_the_images_paths_exist_and_its_command_parses(keys: Path) -> None:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    copied = re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
    assert copied
    for line in copied:
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    entry, command = (json.loads(re.search(rf"^{name} (.+)$", text, re.MULTILINE)[1]) for name in ("ENTRYPOINT", "CMD"))  # type: ignore[index]
    check_command([*entry, *command], keys, DEPLOY / "sluice.yaml")
    assert re.search(r"^USER (?!root)\w+$", text, re.MULTILINE)


def test_the_builder_is_sent_what_the_image_copies() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    let_through = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = {source for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for source in line.split()[:-1]}
    assert copied == let_through


def test_what_cannot_be_made_again_is_kept_apart_from_the_cache() -> None:
    """In the image and in the unit: files and batches in a folder of their own, that outlives both."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    folders = dict(re.findall(r"\b(SLUICE_\w+)=(\S+)", text))
    assert set(folders) == {"SLUICE_CACHE", "SLUICE_STATE"} and len(set(folders.values())) == 2
    (volumes,) = re.findall(r"^VOLUME (.+)$", text, re.MULTILINE)
    assert set(json.loads(volumes)) == set(folders.values())
    service = unit()["Service"]
    environment = dict(line.split("=", 1) for line in service["Environment"].splitlines())
    assert environment["SLUICE_CACHE"] == "/var/cache/" + service["CacheDirectory"] == folders["SLUICE_CACHE"]
    assert environment["SLUICE_STATE"] == "/var/lib/" + service["StateDirectory"] == folders["SLUICE_STATE"]


async def test_the_images_health_check_tells_a_server_that_loads_from_one_that_serves(tmp_path: Path) -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    check = json.loads(re.search(r"^HEALTHCHECK .+?CMD (\[.+?\])$", text, re.MULTILINE | re.DOTALL)[1])  # type: ignore[index]
    with make_engine(tmp_path) as engine:
        async with serving(None) as server:
            words = [sys.executable, *(word.replace(":8000", f":{server.port}") for word in check[1:])]
            for ready in (False, True):
                done = await asyncio.to_thread(subprocess.run, words, capture_output=True, timeout=60)
                assert (done.returncode == 0) is ready, done.stderr
                server.service.start(engine)


def test_the_image_has_all_packages() -> None:
    """What setup would install is what is copied."""
    text = (DEPLOY / "Dockerfile").read_text()
    included = re.search(r'include = \[(.+)\]', (ROOT / "pyproject.toml").read_text())
    assert included is not None
    for package in re.findall(r'"(\w+)\*"', included[1]):
        assert f"COPY {package} {package}\n" in text


def queries() -> Iterator[tuple[str, str]]:
    for panel in json.loads((DEPLOY / "grafana" / "sluice.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


async def test_every_metric_of_the_dashboard_exists(tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path, "qwen3", seed=3)
    with make_engine(tmp_path, offline_model=str(other), kv_cache_memory=16 << 20) as engine:
        async with serving(engine, ttft_slo_ms=1) as server:
            await server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, "ignore_eos": True})
            async with server.client.get(server.url + "/metrics") as response:
                families = list(text_string_to_metric_families(await response.text()))
    labels: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
        if not family.samples:  # a counter that nothing has touched yet
            labels[family.name + "_total"] = set()
    for title, query in queries():
        names = re.findall(r"\bsluice_\w+", query)
        assert names, title
        for name in names:
            assert name in labels, f"{title}: {name}"
        for by in re.findall(r"by \(([^)]+)\)", query):
            wanted = {label.strip() for label in by.split(",")}
            assert all(wanted <= labels[name] or not labels[name] for name in names), f"{title}: {by}"


def test_panels_lie_side_by_side() -> None:
    panels = json.loads((DEPLOY / "grafana" / "sluice.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and all(x < 24 for x, _ in cells)
