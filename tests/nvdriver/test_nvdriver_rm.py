"""Control calls: what is never sent, and what each answer of the driver becomes."""

import errno

import pytest

from nvdriver import abi, errors, fake
from nvdriver.abi import Command
from nvdriver.fake import Injection
from nvdriver.rm import ResourceManager


@pytest.fixture
def manager(machine):
    return ResourceManager(machine.owner.files[0])


def preempt(machine, manager):
    group = abi.OBJECT_HANDLE_BASE + 0x13
    manager.control(machine.context.client, group, Command.GROUP_PREEMPT, abi.PreemptParams(wait=1))


@pytest.mark.parametrize(
    "command",
    [fake.GROUP_SCHEDULE, fake.STOP_CHANNEL, fake.STOP_RUNLIST, fake.DISABLE_USER_CHANNELS, fake.GROUP_INTERLEAVE, 0],
)
def test_what_is_not_on_the_allow_list_is_never_sent(machine, manager, command):
    with pytest.raises(errors.Refused, match="allow-list"):
        manager.control(machine.context.client, machine.context.client, command, abi.PreemptParams())
    assert machine.driver.calls == []


@pytest.mark.parametrize(
    "fields",
    [
        {"only_disable_scheduling": 1},
        {"rewind_gp_put": 1},
        {"preempt_event": 0x1000},
        {"num_channels": 0},
        {"num_channels": 65},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_disable_that_could_lose_work_or_overrun_is_never_sent(machine, manager, fields):
    params = abi.DisableChannelsParams(**{"disable": 1, "num_channels": 1} | fields)
    with pytest.raises(errors.Refused):
        manager.control(machine.context.client, 0x5C000003, Command.FIFO_DISABLE_CHANNELS, params)
    assert machine.driver.calls == []


def test_the_wrong_structure_is_never_sent(machine, manager):
    with pytest.raises(errors.Refused, match="DisableChannelsParams"):
        manager.control(machine.context.client, 0x5C000003, Command.FIFO_DISABLE_CHANNELS, abi.PreemptParams())
    assert machine.driver.calls == []


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (0x03, errors.Busy),
        (0x65, errors.Busy),
        (0x66, errors.Busy),
        (0x0F, errors.DeviceLost),
        (0x62, errors.DeviceLost),
        (0x1B, errors.MissingPrivilege),
        (0x1F, errors.UnsupportedBranch),
        (0x21, errors.StaleHandles),
        (0x33, errors.StaleHandles),
        (0x57, errors.StaleHandles),
        (0x23, errors.RouteNotPermitted),
        (0x56, errors.NotSupported),
        (0x40, errors.CallFailed),
        (0xFFFF, errors.CallFailed),
    ],
)
def test_each_status_becomes_its_exception_and_says_what_to_do(machine, manager, status, error):
    machine.driver.injections.append(Injection(status=status, command=Command.GROUP_PREEMPT, times=2))
    with pytest.raises(errors.NvDriverError, match=f"0x{status:x}.*: .*[a-z]{{4}}") as caught:
        preempt(machine, manager)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, errors.NoDevice),
        (errno.EACCES, errors.NoDevice),
        (errno.ENODEV, errors.NoDevice),
        (errno.EBADF, errors.StaleHandles),
        (errno.EIO, errors.CallFailed),
        (errno.EINVAL, errors.CallFailed),
    ],
)
def test_each_errno_becomes_its_exception(machine, manager, number, error):
    machine.driver.injections.append(Injection(error=number, command=Command.GROUP_PREEMPT))
    with pytest.raises(errors.NvDriverError) as caught:
        preempt(machine, manager)
    assert type(caught.value) is error


def test_a_transient_status_is_retried_once_only(machine, manager):
    machine.driver.injections.append(Injection(status=errors.Status.TIMEOUT, command=Command.GROUP_PREEMPT, times=2))
    with pytest.raises(errors.Busy):
        preempt(machine, manager)
    assert len(machine.driver.calls) == 2
    preempt(machine, manager)


def test_a_closed_descriptor(machine, manager):
    manager.file.close()
    with pytest.raises(errors.StaleHandles):
        preempt(machine, manager)


def test_the_exception_tree_in_the_docstring_is_the_real_one():
    drawn = [line.strip("│├└─ ").split()[0] for line in errors.__doc__.splitlines() if "──" in line]
    real = [
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.NvDriverError)
    ]
    assert sorted([*drawn, "NvDriverError"]) == sorted(real)
