"""The host tier of a GPU on streams and events that only take notes: what is copied, behind what, when it counts as done."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.kernels.api import KVLayout
from engine.kernels.cuda_host_store import CudaHostStore, PackedHostStore
from engine.memory.host import Move, PageCopier, Transfer


class Streams:
    """torch.cuda's streams and events; work on a stream counts as done when `finish` is called."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.done = False
        outer = self

        class Stream:
            def wait_stream(self, other: str) -> None:
                outer.log.append(f"wait for {other}")

            def synchronize(self) -> None:
                outer.done = True

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                outer.log.append("event")

            def query(self) -> bool:
                return outer.done

            def synchronize(self) -> None:
                outer.done = True

            def elapsed_time(self, end: Any) -> float:
                assert outer.done
                return 2.5

        self.Stream, self.Event = Stream, Event

    def current_stream(self) -> str:
        return "the steps"

    @contextmanager
    def stream(self, stream: Any) -> Any:
        self.log.append("on the side")
        yield
        self.log.append("back")


@pytest.fixture
def layout() -> KVLayout:
    return KVLayout.fit(
        num_layers=2, page_size=16, num_kv_heads=1, head_dim=10, dtype=torch.float16, slab_bytes=8192
    )


def test_pages_go_to_their_slots_and_come_back_elsewhere(layout: KVLayout) -> None:
    assert layout.page_stride > layout.page_bytes, "padding between pages must stay as it is"
    window = torch.randint(0, 256, (12 * layout.page_stride,), dtype=torch.uint8)
    before = window.view(12, -1).clone()
    streams = Streams()
    store: PageCopier = CudaHostStore(layout, window, 5, streams)

    saved = store.start(Transfer(1, False, (Move(7, 0), Move(2, 4))))
    assert streams.log == ["wait for the steps", "on the side", "event", "event", "back"]
    assert store.poll(saved) is None
    store.wait(saved)
    assert store.poll(saved) == pytest.approx(2.5e-3)
    window.random_(0, 256)
    taken = window.view(12, -1).clone()
    store.wait(store.start(Transfer(2, True, (Move(1, 4), Move(3, 0)))))

    taken[1, : layout.page_bytes] = before[2, : layout.page_bytes]
    taken[3, : layout.page_bytes] = before[7, : layout.page_bytes]
    assert torch.equal(window.view(12, -1), taken)
    store.close()


def test_a_transfer_is_a_few_milliseconds_whatever_a_page_is(layout: KVLayout) -> None:
    window = torch.zeros(layout.page_stride, dtype=torch.uint8)
    assert CudaHostStore(layout, window, 1, Streams()).batch == 32 * 2**20 // layout.page_bytes


class Kernels:
    """Packs at once; notes what was launched, and whether inside of what guards a launch."""

    def __init__(self, layout: KVLayout, window: torch.Tensor, log: list[str]) -> None:
        self._pages = window.view(-1, layout.page_stride)[:, : layout.page_bytes]
        self._log = log

    @contextmanager
    def launching(self) -> Any:
        self._log.append("(")
        yield
        self._log.append(")")

    def gather(self, pages: torch.Tensor, packed: torch.Tensor) -> None:
        self._log.append("pack")
        packed[: len(pages)] = self._pages[pages.long()]

    def scatter(self, pages: torch.Tensor, packed: torch.Tensor) -> None:
        self._log.append("unpack")
        self._pages[pages.long()] = packed[: len(pages)]


@pytest.fixture
def packed(layout: KVLayout) -> tuple[PackedHostStore, torch.Tensor, Streams]:
    window = torch.randint(0, 256, (12 * layout.page_stride,), dtype=torch.uint8)
    streams = Streams()
    kernels = Kernels(layout, window, streams.log)
    return PackedHostStore(layout, window, 5, kernels, kernels.launching, streams), window.view(12, -1), streams


def test_packed_pages_go_and_come_by_launches_in_the_steps_own_stream(
    layout: KVLayout, packed: tuple[PackedHostStore, torch.Tensor, Streams]
) -> None:
    store, window, streams = packed
    before = window.clone()

    saved = store.start(Transfer(1, False, (Move(7, 0), Move(2, 4))))
    assert streams.log == ["(", "pack", ")", "wait for the steps", "on the side", "event", "event", "back"]
    assert store.poll(saved) is None
    store.wait(saved)
    assert store.poll(saved) == pytest.approx(2.5e-3)
    window.random_(0, 256)
    taken = window.clone()

    streams.done = False
    streams.log.clear()
    load = store.start(Transfer(2, True, (Move(1, 4), Move(3, 0))))
    assert store.poll(load) is None and torch.equal(window, taken), "nothing is unpacked before it is there"
    streams.done = True
    assert store.poll(load) == pytest.approx(2.5e-3)
    assert streams.log == ["wait for the steps", "on the side", "event", "event", "back", "(", "unpack", ")"]
    taken[1, : layout.page_bytes] = before[2, : layout.page_bytes]
    taken[3, : layout.page_bytes] = before[7, : layout.page_bytes]
    assert torch.equal(window, taken)
    store.close()


def test_a_load_that_was_waited_for_is_never_unpacked_again(
    packed: tuple[PackedHostStore, torch.Tensor, Streams],
) -> None:
    """Its request gave way: from then on its pages are somebody else's."""
    store, window, streams = packed
    load = store.start(Transfer(1, True, (Move(1, 4),)))
    store.wait(load)
    window.random_(0, 256)
    now = window.clone()
    assert store.poll(load) is not None
    assert torch.equal(window, now) and streams.log.count("unpack") == 1


def test_no_more_is_started_than_there_are_buffers_for(packed: tuple[PackedHostStore, torch.Tensor, Streams]) -> None:
    store, _, streams = packed
    most, under_way = store.batch, []
    while store.batch:
        under_way.append(store.start(Transfer(len(under_way), False, (Move(len(under_way), len(under_way)),))))
    assert len(under_way) > 1
    streams.done = True
    assert store.poll(under_way[0]) is not None
    assert store.batch == most
