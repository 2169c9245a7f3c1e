"""What tests of several methods share."""

from collections.abc import Callable
from functools import partial

import pytest
import torch


@pytest.fixture(
    params=[
        "traced",
        # To generate code takes half a minute for each method; the classifiers' is generated in every run of the tests.
        pytest.param("inductor", marks=pytest.mark.slow),
    ]
)
def compiler(request, monkeypatch) -> str:
    """Updates are compiled by PyTorch's own compiler, or traced, differentiated and split by it, and run as that."""
    if request.param == "traced":
        compiled: Callable = partial(torch.compile, backend="aot_eager_decomp_partition")
        monkeypatch.setattr(torch, "compile", compiled)
    return request.param
