"""The real side of the seam, as far as it goes without a device: descriptors, processes, the version file."""

import errno
import os
import subprocess
import sys

import pytest

from nvdriver import abi
from nvdriver.device import LinuxFile, LinuxHost, MonotonicClock, release_of
from nvdriver.errors import CallFailed, NoDevice, StaleHandles
from nvdriver.rm import ResourceManager


@pytest.fixture
def node(tmp_path):
    """A plain file in the place of the control node."""
    path = tmp_path / "nvidiactl"
    path.touch()
    return str(path)


def test_only_descriptors_of_the_node_are_found_and_they_are_duplicates(node, tmp_path):
    other = tmp_path / "other"
    other.touch()
    mine = [os.open(node, os.O_RDWR), os.open(node, os.O_RDWR), os.open(other, os.O_RDWR)]
    num_open = len(os.listdir("/proc/self/fd"))
    found = LinuxHost(node).own_control_files()
    assert len(found) == 2
    for file in found:
        assert file.fileno() not in mine and not os.get_inheritable(file.fileno())
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(node))
        file.close()
        file.close()
    assert len(os.listdir("/proc/self/fd")) == num_open
    for fd in mine:
        os.close(fd)


def test_a_missing_or_closed_node_is_no_device(tmp_path):
    host = LinuxHost(str(tmp_path / "nvidiactl"))
    for ask in (host.open_control, host.own_control_files):
        with pytest.raises(NoDevice, match="check that the driver is loaded"):
            ask()


def test_a_file_that_is_no_device_refuses_the_ioctl(node):
    file = LinuxHost(node).open_control()
    with pytest.raises(CallFailed, match="release"):
        ResourceManager(file).release()
    file.close()
    with pytest.raises(StaleHandles):
        ResourceManager(file).release()
    with pytest.raises(OSError) as caught:
        file.ioctl(abi.REQUEST_VERSION, abi.VersionCall())
    assert caught.value.errno == errno.EBADF


def test_a_duplicate_outlives_its_original(node):
    first = LinuxHost(node).open_control()
    second = first.duplicate()
    first.close()
    assert os.fstat(second.fileno())
    second.close()


def test_a_peer_is_alive_until_it_is_reaped_or_gone():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peer = LinuxHost().peer(child.pid)
    assert peer.is_alive()
    child.communicate(b"\n")
    assert not peer.is_alive()
    peer.close()
    late = LinuxHost().peer(child.pid)
    assert not late.is_alive()
    late.close()


@pytest.mark.parametrize(
    ("text", "release"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@x)  Tue\n"
            "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n",
            "580.95.05",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.120  Fri Sep 13 10:10:01 UTC 2024\n", "550.120"),
        ("570.86.15", "570.86.15"),
    ],
)
def test_the_release_in_the_version_file(text, release):
    assert release_of(text) == release


@pytest.mark.parametrize("text", ["", "no number here", "GCC version: 12.3.0"])
def test_a_version_file_without_a_release(text):
    with pytest.raises(NoDevice, match="no driver release"):
        release_of(text)


def test_the_version_file_may_be_missing(tmp_path):
    assert LinuxHost(version_file=str(tmp_path / "none")).version_text() == ""
    assert LinuxHost().pid() == os.getpid() and LinuxHost().uid() == os.geteuid()


def test_the_monotonic_clock_never_goes_back():
    clock = MonotonicClock()
    before = clock.now()
    clock.sleep(0)
    assert clock.now() >= before


def test_a_real_file_is_a_device_file(node):
    fd = os.open(node, os.O_RDWR)
    file = LinuxFile(fd)
    assert file.fileno() == fd
    file.close()
