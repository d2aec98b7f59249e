"""Find the channels of the CUDA contexts of *this* process, after the fact and without a hook.

The driver answers CLIENT_GET_HANDLE_INFO only for clients made through the asking open file, so walking our own
descriptors can only ever find our own objects. Nothing is changed by looking.

Clients: handles come from a counter that runs modulo 2^20 over all processes (open-gpu-kernel-modules 595,
rs_server.c), so on a machine that has been up for long ours may be anywhere. A client made now marks the counter's
place, and the ones our context made are a little way behind it: search backwards from there.
Objects: libcuda numbers its own from 0x5c000000; the numbers vary between releases and are never assumed.
"""

from dataclasses import dataclass

from nvdriver import abi
from nvdriver.abi import HandleInfo
from nvdriver.device import DeviceFile, Host
from nvdriver.errors import NoChannels
from nvdriver.rm import ResourceManager


@dataclass(frozen=True, slots=True)
class ChannelSet:
    """Channels of one client on one device: what one subdevice can stop."""

    client: int
    subdevice: int
    groups: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScanLimits:
    """How far to look; a probe costs a few microseconds."""

    clients: int = 0x10000
    objects: int = 0x4000


@dataclass(frozen=True, slots=True)
class _Object:
    handle: int
    parent: int
    object_class: int


@dataclass(frozen=True, slots=True)
class Found:
    """A set of channels and a descriptor of the open file that owns them; whoever takes it closes it."""

    file: DeviceFile
    channels: ChannelSet


def find_channels(host: Host, limits: ScanLimits, copy_engines: bool = False) -> list[Found]:
    """Every set of compute channels of this process; copy channels too if asked for."""
    newest = _newest_client(host)
    found: dict[tuple[int, int], Found] = {}  # by client and subdevice: two descriptors may share one open file
    num_channels = 0
    for file in host.own_control_files():
        try:
            manager = ResourceManager(file)
            for client in _clients(manager, newest, limits):
                objects = _objects(manager, client, limits)
                num_channels += sum(o.object_class in abi.CHANNEL_CLASSES for o in objects)
                for channels in _channel_sets(client, objects, copy_engines):
                    if (client, channels.subdevice) not in found:
                        found[client, channels.subdevice] = Found(file.duplicate(), channels)
        finally:
            file.close()
    if not found:
        raise NoChannels(_nothing_found(num_channels))
    return list(found.values())


def _nothing_found(num_channels: int) -> str:
    if num_channels:
        return f"{num_channels} channels found, none with a compute object: run one kernel first, or widen ScanLimits"
    return "this process holds no GPU channel: create the CUDA context and run one kernel before opening the gate"


def _newest_client(host: Host) -> int:
    file = host.open_control()
    try:
        return ResourceManager(file).make_client()
    finally:
        file.close()


def _clients(manager: ResourceManager, newest: int, limits: ScanLimits) -> list[int]:
    """Clients of this open file, newest first. A file has one as a rule, but nothing promises it."""
    place = newest - abi.CLIENT_HANDLE_BASE
    handles = (
        abi.CLIENT_HANDLE_BASE + (place - back) % abi.CLIENT_HANDLE_COUNT
        for back in range(1, min(limits.clients, abi.CLIENT_HANDLE_COUNT))
    )
    return [handle for handle in handles if manager.find(handle, handle, HandleInfo.CLASS) in abi.ROOT_CLASSES]


def _objects(manager: ResourceManager, client: int, limits: ScanLimits) -> list[_Object]:
    objects = []
    for handle in range(abi.OBJECT_HANDLE_BASE, abi.OBJECT_HANDLE_BASE + limits.objects):
        object_class = manager.find(client, handle, HandleInfo.CLASS)
        if object_class is None:
            continue
        parent = manager.find(client, handle, HandleInfo.PARENT)
        if parent is not None:
            objects.append(_Object(handle, parent, object_class))
    return objects


def _channel_sets(client: int, objects: list[_Object], copy_engines: bool) -> list[ChannelSet]:
    """Sort a client's objects into one set a device. A group is a compute group if a channel of it computes."""
    by_handle = {o.handle: o for o in objects}
    channels = [o for o in objects if o.object_class in abi.CHANNEL_CLASSES]
    computing = {o.parent for o in objects if o.object_class in abi.COMPUTE_CLASSES}
    groups = {
        channel.parent: by_handle[channel.parent].parent
        for channel in channels
        if by_handle.get(channel.parent, channel).object_class == abi.CHANNEL_GROUP
        and (copy_engines or any(c.handle in computing for c in channels if c.parent == channel.parent))
    }
    sets = []
    for subdevice in (o for o in objects if o.object_class == abi.SUBDEVICE):
        here = tuple(sorted(group for group, device in groups.items() if device == subdevice.parent))
        members = tuple(sorted(c.handle for c in channels if c.parent in here))
        if members:
            sets.append(ChannelSet(client, subdevice.handle, here, members))
    return sets
