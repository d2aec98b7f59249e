"""Golden numbers: sizes and offsets compiled from the headers of each branch, request numbers, commands."""

import pytest

from nvdriver import abi
from nvdriver.abi import Command
from nvdriver.errors import UnsupportedBranch

LAYOUTS = {
    abi.ControlCall: (
        32,
        {"client": 0, "object": 4, "command": 8, "flags": 12, "params": 16, "params_size": 24, "status": 28},
    ),
    abi.AllocCall: (
        32,
        {"root": 0, "parent": 4, "handle": 8, "object_class": 12, "params": 16, "params_size": 24, "status": 28},
    ),
    abi.VersionCall: (72, {"command": 0, "reply": 4, "text": 8}),
    abi.HandleInfoParams: (16, {"object": 0, "index": 4, "data": 8}),
    abi.DisableChannelsParams: (
        536,
        {
            "disable": 0,
            "num_channels": 4,
            "only_disable_scheduling": 8,
            "rewind_gp_put": 9,
            "preempt_event": 16,
            "clients": 24,
            "channels": 280,
        },
    ),
    abi.TimesliceParams: (8, {"microseconds": 0}),
    abi.PreemptParams: (8, {"wait": 0, "manual_timeout": 1, "timeout_us": 4}),
}


@pytest.mark.parametrize("record", LAYOUTS, ids=lambda record: record.__name__)
def test_layout_is_the_one_compiled_from_the_headers(record):
    size, offsets = LAYOUTS[record]
    assert record.size() == size
    assert {name: getattr(record, name).offset for name, _type in record._fields_} == offsets


def test_every_structure_has_a_golden_layout():
    assert set(abi.Record.__subclasses__()) == set(LAYOUTS)


def test_request_numbers():
    assert abi.REQUEST_CONTROL == 0xC020462A
    assert abi.REQUEST_ALLOC == 0xC020462B
    assert abi.REQUEST_VERSION == 0xC04846D2


def test_the_allow_list_is_exactly_these_commands():
    assert {int(command): abi.PARAMS[command].size() for command in Command} == {
        0x00000D02: 16,
        0x2080110B: 536,
        0xA06C0103: 8,
        0xA06C0104: 8,
        0xA06C0105: 8,
    }


@pytest.mark.parametrize(
    ("release", "branch"),
    [
        ("550.120", 550),
        ("550.163.01", 550),
        ("570.86.15", 570),
        ("575.64.05", 575),
        ("580.95.05", 580),
        ("590.48.01", 590),
        ("595.45.04", 595),
    ],
)
def test_branch_of_a_release(release, branch):
    assert abi.branch_of(release) == branch


@pytest.mark.parametrize("release", ["535.288.01", "560.35.03", "610.57.01", "", "garbage", "5800.1"])
def test_an_unchecked_branch_is_refused(release):
    with pytest.raises(UnsupportedBranch, match="550, 570, 575, 580, 590, 595"):
        abi.branch_of(release)
