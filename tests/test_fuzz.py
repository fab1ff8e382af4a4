"""The fuzzer, for a moment; `make fuzz` runs it for minutes."""

from hypothesis import given, settings

from tests.fuzz import BODIES, check_body, fuzz_bodies, fuzz_service


@settings(deadline=None)
@given(BODIES)
def test_every_body_is_accepted_as_promised_or_refused_by_code(body: bytes) -> None:
    assert check_body(body) in ("accepted", "invalid_json", "invalid_request")


def test_every_mutated_body_is_accepted_as_promised_or_refused_by_code() -> None:
    assert set(fuzz_bodies(0.5, seed=1)) == {"accepted", "invalid_json", "invalid_request"}


async def test_every_answer_to_mutated_bytes_is_of_the_contract() -> None:
    counts = await fuzz_service(1.5, seed=1)
    assert {"200", "bare 400", "404", "405", "415", "422"} <= set(counts)
