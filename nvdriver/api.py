"""The one public entry: `open_gate` returns a ChannelGate that was checked, or says in words why there is none.

    with open_gate() as gate:               # in the process that owns the CUDA context
        gate.freeze()
        with gate.remapping():
            ...                             # unmap, map the sink, set access
        gate.thaw()

Order of checks: MPS, driver release, channels, route. Nothing is stopped while opening.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nvdriver import abi
from nvdriver.device import Clock, DeviceFile, Host, LinuxHost, MonotonicClock, release_of
from nvdriver.errors import DriverUnavailable, MpsActive, NvDriverError, RouteNotPermitted
from nvdriver.gate import ChannelGate, GateOptions, Route, State
from nvdriver.grant import Grant, receive_grant, send_grant
from nvdriver.probe import ProbeReport, probe
from nvdriver.rm import ResourceManager
from nvdriver.scan import Found, ScanLimits, find_channels
from nvdriver.switch import ChannelSwitch

__all__ = [
    "ChannelGate",
    "DriverUnavailable",
    "GateOptions",
    "Grant",
    "ProbeReport",
    "Route",
    "ScanLimits",
    "State",
    "make_grant",
    "open_gate",
    "probe",
    "receive_grant",
    "send_grant",
]


def open_gate(
    grant: Grant | None = None,
    files: Sequence[DeviceFile] = (),
    *,
    beat: Callable[[], int] | None = None,
    options: GateOptions | None = None,
    host: Host | None = None,
    clock: Clock | None = None,
    environ: Mapping[str, str] | None = None,
) -> ChannelGate:
    """Open a gate by the route that the arguments name.

    * nothing: the channels of this process. Give `beat` (reads a word that the controller keeps changing) if another
      process decides about freezing; the gate then thaws when that process falls silent, even if it froze by itself.
    * `grant` and `files`, as received: the channels of the process that granted them. The gate owns the files, also if
      it cannot be opened.
    * `grant` alone: the same through our own open file, which a stock driver refuses (see README.md).

    Opening enables the channels, so never open a second gate on a context that another one holds frozen.
    Raises DriverUnavailable.
    """
    host = host or LinuxHost()
    options = options or GateOptions()
    try:
        _refuse_mps(os.environ if environ is None else environ)
        release = _checked_release(host)
        if grant is None:
            route, found = Route.IN_PROCESS, find_channels(host, options.scan, options.copy_engines)
        else:
            route, found = _granted(host, grant, files, release)
        switch = _checked_switch(found)
    except NvDriverError as error:
        for file in files:
            file.close()
        if isinstance(error, DriverUnavailable):
            raise
        raise DriverUnavailable(f"channel control cannot be opened: {error}") from error
    owner = host.peer(grant.pid) if grant is not None else None
    return ChannelGate(switch, host, clock or MonotonicClock(), route, options, beat, owner)


def make_grant(gate: ChannelGate, host: Host | None = None) -> tuple[Grant, list[DeviceFile]]:
    """What the owner sends so that another process may freeze it. Keep `gate` open, with a `beat`: it is the guard.

    The files belong to the gate; send them, do not close them.
    """
    host = host or LinuxHost()
    if gate.route is not Route.IN_PROCESS:
        raise RouteNotPermitted("only the process that owns the channels may grant them: call this over there")
    found = gate.switch.found
    grant = Grant(host.pid(), host.uid(), _checked_release(host), tuple(f.channels for f in found))
    return grant, [f.file for f in found]


def _refuse_mps(environ: Mapping[str, str]) -> None:
    control = Path(environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps") / "control"
    if control.exists():
        raise MpsActive(
            f"an MPS daemon serves {control.parent}: its clients share one GPU context, so freezing one tenant would "
            "freeze all; stop MPS, or point CUDA_MPS_PIPE_DIRECTORY at an empty directory"
        )


def _checked_release(host: Host) -> str:
    """The driver's release, from the version file or from the driver itself; raises if its branch is unknown to us."""
    file = host.open_control()
    try:
        text = host.version_text()
        release = release_of(text or ResourceManager(file).release())
    finally:
        file.close()
    abi.branch_of(release)
    return release


def _granted(host: Host, grant: Grant, files: Sequence[DeviceFile], release: str) -> tuple[Route, list[Found]]:
    if grant.uid != host.uid():
        raise RouteNotPermitted(f"the channels belong to user {grant.uid}: run both processes as the same user")
    if grant.release != release:
        raise RouteNotPermitted(f"the owner sees driver {grant.release}, we see {release}: run both on one machine")
    if files:
        return Route.PASSED_FD, [Found(file, channels) for file, channels in zip(files, grant.sets, strict=True)]
    return Route.CROSS_CLIENT, [Found(host.open_control(), channels) for channels in grant.sets]


def _checked_switch(found: Sequence[Found]) -> ChannelSwitch:
    try:
        switch = ChannelSwitch(found)
        switch.check()
    except NvDriverError:
        for f in found:
            f.file.close()
        raise
    return switch
