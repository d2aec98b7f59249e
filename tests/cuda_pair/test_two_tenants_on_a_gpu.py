"""Two models on one GPU, from requests to answers, in two real processes: the engine's own gates, windows, barrier and agent on
a GPU made of host memory. Whatever happens, both models answer as they do alone, and nothing is done that no GPU would forgive.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_gpu
import pytest
from colocation_cases import PATIENCE, SLAB, Models, ask_all, colocated, eventually, sharing, two_models, worker_of

from engine import Engine, Tenant
from engine.colocate import cuda_sharing, process
from engine.colocate.control import Word
from engine.errors import InvalidConfig
from nvdriver.abi import Command
from nvdriver.errors import Status
from nvdriver.fake import Injection

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return two_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[host_gpu.Manager]:
    monkeypatch.setenv(host_gpu.FOLDER, str(tmp_path))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "no-mps"))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(process, "WORKER", (sys.executable, str(HERE / "host_gpu_worker.py"), str(SLAB)))
    host_gpu.install(monkeypatch.setattr, SLAB)
    manager = host_gpu.Manager()
    yield manager
    manager.close()
    violations = tmp_path / "violations"
    assert not violations.exists(), violations.read_text()


def open_engine(models: Models, **options: object) -> Engine:
    return colocated(models, **({"device": "cuda"} | options))


def ask_both(engine: Engine, models: Models, rounds: int = 3) -> None:
    """Offline work without a pause, and online requests in the midst of it."""
    with ThreadPoolExecutor() as pool:
        offline = [pool.submit(ask_all, engine, models, Tenant.OFFLINE) for _ in range(2)]
        eventually(lambda: (report := sharing(engine).worker) is not None and report.running, "offline work")
        for _ in range(rounds):
            ask_all(engine, models, Tenant.ONLINE)
        for done in offline:
            done.result()


def break_channels(gpu: host_gpu.Manager) -> None:
    failure = Injection(status=Status.NOT_SUPPORTED, command=Command.FIFO_DISABLE_CHANNELS, times=-1)
    gpu.driver.injections.append(failure)


# -- which rung


def test_main_switches_the_workers_channels_on_descriptors_that_it_passed(models: Models, gpu: host_gpu.Manager) -> None:
    """The whole way: slabs over a socket, a grant back, the probe, freezes, slabs taken under way, answers as when alone."""
    with open_engine(models) as engine:
        assert engine._sharing is not None and engine._sharing._way == "granted"
        assert sharing(engine).gate == "channel" and gpu.num_contexts == 1
        ask_both(engine, models)
        after = sharing(engine)
        assert after.preemptions and after.reclaims and after.worker_restarts == 0
        assert {pid for pid, command in gpu.driver.calls if command == Command.FIFO_DISABLE_CHANNELS}
    eventually(lambda: gpu.num_contexts == 0, "no descriptor keeps the dead worker's context")


def test_without_a_grant_the_workers_agent_switches_them(
    models: Models, gpu: host_gpu.Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise InvalidConfig("no channel gate: not for you")

    monkeypatch.setattr(cuda_sharing, "open_granted", refused)
    with open_engine(models) as engine:
        assert engine._sharing is not None and engine._sharing._way == "channel"
        ask_both(engine, models)
        assert sharing(engine).reclaims and sharing(engine).worker_restarts == 0


@pytest.mark.parametrize("trouble", ["lies", "refuses", "mps"])
def test_the_stream_rung_follows(
    trouble: str, models: Models, gpu: host_gpu.Manager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not for a success code: a driver that says "done" and does nothing is seen through."""
    gpu.driver.is_honest = trouble != "lies"
    if trouble == "mps":
        (tmp_path / "no-mps").mkdir()
        (tmp_path / "no-mps" / "control").touch()
    elif trouble == "refuses":
        break_channels(gpu)
    with open_engine(models) as engine:
        assert sharing(engine).gate == "stream"
        ask_both(engine, models)
        assert sharing(engine).reclaims and sharing(engine).worker_restarts == 0


def test_the_layer_rung_is_the_last_that_stops_anything(
    models: Models, gpu: host_gpu.Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_TEST_STREAMS", "none")
    break_channels(gpu)
    with open_engine(models) as engine:
        assert sharing(engine).gate == "layer"
        ask_both(engine, models)
        assert sharing(engine).reclaims and sharing(engine).worker_restarts == 0


def test_a_rung_that_does_not_stop_it_is_refused_by_name(models: Models, gpu: host_gpu.Manager) -> None:
    break_channels(gpu)
    with pytest.raises(InvalidConfig, match="gate 'channel' does not stop"):
        open_engine(models, gate="channel")


def test_a_rung_under_which_memory_does_not_move_is_passed_over(
    models: Models, gpu: host_gpu.Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Experiment E5 answered with no: mapping waits for the frozen channels. Seen before a request needs memory."""
    monkeypatch.setenv("SLUICE_TEST_STUCK", "1")
    with open_engine(models) as engine:
        assert sharing(engine).gate == "stream"
        assert "does not let go of memory while frozen" in caplog.text
        restarts = sharing(engine).worker_restarts
        ask_both(engine, models)
        assert sharing(engine).reclaims and sharing(engine).worker_restarts == restarts


@pytest.mark.parametrize("gate", ["channel", "stream", "layer"])
def test_what_online_takes_comes_back_from_the_host(gate: str, models: Models, gpu: host_gpu.Manager) -> None:
    """Pages are packed and unpacked by kernels, which freeze and find the sink like those of a layer."""
    with open_engine(models, gate=gate, host_kv_memory=64 << 20) as engine:

        def restored() -> int:
            host = engine.stats().tenants[Tenant.OFFLINE].host
            return 0 if host is None else host.restored_tokens

        deadline = time.monotonic() + 2 * PATIENCE
        while not restored():
            assert time.monotonic() < deadline, engine.stats().tenants[Tenant.OFFLINE].host
            ask_both(engine, models)
        assert sharing(engine).reclaims and sharing(engine).worker_restarts == 0


# -- deaths


@pytest.mark.parametrize("gate", ["channel", "stream"])
def test_a_worker_killed_while_it_is_frozen(gate: str, models: Models, gpu: host_gpu.Manager) -> None:
    """Its channels are off and its slabs mapped: online has its memory all the same, and the next worker is born frozen."""
    with open_engine(models, gate=gate) as engine, ThreadPoolExecutor() as pool:
        offline = pool.submit(ask_all, engine, models, Tenant.OFFLINE)
        eventually(lambda: (report := sharing(engine).worker) is not None and report.running, "offline work")
        with engine.arriving():
            assert gate == "stream" or gpu.num_off
            child = worker_of(engine)._child
            assert child is not None
            child.kill()
            ask_all(engine, models, Tenant.ONLINE)
            eventually(lambda: gpu.num_off == 0 and gpu.num_contexts <= 1, "the dead worker's channels are nobody's")
        offline.result()
        ask_all(engine, models, Tenant.OFFLINE)
        assert sharing(engine).worker_restarts == 1 and sharing(engine).gate == gate


def test_a_silent_main_process_lets_the_worker_go_on(models: Models, gpu: host_gpu.Manager) -> None:
    """The arbiter's thread stands still for longer than all leases: the channels come back on by themselves."""
    with open_engine(models, gate="channel") as engine, engine.arriving():
        assert engine._sharing is not None
        control = engine._sharing._control
        eventually(lambda: gpu.num_off, "freeze")
        with engine._sharing._lock:
            eventually(lambda: gpu.num_off == 0, "fail open")
        eventually(lambda: gpu.num_off and control[Word.FROZEN], "main takes it back")
