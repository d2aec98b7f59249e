"""The models an engine serves, as clients know them: names, context length, tokenizer; and the memory two of them share."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.build import BuiltModel, Memory, max_model_len, pages_in, plan_memory, weight_bytes
from engine.config import EngineConfig
from engine.demo import DEMO_NAMES, resolve_model
from engine.errors import InvalidCheckpoint, InvalidConfig
from engine.grammar import Grammars, load_tokenizer
from engine.memory.reserve import kept_slabs, make_reserve
from engine.spec import ModelSpec, load_spec
from engine.types import ModelCard, Tenant

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """One model. `config` is what its worker runs with."""

    card: ModelCard
    path: Path
    config: EngineConfig
    tokenizer: Tokenizer
    grammars: Grammars
    weight_bytes: int = 0  # 0: not known

    def is_called(self, name: str) -> bool:
        return name == self.card.id or name in self.card.aliases


@dataclass(frozen=True, slots=True)
class ServedModels:
    """The online model, perhaps an offline one, and the memory they run in.

    `one_worker`: the offline model is the online one by another name, and the same worker serves both in shared steps.
    """

    online: Served
    offline: Served | None
    memory: Memory
    one_worker: bool = False

    @property
    def weight_bytes(self) -> dict[str, int]:
        """By model, where it is known; weights that two names share are the online model's."""
        own = (self.online,) if self.offline is None or self.one_worker else (self.online, self.offline)
        return {served.card.id: served.weight_bytes for served in own if served.weight_bytes}

    def find(self, name: str | None, tenant: Tenant | None) -> Served | None:
        """Who serves `name` (None: the tenant's own model) to the tenant.

        The offline model's process also serves its model's other name, if the tenant is offline and both are one model.
        """
        if name is None:
            found: Served | None = self.online
        else:
            found = next((served for served in (self.online, self.offline) if served and served.is_called(name)), None)
        if found is None or self.offline is None or tenant is not Tenant.OFFLINE:
            return found
        return self.offline if name is None or found.path == self.offline.path else found


def open_models(config: EngineConfig, *, progress: bool, tokenizer: Tokenizer | None = None) -> ServedModels:
    """Look at the checkpoints, without loading weights. An offline model that cannot be used is reported and left out.

    `tokenizer` is the online model's, if it is not to be its folder's.
    """
    path = resolve_model(config.model, progress=progress)
    spec = load_spec(path)
    other = _offline_checkpoint(config, progress)
    names = _names(config.model, config.served_model_name)
    if other is not None and config.sharing != "exclusive" and path.samefile(other[0]):
        memory = plan_memory(config, [spec])
        online = serve(replace(config, offline_model=None), path, spec, memory, names=names, tokenizer=tokenizer)
        return ServedModels(online, _by_another_name(config, online), memory, one_worker=True)
    memory = plan_memory(config, [spec] if other is None else [spec, other[1]])
    if other is None:
        return ServedModels(serve(config, path, spec, memory, names=names, tokenizer=tokenizer), None, memory)
    offline_config, config = config, replace(config, host_kv_memory=0)  # the offline worker has the host tier
    share = make_reserve(config.reserve, memory.num_slabs).fixed_share
    if share is not None:  # memory that online can never have must not be promised to a request
        pages = pages_in(config, spec, replace(memory, num_slabs=share))
        config = replace(config, max_model_len=max_model_len(config, spec, pages))
    online = serve(config, path, spec, memory, names=names, tokenizer=tokenizer)
    return ServedModels(online, _serve_offline(offline_config, online, *other, memory), memory)


def serve_built(built: BuiltModel, config: EngineConfig, tokenizer: Tokenizer | None) -> ServedModels:
    """A model that the caller built: for tests and benchmarks with a runner of their own."""
    page = config.page_size
    length = min(config.max_model_len or built.spec.max_position, built.num_slabs * built.pages_per_slab * page)
    names = config.served_model_name or (built.path.name,)
    card = ModelCard(
        id=names[0], aliases=names[1:], tenant=Tenant.ONLINE, max_model_len=length, vocab_size=built.spec.vocab_size, created=0
    )
    words = tokenizer or load_tokenizer(built.path)
    grammars = Grammars(lambda: words, built.spec.vocab_size, built.spec.eos_ids)
    return ServedModels(Served(card, built.path, config, words, grammars), None, Memory(built.num_slabs, 1))


def serve(
    config: EngineConfig,
    path: Path,
    spec: ModelSpec,
    memory: Memory,
    *,
    names: tuple[str, ...] = (),
    tenant: Tenant = Tenant.ONLINE,
    tokenizer: Tokenizer | None = None,
) -> Served:
    """A model with its names (default: its folder's) and its tokenizer (default: the folder's)."""
    from engine.tokenizer import Tokenizer

    names = names or (path.name,)
    card = ModelCard(
        id=names[0],
        aliases=names[1:],
        tenant=tenant,
        max_model_len=max_model_len(config, spec, pages_in(config, spec, memory)),
        vocab_size=spec.vocab_size,
        created=int(time.time()),  # noqa: TID251 - a stamp for clients
    )
    words = tokenizer or Tokenizer.load(path)
    grammars = Grammars(lambda: words, spec.vocab_size, spec.eos_ids)
    return Served(card, path, config, words, grammars, weight_bytes(config, spec))


def _names(model: str, served: tuple[str, ...]) -> tuple[str, ...]:
    """Names under which clients reach a model, the first one being its id."""
    if served:
        return served
    return DEMO_NAMES if model in DEMO_NAMES else (Path(model).expanduser().resolve().name,)


def _offline_checkpoint(config: EngineConfig, progress: bool) -> tuple[Path, ModelSpec] | None:
    if config.offline_model is None:
        return None
    try:
        path = resolve_model(config.offline_model, progress=progress)
        return path, load_spec(path)
    except (InvalidConfig, InvalidCheckpoint) as error:
        logger.error("serving without the offline model %r: %s", config.offline_model, error)
        return None


def _offline_names(config: EngineConfig, online: Served) -> tuple[str, ...]:
    assert config.offline_model is not None
    if config.offline_served_model_name is not None:
        names: tuple[str, ...] = (config.offline_served_model_name,)
    else:
        names = tuple(name for name in _names(config.offline_model, ()) if not online.is_called(name))
        names = names or (f"{_names(config.offline_model, ())[0]}-offline",)
    if online.is_called(names[0]):
        raise InvalidConfig(f"--offline-served-model-name {names[0]!r} is the online model's name; choose another")
    return names


def _by_another_name(config: EngineConfig, online: Served) -> Served:
    """The online model as the offline tenant's."""
    names = _offline_names(config, online)
    return replace(online, card=replace(online.card, id=names[0], aliases=names[1:], tenant=Tenant.OFFLINE))


def _serve_offline(config: EngineConfig, online: Served, path: Path, spec: ModelSpec, memory: Memory) -> Served:
    names = _offline_names(config, online)
    # What online keeps for its reserve and its cached prefixes is not there for the longest offline request.
    available = memory.num_slabs - kept_slabs(config.reserve, memory.num_slabs, config.online_cache_share)
    assert config.offline_model is not None
    least = pages_in(config, spec, Memory(max(1, available), memory.slab_bytes))
    longest = min(spec.max_position, least * config.page_size)
    offline = replace(config, model=config.offline_model, offline_model=None, max_model_len=longest)
    return serve(offline, path, spec, memory, names=names, tenant=Tenant.OFFLINE)
