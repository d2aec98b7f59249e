"""The OpenAPI document says what is true of every route, and nothing that it lets a client send causes a 500."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from helpers import tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import serving

from bench.fake_server import fake_engine
from engine import Engine
from server.app import ROUTES
from server.openapi import OPERATIONS, plain_path

EXAMPLES = 25  # of each route; always the same ones, and more of them give others
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Without a model, so that whatever is asked for is answered soon."""
    folder: Path = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    with fake_engine(folder, max_model_len=64) as engine:
        yield engine


def test_every_route_is_described_and_every_description_has_a_route() -> None:
    assert {(route.method, route.path) for route in ROUTES} == set(OPERATIONS)


async def test_the_document_is_served_without_a_key(engine: Engine) -> None:
    async with serving(engine, api_key=("k",)) as server:
        status, body = await server.get("/openapi.json")
    assert status == 200
    assert {(method.upper(), path) for path, methods in body["paths"].items() for method in methods} == {
        (route.method, plain_path(route.path)) for route in ROUTES
    }
    names = set(body["components"]["schemas"])
    assert set(references(body)) <= {f"#/components/schemas/{name}" for name in names}


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
async def test_nothing_that_the_document_allows_or_forbids_causes_a_500(
    engine: Engine, tmp_path: Path, mode: GenerationMode
) -> None:
    """Answers have the status, the media type and the shape that the document tells."""
    async with serving(engine, data_dir=str(tmp_path / "data")) as server:
        schema = schemathesis.openapi.from_dict((await server.get("/openapi.json"))[1])
        operations = [found.ok() for found in schema.get_all_operations()]
        # Those that stop the others come last; after a drain all are refused.
        operations.sort(key=lambda operation: (operation.path.startswith("/admin/"), operation.path == "/admin/drain"))

        def fuzz(operation: Any) -> None:
            @settings(
                max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
            )
            @given(operation.as_strategy(generation_mode=mode))
            def one(case: Any) -> None:
                case.call_and_validate(base_url=server.url, checks=CHECKS)

            one()

        for operation in operations:
            if mode is GenerationMode.POSITIVE or operation.definition.raw.get("requestBody"):
                await asyncio.to_thread(fuzz, operation)
        engine.resume()
        await server.idle()
