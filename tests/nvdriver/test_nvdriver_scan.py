"""Finding one's own channels: any numbering, any place of the client counter, and never anyone else's."""

import pytest

from nvdriver import abi
from nvdriver.api import ScanLimits
from nvdriver.errors import DeviceLost, NoChannels, Status
from nvdriver.fake import Injection
from nvdriver.fake_process import FakeContext
from nvdriver.scan import find_channels

SMALL = ScanLimits(clients=64, objects=128)


def scan(machine, limits=SMALL, **kwargs):
    found = find_channels(machine.owner, limits, **kwargs)
    for f in found:
        f.file.close()
    return [f.channels for f in found]


@pytest.mark.parametrize("branch", sorted(abi.BRANCHES))
@pytest.mark.parametrize("first_handle", [0x4, 0x13, 0x4C])
@pytest.mark.parametrize("hopper", [True, False], ids=["hopper", "ampere"])
def test_the_compute_channels_are_found_whatever_their_numbers(make_machine, branch, first_handle, hopper):
    machine = make_machine(branch)
    machine.context.destroy()
    context = FakeContext(machine.owner, first_handle, hopper=hopper)
    (channels,) = scan(machine)
    group = abi.OBJECT_HANDLE_BASE + first_handle
    assert (channels.client, channels.subdevice, channels.groups) == (context.client, 0x5C000003, (group,))
    assert channels.channels == tuple(group + 1 + 2 * i for i in range(8))


def test_copy_channels_come_only_when_asked_for(machine):
    assert len(scan(machine)[0].channels) == 8
    (everything,) = scan(machine, copy_engines=True)
    assert len(everything.channels) == 10 and len(everything.groups) == 3


def test_a_client_far_along_and_wrapped_around_is_found(machine):
    machine.context.destroy()
    machine.driver.skip_clients(abi.CLIENT_HANDLE_COUNT - 7 - 2)
    context = FakeContext(machine.owner)
    machine.driver.skip_clients(20)
    (channels,) = scan(machine)
    assert channels.client == context.client > abi.CLIENT_HANDLE_BASE + abi.CLIENT_HANDLE_COUNT - 10


def test_a_client_beyond_the_limit_is_not(machine):
    machine.driver.skip_clients(100)
    with pytest.raises(NoChannels):
        scan(machine)
    assert scan(machine, ScanLimits(clients=256, objects=128))


def test_only_own_descriptors_are_asked(machine):
    FakeContext(machine.controller)
    assert [channels.client for channels in scan(machine)] == [machine.context.client]


def test_two_descriptors_of_one_file_give_one_set(machine):
    machine.owner.files[0].duplicate()
    before = len(machine.owner.files)
    assert len(scan(machine)) == 1
    assert len(machine.owner.files) == before


def test_a_scan_leaves_no_descriptor_and_no_client_behind(machine):
    before = len(machine.owner.files)
    scan(machine)
    assert len(machine.owner.files) == before
    assert set(machine.driver._clients) == {machine.context.client}


def test_a_failing_scan_leaves_no_descriptor_either(machine):
    before = len(machine.owner.files)
    machine.driver.injections.append(Injection(status=Status.GPU_IS_LOST))
    with pytest.raises(DeviceLost):
        scan(machine)
    assert len(machine.owner.files) == before


def test_channels_that_compute_nothing_are_named_in_the_error(machine):
    machine.context.destroy()
    FakeContext(machine.owner, num_channels=0)
    with pytest.raises(NoChannels, match="2 channels found, none with a compute object"):
        scan(machine)
