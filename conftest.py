"""What every test may ask for from outside the repository: the real model and the test data.

The built-in model is fetched into the user's cache when a test run starts, and tests find its path
in ROOFLINE_TEST_GGUF. Set that variable to the path of a copy to use that, or to nothing to do
without.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: threads that wait in a loop for each other crawl on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before Triton is imported: without a GPU its interpreter runs the kernels.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
from huggingface_hub import constants

from roofline.errors import RooflineError
from roofline.models import hub
from tests.hub_server import Hub, serving

MODEL = "smollm2-135m"
MODEL_VARIABLE = "ROOFLINE_TEST_GGUF"
DATA_VARIABLE = "ROOFLINE_TEST_DATA"

hypothesis.settings.register_profile("busy", deadline=None)  # a pause of the machine is no failure
hypothesis.settings.load_profile("busy")

why_no_model = pytest.StashKey[str]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Put the built-in model's path into the environment before any test module reads it."""
    # A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    session.config.stash[why_no_model] = f"{MODEL_VARIABLE} is set to nothing"
    if MODEL_VARIABLE in os.environ or session.config.option.collectonly:
        return
    try:
        os.environ[MODEL_VARIABLE] = str(hub.resolve(MODEL).resolve())
    except RooflineError as error:
        session.config.stash[why_no_model] = error.message


@pytest.fixture(scope="session")
def smollm2_path(pytestconfig: pytest.Config) -> Path:
    """The built-in model's file."""
    path = os.environ.get(MODEL_VARIABLE)
    if not path:
        pytest.skip(pytestconfig.stash[why_no_model])
    return Path(path)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of data too large for the repository."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"{DATA_VARIABLE} is not set to the folder of test data")
    return Path(folder)


@pytest.fixture
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """An empty Hugging Face hub with an empty cache, for this process and those it starts."""
    home = tmp_path_factory.mktemp("hugging-face")
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            patch.delenv(name)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_ENDPOINT", server.endpoint)
        patch.setenv("HF_HOME", str(home))
        # The library has read its environment already.
        patch.setattr(constants, "ENDPOINT", server.endpoint)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HOME", str(home))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield server
