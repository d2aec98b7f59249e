"""The client side of the resource manager: one control call, prepared once and issued many times.

Owns marshalling, the allow-list, the translation of both results of a call (errno and status word), and retries. Every
command here may be repeated safely, so an interrupted call is issued again and a busy driver is asked twice.
"""

import ctypes

from nvdriver import abi
from nvdriver.abi import Command, HandleInfo, Record
from nvdriver.device import DeviceFile
from nvdriver.errors import TRANSIENT, Refused, Status, from_os_error, from_status

_MAX_INTERRUPTS = 8
_NO_SUCH_HANDLE = frozenset(
    {Status.INVALID_CLIENT, Status.INVALID_OBJECT, Status.INVALID_OBJECT_HANDLE, Status.OBJECT_NOT_FOUND}
)


def _ioctl(file: DeviceFile, request: int, record: Record, doing: str) -> None:
    """One ioctl, issued again when a signal cuts it short."""
    for attempt in range(_MAX_INTERRUPTS):
        try:
            return file.ioctl(request, record)
        except InterruptedError as error:
            if attempt == _MAX_INTERRUPTS - 1:
                raise from_os_error(error, doing) from error
        except OSError as error:
            raise from_os_error(error, doing) from error


class PreparedCall:
    """One control call with both its buffers built: issuing it is one ioctl. Not thread-safe; its user holds a lock."""

    def __init__(self, file: DeviceFile, client: int, target: int, command: int, params: Record) -> None:
        if command not in abi.PARAMS:
            raise Refused(
                f"control command 0x{command:x} is not on the allow-list of this package: it only stops, restarts and "
                "paces the channels of the calling process; never add runlists, clocks or resets"
            )
        if type(params) is not abi.PARAMS[Command(command)]:
            raise Refused(f"{Command(command).name} takes {abi.PARAMS[Command(command)].__name__}: pass that")
        if isinstance(params, abi.DisableChannelsParams):
            _check_disable(params)
        self._file = file
        self._params = params  # NOTE: the call holds only its address; this reference keeps it alive
        self._call = abi.ControlCall(
            client=client,
            object=target,
            command=command,
            params=ctypes.addressof(params),
            params_size=params.size(),
        )
        self._doing = Command(command).name

    def aim(self, client: int, target: int) -> None:
        self._call.client, self._call.object = client, target

    def run(self) -> int:
        """Run the call and return its status word; a busy driver is asked twice."""
        for _attempt in range(2):
            self._call.status = Status.OK
            _ioctl(self._file, abi.REQUEST_CONTROL, self._call, self._doing)
            if self._call.status not in TRANSIENT:
                break
        return self._call.status

    def issue(self) -> None:
        """Run the call; raise unless both the ioctl and the resource manager say it worked."""
        status = self.run()
        if status != Status.OK:
            raise from_status(status, self._doing)


def _check_disable(params: abi.DisableChannelsParams) -> None:
    """Refuse what the driver might accept but must never be asked."""
    if params.only_disable_scheduling or params.rewind_gp_put or params.preempt_event:
        raise Refused("leave scheduling-only, rewind and event of DISABLE_CHANNELS at 0: rewind drops queued work")
    if not 0 < params.num_channels <= abi.MAX_CHANNELS_PER_CALL:
        raise Refused(f"{params.num_channels} channels in one call: send 1 to {abi.MAX_CHANNELS_PER_CALL}")


class ResourceManager:
    """Control calls through one open file."""

    def __init__(self, file: DeviceFile) -> None:
        self.file = file
        self._question = abi.HandleInfoParams()
        self._lookup = self.prepare(0, 0, Command.CLIENT_GET_HANDLE_INFO, self._question)  # a scan asks many times

    def prepare(self, client: int, target: int, command: int, params: Record) -> PreparedCall:
        return PreparedCall(self.file, client, target, command, params)

    def control(self, client: int, target: int, command: int, params: Record) -> None:
        self.prepare(client, target, command, params).issue()

    def find(self, client: int, handle: int, question: HandleInfo) -> int | None:
        """The class or the parent of one object; None if this file has no such client or the client no such object."""
        self._question.object, self._question.index = handle, question
        self._lookup.aim(client, client)
        status = self._lookup.run()
        if status in _NO_SUCH_HANDLE:
            return None
        if status != Status.OK:
            raise from_status(status, "look up a handle")
        return self._question.data

    def release(self) -> str:
        """The driver release, asked of the driver itself."""
        call = abi.VersionCall(command=abi.VersionCall.QUERY)
        _ioctl(self.file, abi.REQUEST_VERSION, call, "ask the driver for its release")
        return call.text.decode("ascii", "replace")

    def make_client(self) -> int:
        """A client of our own. It holds nothing, can name nobody else's objects, and goes with the open file."""
        made = abi.AllocCall(object_class=abi.ROOT_CLIENT)
        _ioctl(self.file, abi.REQUEST_ALLOC, made, "make a client")
        if made.status != Status.OK:
            raise from_status(made.status, "make a client")
        return made.handle
