"""The control page under processes that are stopped and killed in the middle of writing it."""

from __future__ import annotations

import os
import random
import resource
import signal
import time

import pytest
from processes import Children, eventually, moves

from engine.colocate.control import ControlPage, Word
from engine.errors import InvalidConfig
from engine.memory.slabs import SlabPool
from engine.types import Tenant


def test_a_second_mapping_sees_the_words_of_the_first(control: ControlPage) -> None:
    other = ControlPage(control.num_slabs, os.dup(control.fd))
    control[Word.HEARTBEAT] = 2**64 - 1
    other[Word.RESCUES] = 7
    assert other[Word.HEARTBEAT] == 2**64 - 1
    assert control[Word.RESCUES] == 7
    assert {word: other[word] for word in Word} == {word: control[word] for word in Word}
    other.close()
    assert control[Word.RESCUES] == 7


def test_each_word_and_slab_has_a_place_of_its_own(control: ControlPage) -> None:
    writable = [word for word in Word if word not in (Word.MAGIC, Word.NUM_SLABS, Word.GENERATION, Word.REPORT)]
    for word in writable:
        control[word] = 1000 + word
    for slab in range(control.num_slabs):
        control.publish_slab(slab, Tenant.OFFLINE if slab % 2 else Tenant.ONLINE, 2**40 + slab)
    assert control.write_report(["last"])
    assert [control[word] for word in writable] == [1000 + word for word in writable]
    for slab in range(control.num_slabs):
        assert control.slab(slab) == (Tenant.OFFLINE if slab % 2 else Tenant.ONLINE, 2**40 + slab)
    assert control[Word.GENERATION] == control.num_slabs
    assert control.read_report(list) == ["last"]


def test_a_page_for_another_number_of_slabs_is_refused(control: ControlPage) -> None:
    for wrong in (control.num_slabs - 1, control.num_slabs + 1):
        with pytest.raises((AssertionError, ValueError)):  # the latter where the sizes differ by a page
            ControlPage(wrong, control.fd)


def test_main_is_alive_for_one_lease_after_its_last_sign(control: ControlPage) -> None:
    assert not control.main_is_alive(), "it has not given any sign yet"
    control[Word.HEARTBEAT] = time.monotonic_ns()
    assert control.main_is_alive()
    control[Word.HEARTBEAT] = time.monotonic_ns() - 3_600_000_000_000
    assert not control.main_is_alive()


def test_no_descriptor_left_is_a_clear_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(InvalidConfig, match="no shared memory for the control page"):
            ControlPage(3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_report_is_none_and_the_last_one_counts(control: ControlPage) -> None:
    assert control.read_report(dict) is None
    for number in range(5):
        assert control.write_report({"number": number})
        assert control.read_report(dict) == {"number": number}
        assert control.read_report(dict) == {"number": number}, "reading takes nothing away"


def test_a_report_too_large_leaves_the_old_one(control: ControlPage) -> None:
    assert control.write_report(["fits"])
    for _ in range(3):
        assert not control.write_report(bytes(300_000))
        assert control.read_report(list) == ["fits"]
    assert control.write_report(bytes(256 * 1024 - 5)), "five bytes of msgpack header"
    assert control.read_report(bytes) == bytes(256 * 1024 - 5)
    assert not control.write_report(bytes(256 * 1024 - 4))
    assert control.slab(control.num_slabs - 1) == (Tenant.ONLINE, 0), "nothing ran over"


def test_reports_are_whole_whenever_their_writer_is_stopped_or_killed(control: ControlPage, children: Children) -> None:
    dice = random.Random(3)
    for tag in range(4):
        writer = children.worker("report", tag)
        assert moves(control)
        last = 0
        for _ in range(60):
            if dice.random() < 0.3:
                writer.send_signal(dice.choice([signal.SIGSTOP, signal.SIGCONT]))
            report = control.read_report(dict)
            assert report is not None and report["number"] == report["end"]
            assert report["echo"] == [report["number"]] * (report["number"] % 700)
            if report["tag"] == tag:
                assert report["number"] >= last, "an older report again"
                last = report["number"]
            time.sleep(dice.random() * 2e-3)
        writer.kill()
        writer.wait()
        final = control.read_report(dict)
        assert final["number"] == final["end"] and final["number"] >= last
        assert control.read_report(dict) == final


def test_a_reader_overtaken_by_the_writer_reads_again(control: ControlPage) -> None:
    """Between looking which buffer is complete and copying it, the writer may have gone round twice."""
    assert control.write_report(["old"])

    words = control._words
    reports = iter([["two"], ["new, and longer than the old one"]])

    class Slow:
        """The page's words, of which reading REPORT the first time takes two reports."""

        def __getitem__(self, index: int) -> int:
            value = int(words[index])
            for report in reports:
                control._words = words
                assert control.write_report(report)
                control._words = self  # type: ignore[assignment]
            return value

        def release(self) -> None:
            words.release()

    control._words = Slow()  # type: ignore[assignment]
    assert control.read_report(list) == ["new, and longer than the old one"]


def test_slabs_published_here_are_seen_there(control: ControlPage, children: Children) -> None:
    pool = SlabPool(control.num_slabs, control.publish_slab)
    children.worker("see")
    dice = random.Random(5)
    for _ in range(50):
        slabs = dice.sample(range(pool.num_slabs), dice.randint(1, pool.num_slabs))
        for tenant in Tenant:
            mine = [slab for slab in slabs if pool.owner(slab) is not tenant]
            pool.transfer(mine, tenant)
            slabs = [slab for slab in slabs if slab not in mine]
    wanted = [[pool.owner(slab).value, pool.epoch(slab)] for slab in range(pool.num_slabs)]
    seen = [control[Word.GENERATION], wanted]
    eventually(lambda: control.read_report(list) == seen, "the worker's view to be the pool's")
