"""Lists as they travel: inside an object, which may grow other fields later."""

from typing import Annotated, Generic, TypeVar

from fastapi import Header, Query

from service.jobs import Topic, View

_Item = TypeVar("_Item")

MAX_COUNT = 2**53
"""The largest whole number that every JSON reader keeps exact."""

After = Annotated[int, Query(ge=0, le=MAX_COUNT, description="Only what has a greater `seq` than this.")]
LastEventId = Annotated[int | None, Header(ge=0, le=MAX_COUNT, description="Wins over `after`.")]
Types = Annotated[
    list[Topic] | None, Query(description="Only events of these types; may be repeated. `*` stands for all of them.")
]
Limit = Annotated[int, Query(ge=1, le=5000, description="At most this many.")]


class Items(View, Generic[_Item]):
    """What was found, in order."""

    items: tuple[_Item, ...]
