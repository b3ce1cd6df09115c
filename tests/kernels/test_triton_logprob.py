"""The kernels over the vocabulary, under Triton's interpreter."""

from collections.abc import Callable

import pytest


@pytest.mark.triton
@pytest.mark.parametrize("name", ["logprob", "linear_logprob", "linear_policy_loss"])
def test_under_the_interpreter(run_interpreted: Callable[[str], None], name: str) -> None:
    run_interpreted(name)
