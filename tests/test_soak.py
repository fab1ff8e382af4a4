"""The soak, for a few seconds; `make soak` runs it whole."""

import pytest

from tests.soak import Size, soak_here, soak_process

SIZE = Size(requests=400, connections=20, seconds=4, seed=1)


async def test_under_faults_at_random_nothing_is_lost_or_left() -> None:
    assert "400 chats" in await soak_here(SIZE, patience=1.0)


@pytest.mark.slow
async def test_in_a_process_of_its_own_it_ends_by_itself() -> None:
    assert "400 chats" in await soak_process(SIZE, patience=1.0)
