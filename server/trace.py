"""The timeline as Chrome-trace JSON, which Perfetto and chrome://tracing open: owners, gate, events, memory.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format); times in
microseconds. Complete events (`X`) of one track never overlap here, and stand in the order of their start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.timeline import PARTS, Served, Span, Timeline

Json = dict[str, Any]

_DEVICE, _REQUESTS = 1, 2  # "processes" of the trace
_TRACKS = {"online": 1, "offline": 2, "offline model": 3, "gate": 4}


def chrome_trace(timeline: Timeline, seconds: float) -> Json:
    """What the timeline holds of the last `seconds`."""
    now = timeline.clock.now()
    since = now - seconds
    events = [_named("process_name", _DEVICE, 0, "device")]
    events += [_named("process_name", _REQUESTS, 0, "requests")]
    events += [_named("thread_name", _DEVICE, track, name) for name, track in _TRACKS.items()]
    spans: list[Json] = []
    spans += _own(span for span in timeline.steps.since()[0] if span.end >= since)
    spans += [_complete("offline model", _name(span), span) for span in timeline.offline_steps.since()[0] if span.end >= since]
    spans += [_complete("gate", "closing", span) for span in timeline.switches.since()[0] if span.end >= since]
    spans += [_frozen(start, end) for start, end in timeline.holds(now) if end >= since]
    events += sorted(spans, key=lambda event: event["ts"])
    for event in timeline.events()[0]:
        if event.at >= since:
            instant = {"ph": "i", "name": event.kind, "s": "p", "pid": _DEVICE, "tid": _TRACKS["gate"], "ts": _us(event.at)}
            events.append(instant | {"cat": "event", "args": {"cause": event.cause, **event.cost}})
    for memory in timeline.memory.since()[0]:
        if memory.at >= since:
            shares = {"online": memory.online, "offline": memory.offline, "cached": memory.cached}
            events.append({"ph": "C", "name": "KV memory", "pid": _DEVICE, "tid": 0, "ts": _us(memory.at), "args": shares})
    for number, served in enumerate(timeline.served.since()[0]):
        if served.last >= since:
            events += _request(served, number)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"producer": "sluice", "seconds": seconds}}


def _own(spans: Iterable[Span]) -> list[Json]:
    """The engine's own steps, on the track of each tenant that had a share of them."""
    events = []
    for span in spans:
        if span.online_prefill or span.online_decode:
            events.append(_complete("online", _name(span), span))
        if span.offline_prefill or span.offline_decode:
            events.append(_complete("offline", _name(span), span))
    return events


def _name(span: Span) -> str:
    """What a step was, by what it computed most of."""
    parts = [part for part, tokens in zip(PARTS, span.parts, strict=True) if tokens]
    name = parts[0].replace("_", " ") if len(parts) == 1 else "mixed"
    return name + (" (parked)" if span.cut else "")


def _complete(track: str, name: str, span: Span) -> Json:
    args = {part: tokens for part, tokens in zip(PARTS, span.parts, strict=True) if tokens}
    return {
        "ph": "X",
        "name": name,
        "cat": track,
        "pid": _DEVICE,
        "tid": _TRACKS[track],
        "ts": _us(span.start),
        "dur": max(0, _us(span.end) - _us(span.start)),
        "args": args | {"rows": span.rows},
    }


def _frozen(start: float, end: float) -> Json:
    return _complete("gate", "closed", Span(start, end - start))


def _request(served: Served, number: int) -> list[Json]:
    """The stages of a request, nested in it. Requests overlap, so these are asynchronous events with a number of their own."""
    stages = (
        (f"{served.tenant} {served.id}", served.submitted, served.last),
        ("queue", served.submitted, served.admitted),
        ("prefill", served.admitted, served.first),
        ("decode", served.first, served.last),
    )
    common = {"cat": "request", "id": number, "pid": _REQUESTS, "tid": 0}
    return [
        {"ph": phase, "name": name, "ts": _us(at)} | common
        for name, start, end in stages
        for phase, at in (("b", start), ("e", max(start, end)))
    ]


def _named(kind: str, pid: int, tid: int, name: str) -> Json:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
