"""engine.batch in a process of its own with a trivial backend: starts in no time, so that a test can kill it many times.

The answer to a line depends on its content alone. A `model` of "missing" is a 404, "busy" is refused once, "full" always,
"dead" ends the engine, "slow" takes ten seconds. TOY_BROKEN in the environment: it does not load.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

from engine.batch import main
from engine.errors import EngineDead
from engine.joblines import JobLine
from engine.jobrun import Harvest
from engine.openai import Answer

DELAY = float(os.environ.get("TOY_DELAY", "0"))  # seconds, at most, for each line


class Toy:
    def __init__(self, config: object) -> None:
        if "TOY_BROKEN" in os.environ:
            raise RuntimeError("no device")
        self._refused: set[str] = set()

    async def answer(self, line: JobLine, request_id: str) -> Answer:
        model = line.body.get("model")
        if model == "missing":
            return Answer(404, {"error": {"message": "?", "type": "x", "param": "model", "code": "model_not_found"}})
        if model == "busy" and line.custom_id not in self._refused:
            self._refused.add(line.custom_id)
            return Answer(429, {"error": {"message": "?", "type": "x", "param": None, "code": "busy"}}, 0.01)
        if model == "full":
            return Answer(429, {"error": {"message": "?", "type": "x", "param": None, "code": "busy"}}, 0.2)
        if model == "dead":
            raise EngineDead("the toy broke")
        await asyncio.sleep(10 if model == "slow" else random.uniform(0, DELAY))
        text = f"{line.body['prompt']} of {request_id}"
        return Answer(200, {"choices": [{"text": text}], "usage": {"completion_tokens": 1}})

    def down(self) -> str | None:
        return None

    def harvest(self) -> Harvest:
        return Harvest()

    def close(self) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main(open_backend=Toy))
