"""How colocation begins and ends: workers that cannot start, main processes that are stopped or killed, engines that close."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPResponse
from pathlib import Path

import psutil
import pytest
from colocation_cases import PATIENCE, Models, ask_all, children, colocated, eventually, sharing, two_models, worker_of, workers

from engine import SamplingParams, Tenant
from engine.errors import ContextTooLong, EngineDead, InvalidConfig, InvalidRequest, RequestFailed, UnknownModel

ROOT = Path(__file__).parents[2]
ENDLESS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return two_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
    before = set(children())
    yield
    eventually(lambda: set(children()) <= before, "end of all child processes")


# -- workers that cannot start


def test_a_folder_that_is_not_there(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    with colocated(models, offline_model="/no/such/folder") as engine:
        assert [card.tenant for card in engine.models] == [Tenant.ONLINE]
        assert "/no/such/folder" in caplog.text
        ask_all(engine, models, Tenant.ONLINE)
        case = models.cases[Tenant.ONLINE][0]
        assert engine.submit(case.prompt, case.params, tenant="offline").result(PATIENCE).tenant is Tenant.OFFLINE


def test_a_checkpoint_that_is_cut_off(models: Models, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in models.offline.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)

    with colocated(models, offline_model=str(broken)) as engine:
        with pytest.raises(EngineDead, match=r"model\.safetensors"):
            engine.submit("hi", tenant="offline")
        assert engine.alive
        ask_all(engine, models, Tenant.ONLINE)
        assert sharing(engine).worker_failure is not None


def test_a_worker_killed_at_each_start(models: Models) -> None:
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.01):
            for worker in workers():
                with suppress(psutil.NoSuchProcess):
                    worker.kill()

    with ThreadPoolExecutor() as pool:
        killer = pool.submit(kill)
        try:
            engine = colocated(models)
        finally:
            over.set()
        killer.result()
    with engine:
        with pytest.raises(EngineDead, match="lack of memory"):
            engine.submit("hi", tenant="offline")
        ask_all(engine, models, Tenant.ONLINE)


def test_a_full_shared_memory_file_system(models: Models) -> None:
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    full = "mount -t tmpfs -o size=4k none /dev/shm; head -c 4096 /dev/zero > /dev/shm/full"
    if subprocess.run([*alone, full], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system of its own")
    code = (
        f"import engine\nwith engine.Engine({str(models.online)!r}, offline_model={str(models.offline)!r}) as e:\n"
        "    print('answered', *[len(e.submit([1], tenant=name).result().choices) for name in ('online', 'offline')])\n"
    )
    command = [*alone, f'{full}; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert "answered 1 1" in done.stdout, done.stderr


# -- one model twice


def test_the_same_model_twice(models: Models) -> None:
    with colocated(models, offline_model=str(models.online), served_model_name=("chat", "alias")) as engine:
        assert [(card.id, card.tenant) for card in engine.models] == [
            ("chat", Tenant.ONLINE), (models.online.name, Tenant.OFFLINE),
        ]  # fmt: skip
        offline = models.online.name
        assert engine.resolve(None).id == engine.resolve("chat").id == engine.resolve("alias").id == "chat"
        assert engine.resolve(None, Tenant.OFFLINE).id == engine.resolve(offline).id == offline
        assert engine.resolve("alias", Tenant.OFFLINE).id == offline, "one model: its offline process serves its offline work"
        with pytest.raises(UnknownModel, match="chat"):
            engine.resolve("nobody")
        for index, case in enumerate(models.cases[Tenant.ONLINE]):
            answers = [engine.submit(case.prompt, case.params, model=name).result(PATIENCE) for name in ("chat", offline)]
            assert [done.choices[0].tokens for done in answers] == [models.answers[Tenant.ONLINE][index].tokens[0]] * 2
            assert [done.tenant for done in answers] == [Tenant.ONLINE, Tenant.OFFLINE]


@pytest.mark.parametrize("mode", ["step", "auto"])
def test_the_same_model_twice_in_shared_steps_is_loaded_once(models: Models, tmp_path: Path, mode: str) -> None:
    again = tmp_path / "again"
    again.symlink_to(models.online)
    options = {"offline_model": str(again), "offline_served_model_name": "night", "served_model_name": ("chat", "alias")}
    with colocated(models, sharing=mode, **options) as engine:
        assert not workers() and engine.stats().sharing is None, "nobody but the online worker"
        assert [(card.id, card.tenant) for card in engine.models] == [("chat", Tenant.ONLINE), ("night", Tenant.OFFLINE)]
        assert engine.resolve("alias", Tenant.OFFLINE).id == engine.resolve(None, Tenant.OFFLINE).id == "night"
        running = [
            (name, index, engine.submit(case.prompt, case.params, model=name))
            for index, case in enumerate(models.cases[Tenant.ONLINE])
            for name in ("chat", "night")
        ]
        for name, index, generation in running:
            done = generation.result(PATIENCE)
            assert done.model == name and done.tenant is (Tenant.ONLINE if name == "chat" else Tenant.OFFLINE)
            assert done.choices[0].tokens == models.answers[Tenant.ONLINE][index].tokens[0]
        assert engine.stats().tenants[Tenant.OFFLINE].counters.generated_tokens > 0


def test_its_name_is_checked_in_shared_steps_too(models: Models) -> None:
    with pytest.raises(InvalidConfig, match="chat"):
        colocated(
            models, offline_model=str(models.online), sharing="step", served_model_name=("chat",),
            offline_served_model_name="chat",
        )  # fmt: skip


# -- memory, the ledger, offline work of the online model


def test_online_takes_what_it_needs_and_no_answer_changes(models: Models) -> None:
    with colocated(models, reserve="miad") as engine, ThreadPoolExecutor() as pool:
        first, started = sharing(engine), time.monotonic()
        offline = [pool.submit(ask_all, engine, models, Tenant.OFFLINE) for _ in range(2)]
        eventually(lambda: (report := sharing(engine).worker) is not None and report.running, "offline work")
        long = [index for index, case in enumerate(models.cases[Tenant.ONLINE]) if len(case.prompt) > 200]
        cases = [models.cases[Tenant.ONLINE][index] for index in long]
        running = [engine.submit(case.prompt, case.params) for case in cases]
        for index, generation in zip(long, running, strict=True):
            assert generation.result(PATIENCE).choices[0].tokens == models.answers[Tenant.ONLINE][index].tokens[0]
        for done in offline:
            done.result(PATIENCE)

        after = sharing(engine)
        assert after.reclaims >= 1
        assert sum(after.reclaim_seconds.counts) == after.reclaims and after.reclaim_seconds.total > 0
        assert after.headroom_slabs > first.headroom_slabs
        assert sum(generation.cost.slabs_reclaimed for generation in running) == after.reclaimed_slabs
        assert sum(generation.cost.preemptions for generation in running) == after.preemptions == 1
        elapsed = sum(sharing(engine).device_seconds.values()) - sum(first.device_seconds.values())
        assert abs(elapsed - (time.monotonic() - started)) < 1.0, "every second has one owner"

        # A request of the offline tenant to the online model: more than online keeps, and nobody there who makes room.
        case = models.cases[Tenant.ONLINE][long[0]]
        done = engine.submit(case.prompt, case.params, tenant="offline", model=models.online.name).result(PATIENCE)
        assert done.choices[0].tokens == models.answers[Tenant.ONLINE][long[0]].tokens[0]


def test_a_static_split_promises_no_more_than_it_has(models: Models) -> None:
    with colocated(models, reserve="static", kv_cache_memory=4 * 96 * 1024) as engine:
        online, offline = engine.models
        assert online.max_model_len == 256, "two slabs"
        assert offline.max_model_len < 256
        with pytest.raises(ContextTooLong):
            engine.submit([1] * 300)
        at_the_limit = engine.submit([1] * 200, ENDLESS).result(PATIENCE)
        assert at_the_limit.usage.total_tokens == 256
        longest = engine.submit([1] * 100, ENDLESS, tenant="offline").result(PATIENCE)
        assert longest.usage.total_tokens == offline.max_model_len
        assert sharing(engine).reclaims == 0


# -- workers that die


def test_a_request_that_kills_its_worker_is_found_and_the_others_go_on(models: Models) -> None:
    with colocated(models, gate="layer") as engine:
        with pytest.raises(InvalidRequest):
            engine.submit("hi", tenant="offline", cache_salt="\ud800")
        process = worker_of(engine)
        with engine.arriving():  # nothing moves: what happens to the worker is not the doing of its requests' progress
            guilty, innocent = (engine.submit([token], ENDLESS, tenant="offline") for token in (1, 2))
            for _ in range(4):
                eventually(lambda: process.ready and process._child is not None, "a worker")
                restarts = process.restarts
                assert process._child is not None
                process._child.kill()
                eventually(lambda before=restarts: process.restarts > before, "its end noticed")
            with pytest.raises(RequestFailed, match="died 4 times"):
                guilty.result(PATIENCE)
        assert len(innocent.result(PATIENCE).choices[0].tokens) == 400


# -- engines that close


def test_close_while_frozen(models: Models) -> None:
    engine = colocated(models, gate="process")
    offline = engine.submit([1], ENDLESS, tenant="offline")
    eventually(lambda: offline.usage.completion_tokens > 0, "offline work")
    with engine.arriving():
        online = engine.submit([1], ENDLESS)
        pid = engine._sharing._pid  # type: ignore[union-attr]
        assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
        engine.close()
    for generation in (offline, online):
        with pytest.raises(EngineDead):
            generation.result(PATIENCE)
    engine.stats()
    engine.close()
    with pytest.raises(EngineDead):
        engine.submit([1], tenant="offline")


def test_interrupted_while_the_worker_loads(models: Models) -> None:
    def interrupt() -> None:
        eventually(workers, "a worker")
        os.kill(os.getpid(), signal.SIGINT)

    gc.collect()  # an interrupt in a finalizer of what other tests left would be swallowed there
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start deaf to it
    before = set(threading.enumerate())  # other tests' engines among them
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            colocated(models).close()
    finally:
        thread.join()
        signal.signal(signal.SIGINT, handler)
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name in ("engine", "arbiter", "offline-supervisor")]


# -- servers of both


class ServerProcess:
    """A server of both models in a process of its own."""

    def __init__(self, models: Models, folder: Path) -> None:
        self._models = models
        self._log = folder / "log"
        command = [sys.executable, "-m", "engine.server", str(models.online), "--offline-model", str(models.offline)]
        command += ["--port", "0", "--threads", "1", "--cooldown-ms", "2", "--gate", "process"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def ready(self) -> None:
        eventually(self._is_ready, "a server")

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        found = re.search(r"listening on (http://\S+:\d+)", self._log.read_text())
        if found is None:
            return False
        self.url = found[1]
        try:
            with urllib.request.urlopen(self.url + "/ready", timeout=PATIENCE) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def ask(self, tenant: Tenant, index: int = 0) -> None:
        """Ask one greedy case and compare."""
        case = self._models.cases[tenant][index]
        model = self._models.online if tenant is Tenant.ONLINE else self._models.offline
        text = self.complete(model, list(case.prompt), case.params.max_tokens)
        assert text == self._models.answers[tenant][index].texts[0]

    def complete(self, model: Path, prompt: list[int], max_tokens: int | None) -> str:
        with self.post(model=model.name, prompt=prompt, max_tokens=max_tokens) as response:
            text: str = json.load(response)["choices"][0]["text"]
        return text

    def post(self, **body: object) -> HTTPResponse:
        data = json.dumps({"temperature": 0, "ignore_eos": True} | body).encode()
        request = urllib.request.Request(self.url + "/v1/completions", data, {"Content-Type": "application/json"})
        response: HTTPResponse = urllib.request.urlopen(request, timeout=PATIENCE)
        return response

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self) -> psutil.Process:
        (worker,) = workers(self.process.pid)
        return worker

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def servers(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    """Two on one machine."""
    started = [ServerProcess(models, tmp_path_factory.mktemp("server")) for _ in range(2)]
    yield started
    for server in started:
        server.close()


def test_servers_that_are_stopped_told_to_end_and_killed(servers: list[ServerProcess], models: Models) -> None:
    for server in servers:
        server.ready()
    first, second = servers
    families = [server.family() for server in servers]
    assert all(len(family) == 2 for family in families), "worker and guardian"

    with ThreadPoolExecutor() as pool:
        # Stopped, with its worker frozen: nobody but the guardian can let that go.
        asked = [pool.submit(first.ask, tenant) for tenant in Tenant for _ in range(4)]
        eventually(lambda: first.worker().status() == psutil.STATUS_STOPPED or all(a.done() for a in asked), "a preemption")
        first.process.send_signal(signal.SIGSTOP)
        eventually(lambda: first.worker().status() != psutil.STATUS_STOPPED, "rescue")
        first.process.send_signal(signal.SIGCONT)
        for done in asked:
            done.result(PATIENCE)
        for server in servers:
            for tenant in Tenant:
                server.ask(tenant)

        # Told to end while online has frozen offline: what online was promised it gets.
        offline = pool.submit(first.complete, models.offline, [1], 400)
        with first.post(model=models.online.name, prompt=[1], max_tokens=400, stream=True) as online:
            assert online.readline().startswith(b"data: ")
            first.process.terminate()
            assert online.read().endswith(b"data: [DONE]\n\n")
        offline.exception(PATIENCE)
        assert first.process.wait(PATIENCE) == 0

        # Killed, and the guardian with it: nobody is left to end a worker that stands still but the system.
        killed = [pool.submit(second.complete, model, [1], 400) for model in (models.offline, models.online)]
        eventually(lambda: second.worker().status() == psutil.STATUS_STOPPED or killed[1].done(), "a preemption")
        for child in second.family():
            if child.pid != second.worker().pid:
                child.kill()
        second.process.kill()
        for done in killed:
            done.exception(PATIENCE)
    eventually(lambda: not any(child.is_running() for family in families for child in family), "end of both families")
