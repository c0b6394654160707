"""No test needs a network or a GPU. A test marked "gpu" is skipped where there is none."""

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Set before torch is imported: two test processes with two threads each would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """The directory of a small random model whose next-token distribution is far from uniform."""
    from tokenizer import Tokenizer
    from warm_start import make_tokenizer, new_model

    directory = tmp_path_factory.mktemp("base") / "model"
    make_tokenizer(directory)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = new_model(Tokenizer.from_pretrained(directory), hidden_size=32, num_layers=1)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)  # before that, all tokens are about equally likely
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_signals():
    """Starts with default handlers, and restores those that train.py replaces."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {signum: signal.signal(signum, signal.SIG_DFL) for signum in signals}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
