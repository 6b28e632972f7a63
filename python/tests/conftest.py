import os

import pytest
import torch

torch.set_num_threads(2)
# With ROUTEGRAD_TEST_DEVICE=cuda the tests of the operators create their tensors on a GPU, and therefore run there.
DEVICE = os.environ.get("ROUTEGRAD_TEST_DEVICE", "cpu")
torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
