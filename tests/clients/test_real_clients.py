"""Programs of others, unmodified, against a real server: lm-eval, vLLM's benchmark, guidellm. Commands: docs/clients.md.

They bring gigabytes along, so they live in environments of their own: a test runs where the program is on PATH, or where its
variable (see `program`) names it, and is skipped elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server, make_engine, serving

from engine import Engine

pytestmark = pytest.mark.slow

TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "generate": """
task: generate
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n", "Question:"], max_gen_toks: 12, temperature: 0.0}
metric_list: [{metric: exact_match}]
""",
}
QUESTIONS = [{"question": f"What is {a} plus 2?", "choices": [str(a + 2), str(a + 3), "none"], "answer": 0} for a in range(4)]


def program(name: str) -> str:
    """Where it is: $SLUICE_TEST_<NAME>, else on PATH. Skips the test if it is nowhere."""
    variable = "SLUICE_TEST_" + name.upper().replace("-", "_")
    found = os.environ.get(variable) or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed here; put it on PATH or name it in ${variable}")
    return found


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with make_engine(tmp_path_factory.mktemp("model"), context=2048) as engine:
        yield engine


async def run(*command: str, folder: Path) -> str:
    """Its output, once it has ended well."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OPENAI_API_KEY": "none"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | offline
    environment |= {"HF_HOME": str(folder / "hf"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output = (await process.communicate())[0].decode(errors="replace")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output[-4000:]
    return output


def tasks(folder: Path) -> Path:
    """A folder with the tasks and their questions: lm-eval's own tasks all fetch theirs."""
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("QUESTIONS", str(questions)))
    return folder


async def lm_eval(server: Server, kind: str, path: str, task: str, folder: Path, *more: str, **options: Any) -> dict[str, Any]:
    arguments = {"model": "tiny", "base_url": server.url + path, "num_concurrent": 2, "max_retries": 1, **options}
    joined = ",".join(f"{key}={value}" for key, value in arguments.items())
    command = ["run", "--model", kind, "--model_args", joined, "--include_path", str(tasks(folder)), "--tasks", task]
    out = folder / "out"
    await run(program("lm_eval"), *command, *more, "--output_path", str(out), folder=folder)
    (result,) = out.rglob("results_*.json")
    found: dict[str, Any] = json.loads(result.read_text())["results"][task]
    return found


@pytest.mark.timeout(600)
async def test_lm_eval_multiple_choice(engine: Engine, tmp_path: Path) -> None:
    """Token-id prompts with echo and logprobs, which is how it asks how likely each answer is."""
    async with serving(engine) as server:
        options = {"tokenizer_backend": "huggingface", "tokenizer": engine.config.model}
        result = await lm_eval(server, "local-completions", "/v1/completions", "choice", tmp_path, **options)
    assert 0 <= result["acc,none"] <= 1
    assert result["sample_len"] == len(QUESTIONS)


@pytest.mark.timeout(600)
async def test_lm_eval_chat(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine) as server:
        chat = ("local-chat-completions", "/v1/chat/completions", "generate", tmp_path, "--apply_chat_template")
        result = await lm_eval(server, *chat)
    assert result["sample_len"] == len(QUESTIONS)


@pytest.mark.timeout(600)
async def test_vllm_bench_serve(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine) as server:
        command = ["bench", "serve", "--backend", "openai", "--base-url", server.url, "--model", "tiny"]
        command += ["--tokenizer", engine.config.model, "--dataset-name", "random", "--random-input-len", "32"]
        command += ["--random-output-len", "8", "--num-prompts", "6", "--max-concurrency", "3", "--ignore-eos"]
        command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
        await run(program("vllm"), *command, folder=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (6, 0)
    assert result["total_output_tokens"] > 0


@pytest.mark.timeout(600)
async def test_guidellm(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine) as server:
        command = ["run", "--backend", f"kind=openai_http,target={server.url},model=tiny"]
        command += ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"]
        command += ["--tokenizer", f"kind=hf_auto,model={engine.config.model}"]
        command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8", "--disable-progress"]
        command += ["--output", f"kind=json,path={tmp_path / 'out.json'}"]
        await run(program("guidellm"), *command, folder=tmp_path)
    (benchmark,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0)
