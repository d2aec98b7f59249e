"""The law of the code base: what may import what, what may appear where, and how large a file may grow.

Everything is read from the sources with `ast`, so imports inside functions and under TYPE_CHECKING count. Each exception
stands in a table of this file with its reason; a rule without an exception table has none.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "server", "nvdriver")

# Which layer a module lives in. A name stands for itself and, if it is a package, for all that is in it; the longest match
# decides. A module may import its own layer (without cycles) and those below, never those above.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("engine.types", "engine.config", "engine.errors", "engine.clock", "nvdriver"),
    (
        "engine.memory",
        "engine.kernels",
        "engine.spec",
        "engine.chat_template",
        "engine.tokenizer",
        "engine.grammar",
        "engine.demo",
    ),
    ("engine.model", "engine.weights", "engine.sched"),
    ("engine.forward", "engine.runner", "engine.fake", "engine.timeline"),
    ("engine.core", "engine.colocate.arbiter", "engine.colocate.control", "engine.colocate.gate"),
    (
        *("engine.build", "engine.loop", "engine.doctor", "engine.colocate"),
        *("engine.served", "engine.backlog", "engine.generation", "engine.stats", "engine.engine"),
    ),
    ("engine",),  # the package's own __init__: the public names
    (
        *("engine.wire", "engine.formats", "engine.tools", "engine.tool_calls"),
        *("engine.replies", "engine.calls", "engine.openai"),
        *("engine.joblines", "engine.joblog", "engine.jobrun", "engine.jobclient", "engine.batch", "engine.top"),
    ),
    ("server",),
    ("engine.server",),  # the guarded entry; nothing is above it, so nothing imports it
)

# Packages that must stay strangers although their layers would let them meet: (importer, imported).
STRANGERS = (
    ("engine.memory", "engine.kernels"),
    ("engine.kernels", "engine.memory"),
    ("engine.sched", "engine.kernels"),
    ("engine.sched", "engine.model"),
    ("engine.core", "engine.runner"),
    ("engine.core", "engine.model"),
    ("engine.colocate", "engine.engine"),
    ("engine.batch", "server"),
)
ALLOWED_MEETINGS: dict[tuple[str, str], str] = {}  # (importing module, imported module): why

# What server/ knows of the engine.
ENGINE_AS_SEEN_BY_SERVER = frozenset(
    {
        "engine",
        "engine.calls",
        "engine.clock",
        "engine.colocate.exclusive",  # the type of its statistics
        "engine.config",
        "engine.engine",
        "engine.errors",
        "engine.joblines",
        "engine.joblog",
        "engine.jobrun",
        "engine.memory.host_copies",  # the type of its statistics
        "engine.openai",
        "engine.replies",
        "engine.stats",
        "engine.timeline",
        "engine.types",
        "engine.wire",
    }
)

# Files that may say torch.cuda, triton, flashinfer or cuda; other files import them inside functions only.
CUDA_FILES = (
    "engine/kernels/triton_*.py",
    "engine/kernels/cuda*.py",
    "engine/kernels/flashinfer*.py",
    "engine/memory/cuda*.py",
    "engine/colocate/cuda*.py",
)
CUDA_PACKAGES = frozenset({"triton", "flashinfer", "cuda", "cupy", "pynvml"})

# Modules that turn bytes into behaviour.
UNSAFE_IMPORTS = frozenset({"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"})
UNSAFE_CALLS = frozenset({"eval", "exec"})
UNSAFE_NAMES = {
    "torch.load": "unpickles",
    "torch.hub": "runs downloaded code",
    "jinja2.Environment": "templates come from checkpoints: use jinja2.sandbox",
    "jinja2.environment.Environment": "templates come from checkpoints: use jinja2.sandbox",
    "jinja2.Template": "renders without a sandbox",
    "yaml.load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
}
UNSAFE_ALLOWED: dict[tuple[str, str], str] = {  # (file, name): why
    ("engine/chat_template.py", "jinja2.Template"): "a type annotation; the template comes from the sandboxed environment",
}

ENVIRON_FILES = {
    "engine/config.py": "the one place that reads Sluice's own variables",
    "nvdriver/api.py": "knows nobody, so it looks for MPS itself",
}

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[tuple[str, str], str] = {
    ("engine/kernels/triton_attend.py", "attend_kernel"): "a Triton kernel is one function: helpers cannot carry its state",
}

# What importing (or running with these arguments) must not load.
NO_TORCH = {
    "engine.core": (),
    "engine.fake": (),
    "engine.memory.manager": (),
    "engine.sched.scheduler": (),
    "engine.engine": (),
    "server.cli": ("--help",),
    "engine.batch": ("--help",),
    "engine.top": ("--help",),
    "engine.doctor": ("--help",),
}
HEAVY = ("torch", "numba", "triton", "transformers", "tokenizers")
OPTIONAL = frozenset({"triton", "flashinfer", "cuda"})  # a module that needs one is skipped where it is not installed


# -- reading the sources


@dataclass(frozen=True)
class Source:
    """One Python file: `path` from the root, `module` its dotted name."""

    path: str
    module: str
    tree: ast.Module
    lines: int


@functools.cache
def sources(*roots: str) -> tuple[Source, ...]:
    found = []
    for root in roots:
        for file in sorted((ROOT / root).rglob("*.py")):
            path = file.relative_to(ROOT)
            parts = path.with_suffix("").parts
            text = file.read_text(encoding="utf-8")
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Source(path.as_posix(), module, ast.parse(text, path.as_posix()), text.count("\n")))
    return tuple(found)


def modules() -> dict[str, Source]:
    return {source.module: source for source in sources(*PACKAGES)}


def covers(name: str, module: str) -> bool:
    return module == name or module.startswith(name + ".")


def layer_of(module: str) -> int | None:
    """The layer of the longest name that covers `module`. `engine` covers only itself: its modules are listed one by one."""
    rows = [(name, layer) for layer, names in enumerate(LAYERS) for name in names if covers(name, module)]
    rows = [(name, layer) for name, layer in rows if name != "engine" or module == "engine"]
    return max(rows, key=lambda row: len(row[0]))[1] if rows else None


def imported_names(node: ast.AST) -> list[str]:
    """Dotted names that an import statement brings in: `from a import b` is a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}: write the whole name"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@functools.cache
def own_imports(module: str) -> tuple[tuple[str, int], ...]:
    """(module of ours, line) for each import in `module`, wherever in the file it stands."""
    known, found = modules(), []
    for node in ast.walk(known[module].tree):
        for name in imported_names(node):
            if not name.startswith(PACKAGES):
                continue
            target = name if name in known else name.rpartition(".")[0]
            if target in known and target != module:
                found.append((target, getattr(node, "lineno", 0)))
    return tuple(found)


def all_own_imports() -> Iterator[tuple[Source, str, int]]:
    for module, source in modules().items():
        for target, line in own_imports(module):
            yield source, target, line


def spelled_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every dotted name in a file, `import x as y` undone: ("torch.cuda.Event", line)."""
    alias_of: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias, name in zip(node.names, imported_names(node), strict=True):
                yield name, node.lineno
                if isinstance(node, ast.ImportFrom) or alias.asname:
                    alias_of[alias.asname or alias.name] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            parts: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([alias_of.get(inner.id, inner.id), *reversed(parts)]), node.lineno


def is_cuda_file(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in CUDA_FILES)


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(sorted(set(problems)))


# -- imports


def test_every_module_has_a_layer() -> None:
    report(
        [
            f"{source.path} has no layer: add {module} to LAYERS in {Path(__file__).name}, in the lowest row whose modules "
            "(and those of the rows below) are all that it imports, and to the file map in docs/architecture.md"
            for module, source in modules().items()
            if layer_of(module) is None
        ]
    )


def test_every_name_in_the_table_exists() -> None:
    known = modules()
    report([f"LAYERS names {name}, which does not exist" for row in LAYERS for name in row if name not in known])


def test_imports_go_down() -> None:
    problems = []
    for source, target, line in all_own_imports():
        above, below = layer_of(source.module), layer_of(target)
        if above is not None and below is not None and below > above:
            problems.append(f"{source.path}:{line} (layer {above}) imports {target} (layer {below})")
    report(problems)


def test_no_cycles() -> None:
    graph = {module: {target for target, _ in own_imports(module)} for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def test_strangers_stay_strangers() -> None:
    report(
        [
            f"{source.path}:{line} imports {target}: {importer} and {imported} do not know each other"
            for source, target, line in all_own_imports()
            for importer, imported in STRANGERS
            if covers(importer, source.module) and covers(imported, target)
            if (source.module, target) not in ALLOWED_MEETINGS
        ]
    )


def test_server_knows_the_engines_public_names() -> None:
    report(
        [
            f"{source.path}:{line} imports {target}: server/ may import {', '.join(sorted(ENGINE_AS_SEEN_BY_SERVER))}"
            for source, target, line in all_own_imports()
            if covers("server", source.module) and covers("engine", target) and target not in ENGINE_AS_SEEN_BY_SERVER
        ]
    )


def test_nvdriver_needs_the_standard_library_only() -> None:
    problems = []
    for source in sources("nvdriver"):
        for node in ast.walk(source.tree):
            for name in imported_names(node):
                top = name.split(".")[0]
                if top != "nvdriver" and top not in sys.stdlib_module_names:
                    problems.append(f"{source.path}:{getattr(node, 'lineno', 0)} imports {name}")
    report(problems)


# -- what may appear where


def test_cuda_stays_in_cuda_files() -> None:
    problems = []
    for source in sources(*PACKAGES):
        if is_cuda_file(source.path):
            continue
        for name, line in spelled_names(source.tree):
            if covers("torch.cuda", name):
                problems.append(f"{source.path}:{line} says {name}; only {', '.join(CUDA_FILES)} may")
        for node in ast.walk(source.tree):
            for name in imported_names(node):
                if name.split(".")[0] in CUDA_PACKAGES:
                    problems.append(f"{source.path}:{getattr(node, 'lineno', 0)} imports {name}")
    report(problems)


def test_cuda_files_are_loaded_on_use() -> None:
    known, problems = modules(), []
    for module, source in known.items():
        if is_cuda_file(source.path):
            continue
        for node in source.tree.body:
            for name in imported_names(node):
                target = known.get(name) or known.get(name.rpartition(".")[0])
                if target is not None and is_cuda_file(target.path):
                    problems.append(f"{source.path}:{node.lineno} imports {target.module} when {module} is loaded")
    report(problems)


def test_nothing_turns_data_into_code() -> None:
    problems = []
    for source in sources(*PACKAGES, "bench", "examples"):
        for name, line in spelled_names(source.tree):
            reason = next((why for unsafe, why in UNSAFE_NAMES.items() if covers(unsafe, name)), None)
            if name.split(".")[0] in UNSAFE_IMPORTS:
                reason = "runs code out of data"
            allowed = any(path == source.path and covers(unsafe, name) for path, unsafe in UNSAFE_ALLOWED)
            if reason is not None and not allowed:
                problems.append(f"{source.path}:{line} {name}: {reason}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
                problems.append(f"{source.path}:{node.lineno} calls {node.func.id}")
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                problems.append(f"{source.path}:{node.value.lineno} passes {node.arg}")
    report(problems)


def test_the_environment_is_read_in_one_place() -> None:
    names = ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv")
    report(
        [
            f"{source.path}:{line} {name}: settings come from engine.config"
            for source in sources(*PACKAGES)
            if source.path not in ENVIRON_FILES
            for name, line in spelled_names(source.tree)
            if any(covers(each, name) for each in names)
        ]
    )


# -- sizes and places


def test_files_and_functions_stay_short() -> None:
    problems = []
    for source in sources(*PACKAGES, "bench", "tests", "examples"):
        if source.lines > MAX_FILE_LINES and source.path not in LONG_FILES:
            problems.append(f"{source.path} has {source.lines} lines, at most {MAX_FILE_LINES} are read with pleasure")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES and (source.path, node.name) not in LONG_FUNCTIONS:
                    problems.append(f"{source.path}:{node.lineno} {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    report(problems)


def test_every_file_says_what_it_owns() -> None:
    report(
        [
            f"{s.path} has no docstring"
            for s in sources(*PACKAGES, "bench", "examples")
            if s.tree.body and not ast.get_docstring(s.tree)
        ]
    )


def test_tests_are_not_packages() -> None:
    """A tests/engine/__init__.py would hide the package engine."""
    report([f"remove {path.relative_to(ROOT)}" for path in (ROOT / "tests").rglob("__init__.py")])


def test_test_files_have_unique_names() -> None:
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [path.name for path in paths]
    report([f"{path.relative_to(ROOT)}: the name is taken" for path in paths if names.count(path.name) > 1])


def test_exceptions_are_still_needed() -> None:
    """A table of exceptions that nothing needs any more is a hole in the law."""
    all_sources = {source.path: source for source in sources(*PACKAGES, "bench", "tests", "examples")}
    problems = [
        f"LONG_FILES: {path}" for path in LONG_FILES if path not in all_sources or all_sources[path].lines <= MAX_FILE_LINES
    ]
    long = {
        (path, node.name)
        for path, source in all_sources.items()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    problems += [f"LONG_FUNCTIONS: {entry}" for entry in LONG_FUNCTIONS if entry not in long]
    problems += [f"UNSAFE_ALLOWED: {path}" for path, _ in UNSAFE_ALLOWED if path not in all_sources]
    problems += [f"ENVIRON_FILES: {path}" for path in ENVIRON_FILES if path not in all_sources]
    meetings = {(source.module, target) for source, target, _ in all_own_imports()}
    problems += [f"ALLOWED_MEETINGS: {pair}" for pair in ALLOWED_MEETINGS if pair not in meetings]
    report(problems)


# -- importing for real

# Reads module names, preloads what they need from elsewhere, then imports each in a fork of its own with warnings as errors.
_IMPORT_EACH = """
import importlib, json, os, sys, warnings
preload, wanted = json.loads(sys.argv[1])
for name in preload:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
assert not set(sys.modules) & {"engine", "server", "nvdriver"}
for name in wanted:
    sys.stdout.flush()
    if os.fork() == 0:
        warnings.simplefilter("error")
        problem, missing = "", ""
        try:
            importlib.import_module(name)
        except BaseException as error:
            problem, missing = f"{type(error).__name__}: {error}", getattr(error, "name", "") or ""
        print(json.dumps([name, problem, missing]), flush=True)
        os._exit(0)
    os.wait()
"""


@functools.cache
def import_results() -> dict[str, tuple[str, str]]:
    """module -> (what went wrong, the module that was missing), each imported with none of ours loaded before it."""
    preload = ["torch", "torch.nn.functional", "numba", "triton", "triton.language", "numpy", "aiohttp.web", "psutil"]
    wanted = sorted(modules())
    argv = [sys.executable, "-c", _IMPORT_EACH, json.dumps([preload, wanted])]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (problem, missing) for name, problem, missing in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_alone_without_a_warning(module: str) -> None:
    problem, missing = import_results().get(module, ("the interpreter died", ""))
    if missing.split(".")[0] in OPTIONAL:
        pytest.skip(f"{missing} is not installed")
    assert not problem


@pytest.mark.parametrize("module", NO_TORCH)
def test_loads_without_torch(module: str) -> None:
    """Decisions are made with integers, and `--help` answers at once."""
    argv = NO_TORCH[module]
    run = (
        f"sys.argv = [{module!r}, *{argv!r}]\ntry: target.main()\nexcept SystemExit as end: assert not end.code" if argv else ""
    )
    code = f"import sys\nimport {module}\ntarget = sys.modules[{module!r}]\n{run}\n"
    code += f"print('\\nloaded:', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]
