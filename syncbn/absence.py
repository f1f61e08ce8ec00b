"""Absence: who did not come to an exchange that failed, and where the others are, by what each leaves in the store."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
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
    accounts = _exchange_accounts(process_group, own)
    ranks = dist.get_process_group_ranks(process_group)
    here = ranks[process_group.rank()]
    by_rank = {rank: accounts[place] for place, rank in enumerate(ranks) if place in accounts}
    missing = [rank for rank in ranks if rank not in by_rank]
    accused = missing or _elsewhere(by_rank, own) or _late(by_rank)
    return RanksMissing(
        f"{_accusation(missing, accused, own, error)}; {_whereabouts(by_rank, here)}; {_ADVICE} [{_words(error)}]",
        layer=exchange.layer,
        ranks=accused,
    )


def _accusation(missing: list[int], accused: list[int], own: Account, error: RuntimeError) -> str:
    if missing and _is_timeout(error):
        return f"{name_ranks(missing)} did not come within {own.waited_s:.1f} s to the {own.text}"
    if missing:
        return f"the connection was lost in the {own.text}, and {name_ranks(missing)} left no word"
    return f"{name_ranks(accused)} did not come in time to the {own.text}"


def _whereabouts(by_rank: Mapping[int, Account], here: int) -> str:
    """Where those are that gave an account, and for how long they have been."""
    places = where_ranks_are({rank: account.text for rank, account in by_rank.items()})
    details = ", ".join(
        f"rank {rank} {'(this one) ' if rank == here else ''}{account.waited_s:.1f} s in collective "
        f"{account.num_collectives} of the group"
        for rank, account in sorted(by_rank.items())
    )
    return f"{places}: {details}"


def _elsewhere(by_rank: Mapping[int, Account], own: Account) -> list[int]:
    return [rank for rank, account in by_rank.items() if account.text != own.text]


def _late(by_rank: Mapping[int, Account]) -> list[int]:
    """Who came when another had waited half of its time and more."""
    longest = max(account.waited_s for account in by_rank.values())
    return [rank for rank, account in by_rank.items() if account.waited_s < longest / 2]


def _exchange_accounts(process_group: ProcessGroup, own: Account) -> dict[int, Account]:
    """Accounts by place in the group, this rank's included; those that could be had in time."""
    accounts = {process_group.rank(): own}
    # In a thread, because a store whose host is frozen answers never and has no timeout for that.
    asking = Thread(target=_ask, args=(process_group, own, accounts), name="syncbn-accounts", daemon=True)
    asking.start()
    asking.join(ACCOUNTS_S)
    return dict(accounts)


def _ask(process_group: ProcessGroup, own: Account, accounts: dict[int, Account]) -> None:
    deadline = time.monotonic() + ACCOUNTS_S
    try:
        # A connection of our own: nothing else of this process waits behind a store that does not answer.
        store: Store = process_group.get_group_store().clone()  # type: ignore[attr-defined]  # the stubs lag behind
        store.set_timeout(timedelta(seconds=ACCOUNTS_S))
        store.set(_key(process_group.rank()), json.dumps(asdict(own)))
        others = [place for place in range(process_group.size()) if place not in accounts]
        while others and time.monotonic() < deadline:
            for place in [place for place in others if store.check([_key(place)])]:
                accounts[place] = Account(**json.loads(store.get(_key(place))))
                others.remove(place)
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
    return "timed out" in words or "timeout" in words


def _words(error: RuntimeError) -> str:
    """Torch's own words without source positions and general advice."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return re.sub(r"^\[[^\]]*\] ", "", first).split(". This is typically")[0]
