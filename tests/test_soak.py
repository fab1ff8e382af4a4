"""The soak, for a few seconds; `make soak` runs it whole."""

from tests.soak import soak


async def test_under_faults_at_random_nothing_is_lost_or_left() -> None:
    told = await soak(requests=400, connections=20, seconds=4, seed=1, patience=1.0)
    assert "400 chats" in told
