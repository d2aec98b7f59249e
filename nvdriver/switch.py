"""The calls that stop and restart a fixed list of channels, built beforehand: each is one ioctl when it counts.

Owns the descriptors it was given. Knows nothing of leases or of who may ask; that is `gate.py`. It is the same for
every route, because the bytes are the same and only the open file differs. Not thread-safe; the gate holds its lock.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nvdriver import abi
from nvdriver.abi import Command, HandleInfo
from nvdriver.errors import NvDriverError, Refused, RouteNotPermitted, StaleHandles
from nvdriver.rm import PreparedCall, ResourceManager
from nvdriver.scan import ChannelSet, Found

MAX_TIME_SLICE_US = 1_000_000


@dataclass(frozen=True, slots=True)
class _Batch:
    """Up to 64 channels, and the calls that disable and enable them."""

    manager: ResourceManager
    channels: ChannelSet
    disable: PreparedCall
    enable: PreparedCall


class ChannelSwitch:
    def __init__(self, found: Sequence[Found]) -> None:
        self.found = tuple(found)
        self._batches = [
            _make_batch(ResourceManager(f.file), part)
            for f in self.found
            for part in _split(f.channels, abi.MAX_CHANNELS_PER_CALL)
        ]
        self._slices_before: dict[tuple[int, int], int] = {}

    def check(self) -> None:
        """Raise unless every handle still names a channel and the driver takes our calls. Stops nothing."""
        for batch in self._batches:
            client = batch.channels.client
            if batch.manager.find(client, client, HandleInfo.CLASS) not in abi.ROOT_CLASSES:
                raise RouteNotPermitted(
                    f"client 0x{client:x} cannot be reached through this open file: the driver ties a client to the "
                    "file it was made on; have the owner pass its descriptor"
                )
            for channel in batch.channels.channels:
                if batch.manager.find(client, channel, HandleInfo.CLASS) not in abi.CHANNEL_CLASSES:
                    raise StaleHandles(f"0x{channel:x} of client 0x{client:x} is no channel (any more): scan again")
            batch.enable.issue()

    def disable(self) -> None:
        """Return when no channel is on the hardware. On an error some may be off: the caller must enable again."""
        try:
            for batch in self._batches:
                batch.disable.issue()
        except RouteNotPermitted as error:  # it was permitted at check(): the client has been freed since
            raise StaleHandles("the CUDA context these channels belong to is gone: open a new gate") from error

    def enable(self) -> None:
        """Enable every channel that still exists. A failing batch never keeps the others from being tried."""
        errors = [error for batch in self._batches for error in _enable_batch(batch)]
        if errors:
            raise errors[0]

    def set_time_slice(self, microseconds: int) -> None:
        """Give each group this time slice; the one it had is kept for `restore_time_slice`."""
        if not 1 <= microseconds <= MAX_TIME_SLICE_US:
            raise Refused(f"a time slice of {microseconds} us: choose 1 to {MAX_TIME_SLICE_US}")
        for manager, client, group in self._groups():
            if (client, group) not in self._slices_before:
                before = abi.TimesliceParams()
                manager.control(client, group, Command.GROUP_GET_TIMESLICE, before)
                self._slices_before[client, group] = before.microseconds
            params = abi.TimesliceParams(microseconds=microseconds)
            manager.control(client, group, Command.GROUP_SET_TIMESLICE, params)

    def restore_time_slice(self) -> None:
        for manager, client, group in self._groups():
            before = self._slices_before.pop((client, group), None)
            if before:
                params = abi.TimesliceParams(microseconds=before)
                manager.control(client, group, Command.GROUP_SET_TIMESLICE, params)

    def preempt(self) -> None:
        """Take each group off the hardware once. Always waits: a second call before the first ended is undefined."""
        for manager, client, group in self._groups():
            manager.control(client, group, Command.GROUP_PREEMPT, abi.PreemptParams(wait=1))

    def close(self) -> None:
        for found in self.found:
            found.file.close()

    def _groups(self) -> list[tuple[ResourceManager, int, int]]:
        return [(ResourceManager(f.file), f.channels.client, group) for f in self.found for group in f.channels.groups]


def _split(channels: ChannelSet, size: int) -> list[ChannelSet]:
    return [
        ChannelSet(channels.client, channels.subdevice, channels.groups, channels.channels[start : start + size])
        for start in range(0, len(channels.channels), size)
    ]


def _make_batch(manager: ResourceManager, channels: ChannelSet) -> _Batch:
    return _Batch(manager, channels, _call(manager, channels, disable=1), _call(manager, channels, disable=0))


def _call(manager: ResourceManager, channels: ChannelSet, disable: int) -> PreparedCall:
    params = abi.DisableChannelsParams(disable=disable, num_channels=len(channels.channels))
    for i, channel in enumerate(channels.channels):
        params.clients[i] = channels.client
        params.channels[i] = channel
    return manager.prepare(channels.client, channels.subdevice, Command.FIFO_DISABLE_CHANNELS, params)


def _enable_batch(batch: _Batch) -> list[NvDriverError]:
    """Enable a batch; if a channel of it is gone, enable the others one by one."""
    try:
        batch.enable.issue()
    except (StaleHandles, RouteNotPermitted):
        singles = _split(batch.channels, 1)
        return [error for single in singles for error in _enable_single(batch.manager, single)]
    except NvDriverError as error:
        return [error]
    return []


def _enable_single(manager: ResourceManager, single: ChannelSet) -> list[NvDriverError]:
    """Enable one channel. That it is gone is no error, but the driver must say so twice."""
    try:
        _call(manager, single, disable=0).issue()
    except (StaleHandles, RouteNotPermitted) as error:
        still_there = manager.find(single.client, single.channels[0], HandleInfo.CLASS) is not None
        return [error] if still_there else []
    except NvDriverError as error:
        return [error]
    return []
