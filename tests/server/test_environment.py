"""Flags from the environment: read by the rules of the command line, under it and over the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import batch
from engine.config import config_from_args, read_environment
from server.cli import make_parser, parse_args
from server.config import ServerConfig, server_config


def read(*argv: str) -> ServerConfig:
    parser = make_parser()
    read_environment(parser)
    return server_config(vars(parse_args(parser, argv)))


def test_every_flag_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PORT": "8123", "PUBLIC_MODELS": "true", "LOG_FORMAT": "json", "HEADER_TIMEOUT": "1.5"}.items():
        monkeypatch.setenv(f"SLUICE_{name}", value)
    config = read()
    assert (config.port, config.public_models, config.log_format, config.header_timeout) == (8123, True, "json", 1.5)


def test_the_command_line_wins_and_the_file_loses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("port: 1111\nlog-level: error\npublic-metrics: true\n")
    monkeypatch.setenv("SLUICE_PORT", "2222")
    monkeypatch.setenv("SLUICE_CONFIG", str(file))
    monkeypatch.setenv("SLUICE_PUBLIC_METRICS", "false")
    assert (read().port, read().log_level, read().public_metrics) == (2222, "error", False)
    assert (read("--port", "3333", "--public-metrics").port, read("--public-metrics").public_metrics) == (3333, True)


def test_flags_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_MODEL", "one")
    monkeypatch.setenv("SLUICE_SERVED_MODEL_NAME", "a, b")
    monkeypatch.setenv("SLUICE_KV_CACHE_MEMORY", "2MiB")
    monkeypatch.setenv("SLUICE_ENABLE_PREFIX_CACHING", "off")
    parser = make_parser()
    read_environment(parser)
    config = config_from_args(parse_args(parser, []))
    assert (config.model, config.served_model_name, config.kv_cache_memory) == ("one", ("a", "b"), 2 << 20)
    assert config.enable_prefix_caching is False
    assert config_from_args(parse_args(parser, ["two"])).model == "two"


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "http"), ("PUBLIC_MODELS", "maybe"), ("LOG_FORMAT", "xml"), ("KV_CACHE_MEMORY", "much"), ("PORT", "99999")],
)
def test_a_bad_value_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    from server.cli import main

    monkeypatch.setenv(f"SLUICE_{name}", value)
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert name in said or name.lower() in said
    assert value in said


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_PORT", "")
    assert read().port == ServerConfig().port


def test_keys_are_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_API_KEY", "a,b")
    assert read().api_key == ("a,b",)


def test_jobs_read_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_INPUT_FILE", "in.jsonl")
    monkeypatch.setenv("SLUICE_OUTPUT_FILE", "out.jsonl")
    monkeypatch.setenv("SLUICE_RETRY_ERRORS", "yes")
    parser = batch.make_parser()
    read_environment(parser)
    args = parser.parse_args([])
    assert (args.input_file, args.output_file, args.retry_errors) == (Path("in.jsonl"), Path("out.jsonl"), True)
