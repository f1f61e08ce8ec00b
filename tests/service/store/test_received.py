from hypothesis import given, settings
from hypothesis import strategies as st

from service.store.received import Received

_BATCHES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=15)


@settings(deadline=None)
@given(batches=_BATCHES)
def test_ranges_are_the_set_of_numbers_that_arrived(batches: list[tuple[int, int]]) -> None:
    received = Received()
    arrived: set[int] = set()
    for first, size in batches:
        wanted = set(range(first, first + size))
        missing = [number for start, end in received.missing(first, first + size) for number in range(start, end)]
        assert missing == sorted(wanted - arrived)
        arrived |= wanted
        received = received.plus(first, first + size)
        assert {number for start, end in received.ranges for number in range(start, end)} == arrived
        gaps = zip(received.ranges, received.ranges[1:], strict=False)
        assert all(before[1] < after[0] for before, after in gaps)
        assert received.next_seq == next(number for number in range(100) if number not in arrived)
        assert Received.load(received.dump()) == received
