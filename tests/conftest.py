"""Every test starts from a seed that its name decides, with torch's state as it found it."""

import zlib

import pytest
import torch


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own, set for torch; the same in every run, whatever else runs."""
    value = zlib.crc32(request.node.name.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def restored_threads():
    """torch's thread count as it was."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def one_thread(restored_threads):
    """torch's other threads idle by spinning, which costs more than small tensors are worth."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def settable_flags():
    """Importing torch.testing._internal forbids setting torch.backends.* for the whole process; no
    test may depend on whether another one has imported it."""
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
