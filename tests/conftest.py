"""No test needs a network or a GPU; what needs a GPU skips by name without one."""

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: two processes of two threads would wait for each other

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """The directory of a small model, random enough that its answers differ: every step has something to learn."""
    from tokenizer import Tokenizer
    from warm_start import make_tokenizer, new_model

    directory = tmp_path_factory.mktemp("base") / "model"
    make_tokenizer(directory)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = new_model(Tokenizer.from_pretrained(directory), hidden_size=32, num_layers=1)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)  # as it begins, every token is equally likely
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
    """train.py takes over the signals of its process; this gives them back."""
    handlers = {
        signum: signal.getsignal(signum)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
