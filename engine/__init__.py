"""Sluice's public names, loaded on first use (PEP 562): `import engine.sched` brings no torch, and `--help` is instant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.generation import Generation
    from engine.types import Choice, Completion, Delta, FinishReason, Grammar, SamplingParams, Tenant, Usage

_HOME = {
    "Choice": "engine.types",
    "Completion": "engine.types",
    "Delta": "engine.types",
    "Engine": "engine.engine",
    "EngineConfig": "engine.config",
    "FinishReason": "engine.types",
    "Generation": "engine.generation",
    "Grammar": "engine.types",
    "SamplingParams": "engine.types",
    "Tenant": "engine.types",
    "Usage": "engine.types",
}

__all__ = [
    "Choice",
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "Generation",
    "Grammar",
    "SamplingParams",
    "Tenant",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
