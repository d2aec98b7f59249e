"""Which route reaches whose channels, and in what words open_gate says no."""

import os
import socket
import subprocess
import sys

import pytest

from nvdriver import abi
from nvdriver.abi import Command
from nvdriver.api import DriverUnavailable, Grant, Route, State, make_grant, open_gate, receive_grant, send_grant
from nvdriver.device import LinuxFile, LinuxHost
from nvdriver.errors import (
    MissingPrivilege,
    MpsActive,
    NoChannels,
    NoDevice,
    NotSupported,
    Refused,
    RouteNotPermitted,
    Status,
    UnsupportedBranch,
)
from nvdriver.fake import Injection, Validation
from nvdriver.fake_process import FakeContext, FakeProcess
from nvdriver.scan import ChannelSet


@pytest.mark.parametrize("branch", sorted(abi.BRANCHES))
def test_a_passed_descriptor_works_on_a_stock_driver(make_machine, branch):
    machine = make_machine(branch)
    machine.context.launch(60_000_000)
    gate = machine.open_passed(machine.open())
    assert gate.route is Route.PASSED_FD
    gate.freeze()
    assert machine.moved_us() == 0
    gate.thaw()
    assert machine.moved_us() == 5000


@pytest.mark.parametrize("branch", sorted(abi.BRANCHES))
@pytest.mark.parametrize("capabilities", [frozenset(), frozenset({"SYS_ADMIN", "SYS_NICE"})], ids=["user", "root"])
def test_a_stock_driver_refuses_the_cross_client_route_even_to_root(make_machine, branch, capabilities):
    machine = make_machine(branch)
    grant, _files = make_grant(machine.open(), machine.owner)
    machine.controller.capabilities = capabilities
    with pytest.raises(RouteNotPermitted, match="pass its descriptor"):
        machine.open(grant, process=machine.controller)
    assert machine.controller.files == [] and machine.num_disabled == 0


@pytest.mark.parametrize("validation", [Validation.SAME_USER, Validation.OFF])
def test_a_configured_driver_allows_the_cross_client_route(machine, validation):
    grant, _files = make_grant(machine.open(), machine.owner)
    machine.driver.validation = validation
    gate = machine.open(grant, process=machine.controller)
    assert gate.route is Route.CROSS_CLIENT
    gate.freeze()
    assert machine.moved_us() == 0


def test_another_user_is_refused_before_the_driver_is_asked(machine):
    grant, files = make_grant(machine.open(), machine.owner)
    machine.driver.validation = Validation.OFF
    stranger = FakeProcess(machine.driver, 300, user=1001)
    calls = len(machine.driver.calls)
    with pytest.raises(RouteNotPermitted, match="same user"):
        machine.open(grant, [f.pass_to(stranger) for f in files], process=stranger)
    assert len(machine.driver.calls) == calls and stranger.files == []


def test_a_grant_from_another_machine_is_refused(machine):
    guard = machine.open()
    grant = Grant(100, 1000, "550.120", tuple(found.channels for found in guard.switch.found))
    with pytest.raises(RouteNotPermitted, match="one machine"):
        machine.open(grant, process=machine.controller)


def test_a_grant_that_names_no_channels_is_refused(machine):
    guard = machine.open()
    _grant, files = make_grant(guard, machine.owner)
    wrong = guard.switch.found[0].channels
    grant = Grant(100, 1000, machine.driver.release, (ChannelSet(wrong.client, wrong.subdevice, (), (0x5C000002,)),))
    with pytest.raises(DriverUnavailable, match="no channel"):
        machine.open(grant, [f.pass_to(machine.controller) for f in files], process=machine.controller)
    assert machine.controller.files == []


def test_only_the_owner_grants(machine):
    gate = machine.open_passed(machine.open())
    with pytest.raises(RouteNotPermitted, match="over there"):
        make_grant(gate, machine.controller)


def test_no_node(machine):
    machine.owner.has_node = False
    with pytest.raises(NoDevice, match="driver is loaded"):
        machine.open()


def test_a_machine_without_a_gpu_says_so(tmp_path):
    missing = LinuxHost(node=str(tmp_path / "nvidiactl"), version_file=str(tmp_path / "version"))
    with pytest.raises(NoDevice, match="nvidiactl"):
        open_gate(host=missing, environ={"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)})


@pytest.mark.parametrize("branch", [535, 560, 610])
def test_an_unknown_branch(make_machine, branch):
    machine = make_machine(branch)
    with pytest.raises(UnsupportedBranch, match=str(branch)):
        machine.open()
    assert machine.driver.calls == [] and len(machine.owner.files) == 1


def test_the_driver_itself_is_asked_where_there_is_no_version_file(machine):
    machine.owner.version = ""
    assert machine.open().state is State.THAWED


def test_mps_is_refused(machine, tmp_path):
    (tmp_path / "control").touch()
    with pytest.raises(MpsActive, match="freeze all"):
        machine.open()


def test_no_context(machine):
    with pytest.raises(NoChannels, match="create the CUDA context"):
        machine.open(process=machine.controller)
    assert machine.controller.files == []


def test_a_driver_without_firmware_forwarding(machine):
    machine.driver.has_gsp = False
    with pytest.raises(NotSupported, match="GSP"):
        machine.open()
    assert len(machine.owner.files) == 1


def test_a_missing_privilege(machine):
    refusal = Injection(status=Status.INSUFFICIENT_PERMISSIONS, command=Command.FIFO_DISABLE_CHANNELS)
    machine.driver.injections.append(refusal)
    with pytest.raises(MissingPrivilege, match="capability"):
        machine.open()


def test_any_other_failure_to_open_is_driver_unavailable_too(machine):
    machine.driver.injections.append(Injection(status=Status.GPU_IS_LOST, command=Command.FIFO_DISABLE_CHANNELS))
    with pytest.raises(DriverUnavailable, match="GPU_IS_LOST"):
        machine.open()


def test_two_contexts_of_one_process_are_frozen_together(machine):
    other = FakeContext(machine.owner, first_handle=0x40)
    gate = machine.open()
    gate.freeze()
    assert machine.num_disabled == 16
    assert not any(channel.enabled for channel in other.compute.channels)


# ---- the wire: real sockets, real descriptors ----


@pytest.fixture
def wire():
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


def own_grant(num_sets=1):
    sets = [ChannelSet(0xC1D00001 + i, 0x5C000003, (0x5C000013,), (0x5C000014, 0x5C000015)) for i in range(num_sets)]
    return Grant(os.getpid(), os.geteuid(), "580.95.05", tuple(sets))


def test_a_grant_and_its_descriptor_arrive(wire):
    sent = LinuxFile(os.memfd_create("node"))
    send_grant(wire[0], own_grant(), [sent])
    grant, files = receive_grant(wire[1])
    assert grant == own_grant()
    assert os.path.sameopenfile(sent.fileno(), files[0].fileno())
    assert not os.get_inheritable(files[0].fileno())
    for file in (sent, *files):
        file.close()


def test_a_grant_in_another_process_name_is_refused_and_its_descriptors_closed(wire):
    grant = Grant(os.getpid() + 1, os.geteuid(), "580.95.05", own_grant().sets)
    sent = LinuxFile(os.memfd_create("node"))
    num_open = len(os.listdir("/proc/self/fd"))
    send_grant(wire[0], grant, [sent])
    with pytest.raises(Refused, match="only the owner"):
        receive_grant(wire[1])
    assert len(os.listdir("/proc/self/fd")) == num_open
    sent.close()


def test_a_descriptor_for_each_set_or_none(wire):
    sent = LinuxFile(os.memfd_create("node"))
    send_grant(wire[0], own_grant(2), [sent])
    with pytest.raises(Refused, match="one for each, or none"):
        receive_grant(wire[1])
    sent.close()


def test_the_sender_counts_not_the_maker_of_the_socket_pair(wire):
    """A controller makes the pair and a child sends: SO_PEERCRED would name the controller."""
    code = (
        "import os, socket; from nvdriver.api import Grant, send_grant; "
        f"sock = socket.socket(fileno={wire[0].fileno()}); "
        "send_grant(sock, Grant(os.getpid(), os.geteuid(), '580.95.05', ()), [])"
    )
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[wire[0].fileno()])
    grant, files = receive_grant(wire[1])
    assert grant.pid == child.pid != os.getpid() and files == []
    assert child.wait() == 0


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"pid": 1}', b'{"sets": [{"client": "x"}]}'])
def test_garbage_is_no_grant(data):
    with pytest.raises(Refused, match="not a grant"):
        Grant.from_bytes(data)
