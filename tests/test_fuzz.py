"""A moment of the fuzzer. `make fuzz` runs it for minutes."""

from hypothesis import given, settings

from tests.fuzz import BODIES, check_body, fuzz_bodies, fuzz_service


@settings(deadline=None)
@given(BODIES)
def test_generated_body_is_accepted_or_rejected_as_invalid(body: bytes) -> None:
    assert check_body(body) in ("accepted", "invalid_json", "invalid_request")


def test_mutated_body_is_accepted_or_rejected_as_invalid() -> None:
    assert set(fuzz_bodies(5000, seed=1)) == {"accepted", "invalid_json", "invalid_request"}


async def test_mutated_request_gets_a_documented_response() -> None:
    counts = await fuzz_service(400, seed=1)
    assert {"200", "server 400", "404", "405", "415", "422"} <= set(counts)
