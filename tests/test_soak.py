"""A few seconds of the soak. `make soak` runs it in full."""

import pytest

from tests.soak import Size, soak_in_process, soak_subprocess

SIZE = Size(requests=400, connections=20, seconds=4, seed=1)


async def test_random_faults_lose_no_request_and_leak_nothing() -> None:
    assert "400 requests" in await soak_in_process(SIZE, timeout_seconds=3.0)


@pytest.mark.slow
async def test_process_exits_cleanly_after_random_faults() -> None:
    assert "400 requests" in await soak_subprocess(SIZE, timeout_seconds=3.0)
