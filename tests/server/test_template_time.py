"""A chat template is a program: one that does not end costs its own request an error, and nobody anything else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from serving import MESSAGES, serving

import engine.chat_template as chat_template
from bench.fake_server import fake_engine
from engine.errors import InvalidRequest
from engine.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": LOOP,
    "recursion in a loop": "{% macro f() %}{% endmacro %}{% for i in range(99999) %}{% for j in range(99999) %}{{ f() }}"
    "{% endfor %}{% endfor %}",
    "conditions": "{% for i in range(99999) %}{% if i %}{% for j in range(99999) %}{% endfor %}{% endif %}{% endfor %}",
}


def with_template(folder: Path, template: str) -> Path:
    checkpoint = tiny_checkpoint(folder)
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
    return checkpoint


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_ended(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "BUDGET", 0.05)
    tokenizer = Tokenizer.load(with_template(tmp_path, ENDLESS[name]))
    with pytest.raises(InvalidRequest, match="takes too long"):
        tokenizer.render_chat(MESSAGES)
    assert not tokenizer.template_is_slow, "nobody waited on an event loop"


@pytest.mark.parametrize("expression", ["'x' * 10 ** 10", "[0] * 99999999999", "9 ** 9 ** 9", "10 ** 99999999"])
def test_one_operation_does_not_take_for_ever(tmp_path: Path, expression: str) -> None:
    tokenizer = Tokenizer.load(with_template(tmp_path, "{{ " + expression + " }}"))
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        tokenizer.render_chat(MESSAGES)


async def test_others_are_served_while_a_template_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the event loop it gets a moment, then a thread of its own, and its client gets an error that names the field."""
    monkeypatch.setattr(chat_template, "BUDGET", 2.0)
    template = "{% if messages[0].content == 'for ever' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    with fake_engine(with_template(tmp_path, template)) as engine:
        async with serving(engine) as server:
            body = {"messages": [{"role": "user", "content": "for ever"}], "max_tokens": 2}
            slow = asyncio.create_task(server.post(CHAT, body))
            while not engine.tokenizer().template_is_slow:
                await asyncio.sleep(0.005)
            assert (await server.get("/health"))[0] == 200
            status, _ = await server.post(CHAT, {"messages": MESSAGES, "max_tokens": 2, "ignore_eos": True})
            assert status == 200
            status, reply = await slow
            assert (status, reply["error"]["param"]) == (400, "messages")
            assert "takes too long" in reply["error"]["message"]
