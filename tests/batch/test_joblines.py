"""The reader of batch files: every kind of bad line gets its own verdict, and the others are read."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.joblines import MAX_DEPTH, BadLine, JobError, JobLine, SeenIds, read_lines, survey

CHAT = "/v1/chat/completions"


def item(**changes: Any) -> dict[str, Any]:
    whole = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": [{"role": "user", "content": "hi"}]}}
    return {key: value for key, value in (whole | changes).items() if value is not ...}


def encoded(**changes: Any) -> bytes:
    return json.dumps(item(**changes)).encode()


def read(folder: Path, content: bytes, **options: Any) -> list[JobLine | BadLine]:
    path = folder / "in.jsonl"
    path.write_bytes(content)
    return list(read_lines(path, survey(path), **options))


DEEP = b"[" * 200_000
BAD = {
    "not json": (b"hello", "invalid_json_line", "write one JSON object a line"),
    "cut off": (encoded()[:-9], "invalid_json_line", "not valid JSON"),
    "trailing garbage": (encoded() + b" garbage", "invalid_json_line", "Extra data"),
    "two objects": (encoded() + encoded(), "invalid_json_line", "Extra data"),
    "array": (b"[1, 2]", "invalid_request", "JSON object"),
    "number": (b"7", "invalid_request", "JSON object"),
    "null": (b"null", "invalid_request", "JSON object"),
    "nul byte": (encoded().replace(b"hi", b"h\0i"), "invalid_json_line", "NUL"),
    "only nul bytes": (b"\0\0\0", "invalid_json_line", "NUL"),
    "not utf-8": (encoded().replace(b"hi", b"h\xff"), "invalid_json_line", "UTF-8"),
    "inner byte-order mark": (b"\xef\xbb\xbf" + encoded(), "invalid_json_line", "byte-order mark"),
    "duplicate key": (encoded().replace(b'{"custom_id"', b'{"url": 1, "custom_id"'), "invalid_json_line", "'url' occurs twice"),
    "duplicate key inside": (encoded().replace(b'"role"', b'"role": 1, "role"'), "invalid_json_line", "'role' occurs twice"),
    "nan": (encoded(body={"temperature": float("nan")}), "invalid_json_line", "NaN"),
    "infinity": (encoded(body={"temperature": float("-inf")}), "invalid_json_line", "Infinity"),
    "huge exponent": (encoded(body={"t": 7}).replace(b"7", b"1e999"), "invalid_json_line", "too large"),
    "huge integer": (encoded(body={"t": 7}).replace(b"7", b"9" * 100_000), "invalid_json_line", "100000 digits"),
    "beyond 64 bits": (encoded(body={"t": 7}).replace(b"7", b"9" * 21), "invalid_json_line", "64 bits"),
    "deep array": (DEEP, "invalid_json_line", "nested"),
    "deep body": (encoded(body={"t": 7}).replace(b"7", DEEP + b"]" * len(DEEP)), "invalid_json_line", "nested"),
    "half a surrogate": (encoded(custom_id="\ud800"), "invalid_json_line", "surrogate"),
    "no custom_id": (encoded(custom_id=...), "missing_custom_id", "unique string"),
    "null custom_id": (encoded(custom_id=None), "missing_custom_id", "unique string"),
    "numeric custom_id": (encoded(custom_id=7), "invalid_custom_id", "string"),
    "empty custom_id": (encoded(custom_id=""), "invalid_custom_id", "string"),
    "long custom_id": (encoded(custom_id="x" * 513), "invalid_custom_id", "512"),
    "no method": (encoded(method=...), "invalid_method", "POST"),
    "wrong method": (encoded(method="GET"), "invalid_method", "POST"),
    "no url": (encoded(url=...), "invalid_url", CHAT),
    "wrong url": (encoded(url="/v1/embeddings"), "invalid_url", CHAT),
    "url of another type": (encoded(url=[CHAT]), "invalid_url", CHAT),
    "no body": (encoded(body=...), "invalid_body", "JSON object"),
    "body of another type": (encoded(body="hi"), "invalid_body", "JSON object"),
    "stream": (encoded(body={"stream": True}), "stream_not_allowed", "remove stream"),
    "duplicate custom_id": (encoded(custom_id="first"), "duplicate_custom_id", "unique"),
    "too long": (encoded(custom_id="x" * 300_000), "line_too_long", "--max-line-bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_line(name: str, tmp_path: Path) -> None:
    raw, code, remedy = BAD[name]
    limit = 250_000 if name == "too long" else 1 << 20
    first, bad, last = read(
        tmp_path, b"\n".join([encoded(custom_id="first"), raw, encoded(custom_id="last")]), max_line_bytes=limit
    )
    assert isinstance(bad, BadLine)
    assert (bad.number, bad.code) == (2, code)
    assert remedy in bad.message
    assert len(bad.message) < 700
    assert isinstance(first, JobLine) and isinstance(last, JobLine)
    assert (first.custom_id, last.custom_id, last.number) == ("first", "last", 3)


def test_forgiven_oddities(tmp_path: Path) -> None:
    """A byte-order mark at the start, CRLF, blank lines, a missing last newline, escaped emoji, brackets in strings."""
    emoji = encoded(custom_id="\U0001f600").replace(b"hi", b"{[" * 500)
    content = b"\xef\xbb\xbf" + encoded(custom_id="1") + b"\r\n\r\n   \n\n" + emoji + b"\n" + encoded(body={"stream": False})
    lines = read(tmp_path, content)
    assert [line.custom_id for line in lines] == ["1", "\U0001f600", "a"]
    assert [line.number for line in lines] == [1, 5, 6]


def test_a_bad_line_does_not_claim_its_custom_id(tmp_path: Path) -> None:
    lines = read(tmp_path, encoded(method="GET") + b"\n" + encoded() + b"\n" + encoded())
    assert [type(line) for line in lines] == [BadLine, JobLine, BadLine]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("extra", [-1, 0, 1, 2, 3])
def test_line_limit_is_exact(end: bytes, extra: int, tmp_path: Path) -> None:
    raw = encoded()
    (line,) = read(tmp_path, raw + end, max_line_bytes=len(raw) - extra)
    assert isinstance(line, BadLine) == (extra > 0)


def test_depth_limit_is_exact(tmp_path: Path) -> None:
    nested: Any = 1
    for _ in range(MAX_DEPTH - 2):
        nested = [nested]
    assert isinstance(read(tmp_path, encoded(body={"x": nested}))[0], JobLine)
    assert isinstance(read(tmp_path, encoded(body={"x": [nested]}))[0], BadLine)


def test_long_line_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x" * (64 << 20) + b"\n" + encoded())
    tracemalloc.start()
    try:
        bad, good = read_lines(path, survey(path))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert isinstance(bad, BadLine) and bad.code == "line_too_long"
    assert isinstance(good, JobLine)


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n"])
def test_empty_input(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="is empty"):
        read(tmp_path, content)


def test_unusable_inputs(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="UTF-16"):
        read(tmp_path, encoded().decode().encode("utf-16"))
    with pytest.raises(JobError, match="cannot read"):
        survey(tmp_path / "missing")
    with pytest.raises(JobError, match="cannot read"):
        survey(tmp_path)
    with pytest.raises(JobError, match="regular file"):
        survey(Path("/dev/null"))


def test_input_changed_while_reading(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(encoded(custom_id="a") + b"\n")
    lines = read_lines(path, survey(path))
    next(lines)
    with path.open("ab") as file:
        file.write(encoded(custom_id="b") + b"\n")
    with pytest.raises(JobError, match="changed"):
        list(lines)


@pytest.mark.parametrize(("content", "lines"), [(b"a", 1), (b"a\n", 1), (b"a\nb", 2), (b"a\n\nb\n", 3)])
def test_survey_counts_lines(content: bytes, lines: int, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    assert survey(path).lines == lines


@given(st.lists(st.text(max_size=3)))
def test_seen_ids_is_a_set(texts: list[str]) -> None:
    seen, model = SeenIds(), set[str]()
    for text in texts:
        text = text.encode("utf-8", "replace").decode()
        assert seen.add(text) == (text not in model)
        model.add(text)


def test_seen_ids_costs_little() -> None:
    seen, count = SeenIds(), 20_000
    tracemalloc.start()
    try:
        assert all(seen.add(f"request-{number}") for number in range(count))
        assert tracemalloc.get_traced_memory()[0] <= 24 * count
    finally:
        tracemalloc.stop()
    assert not any(seen.add(f"request-{number}") for number in range(count))


@given(st.binary(max_size=300))
def test_any_bytes_give_verdicts(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    lines = read(tmp_path_factory.mktemp("any"), b"x\n" + content)
    assert all(isinstance(line, BadLine) for line in lines)
