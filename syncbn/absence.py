"""Absence: who did not come to an exchange that failed, and where the others are, by what each leaves in the store."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from threading import Thread

import torch.distributed as dist
from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]  # public, yet not marked as exported

from syncbn.agreement import Exchange, name_ranks, where_ranks_are
from syncbn.errors import RanksMissing

ACCOUNTS_S = 2.0
"""How long a rank whose exchange failed waits for the others' accounts of where they are; seconds."""

_POLL_S = 0.02
_ADVICE = (
    "a rank that evaluates, has no more batches, skips a backward, died or is frozen never comes: look at its log; "
    "one that is only slow needs a larger timeout in init_process_group; destroy this process group, it is unusable now"
)


@dataclass(frozen=True)
class Account:
    """What a rank tells of an exchange that failed."""

    text: str
    """Of the `Exchange`."""
    waited_s: float
    num_collectives: int
    """That the rank has started in the group so far, this one included."""


def absence(process_group: ProcessGroup, exchange: Exchange, waited_s: float, error: RuntimeError) -> RanksMissing:
    """The error for an ``exchange`` that torch ended by ``error`` after ``waited_s``; takes at most `ACCOUNTS_S`.

    Each rank leaves its account in the group's store and reads those of the others; a rank without is missing.
    """
    own = Account(str(exchange), waited_s, _num_collectives(process_group))
    desk = _Desk(process_group, own)
    ranks = dist.get_process_group_ranks(process_group)
    accounts = {ranks[place]: account for place, account in desk.accounts().items()}
    missing = [rank for rank in ranks if rank not in accounts]
    silence = "" if desk.answered else " (the group's store does not answer; its host may be the one that is gone)"
    return RanksMissing(
        f"{_accusation(missing, accounts, own, error)}{silence}; {_whereabouts(accounts)}; {_ADVICE} [{_words(error)}]",
        layer=exchange.layer,
        ranks=missing or _late(accounts),
    )


def _accusation(missing: list[int], accounts: Mapping[int, Account], own: Account, error: RuntimeError) -> str:
    if missing and _is_timeout(error):
        return f"{name_ranks(missing)} did not come within {own.waited_s:.1f} s to the {own.text}"
    if missing:
        return f"the connection was lost in the {own.text}, and {name_ranks(missing)} left no word"
    return f"{name_ranks(_late(accounts))} did not come in time to the {_longest(accounts).text}"


def _whereabouts(accounts: Mapping[int, Account]) -> str:
    """Where those are that gave an account, and for how long they had waited."""
    places = where_ranks_are({rank: account.text for rank, account in accounts.items()})
    return f"{places} ({', '.join(_wait(rank, account) for rank, account in sorted(accounts.items()))})"


def _wait(rank: int, account: Account) -> str:
    return f"rank {rank} waited {account.waited_s:.1f} s in collective {account.num_collectives} of the group"


def _late(accounts: Mapping[int, Account]) -> list[int]:
    """Who was elsewhere than the rank that had waited longest, or came when that had waited half of its time."""
    longest = _longest(accounts)
    return [
        rank
        for rank, account in sorted(accounts.items())
        if account.text != longest.text or account.waited_s <= longest.waited_s / 2
    ]


def _longest(accounts: Mapping[int, Account]) -> Account:
    """The account of the rank that had waited longest, the same on every rank."""
    return max((account for _, account in sorted(accounts.items())), key=lambda account: account.waited_s)


class _Desk:
    """Where a rank leaves its account and finds those of others: the group's store, asked for `ACCOUNTS_S`."""

    def __init__(self, process_group: ProcessGroup, own: Account) -> None:
        self._process_group = process_group
        self._own = own
        self._accounts = {process_group.rank(): own}
        self.answered = False

    def accounts(self) -> dict[int, Account]:
        """Accounts by place in the group, this rank's included; those that could be had in time."""
        # In a thread, because a store whose host is frozen never answers and has no timeout for that.
        asking = Thread(target=self._ask, name="syncbn-accounts", daemon=True)
        asking.start()
        asking.join(ACCOUNTS_S)
        return dict(self._accounts)

    def _ask(self) -> None:
        deadline = time.monotonic() + ACCOUNTS_S
        try:
            # A connection of its own: nothing else of this process waits behind a store that does not answer.
            store: Store = self._process_group.get_group_store().clone()  # type: ignore[attr-defined]
            store.set(_key(self._process_group.rank()), json.dumps(asdict(self._own)))
            while len(self._accounts) < self._process_group.size() and time.monotonic() < deadline:
                for place in range(self._process_group.size()):
                    if place not in self._accounts and store.check([_key(place)]):
                        self._accounts[place] = Account(**json.loads(store.get(_key(place))))
                self.answered = True
                time.sleep(_POLL_S)
        except RuntimeError:
            return  # the store's host is gone too; what is known is what there is to say


def _num_collectives(process_group: ProcessGroup) -> int:
    number: int = process_group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # the stubs lag behind
    return number


def _key(place: int) -> str:
    return f"syncbn/account/{place}"


def _is_timeout(error: RuntimeError) -> bool:
    words = str(error).lower()
    return ("timed out" in words or "timeout" in words) and "pair closure" not in words  # which is of an earlier wait


def _words(error: RuntimeError) -> str:
    """Torch's own words without source positions and general advice."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return re.sub(r"^\[[^\]]*\] ", "", first).split(". This is typically")[0]
