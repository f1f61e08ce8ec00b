"""The database, the clocks that write into it, and for how long it keeps things."""

from datetime import UTC, datetime, timedelta

from service.doctor.finding import Finding, judge
from service.errors import ServiceError
from service.memory import inspect_store, refuse_unshared_cluster, retention_of
from service.settings import Settings
from service.store import Inspection, SchemaAge

_MAX_SKEW = timedelta(seconds=30)

_AGES = {
    SchemaAge.EMPTY: "has no tables yet; the first service makes them",
    SchemaAge.OLDER: "is of an older version; the service brings it up to date when it starts",
    SchemaAge.CURRENT: "is up to date",
    SchemaAge.NEWER: "was written by a newer service",
}


def look_at_database(settings: Settings) -> tuple[bool, list[Finding]]:
    """Whether API keys were ever made, as far as can be seen, and each check."""
    where = "SYNCBN_DATABASE_URL" if settings.database_url is not None else str(settings.database_path)
    try:
        seen = inspect_store(settings)
        refuse_unshared_cluster(settings)
    except ServiceError as error:
        return False, [judge("database", str(error), f"see what it says of {where}"), _kept(settings)]
    newer = seen.age is SchemaAge.NEWER
    remedy = "install that version, or restore a backup of this one" if newer else ""
    return seen.keys_made, [judge("database", f"{where} {_AGES[seen.age]}", remedy), _clock(seen), _kept(settings)]


def _clock(seen: Inspection) -> Finding:
    now = datetime.now(UTC)
    remedy = "set this machine's clock by NTP: deadlines, retention and webhooks' signatures go by it"
    if seen.server_time is not None and abs(now - seen.server_time) > _MAX_SKEW:
        skew = (now - seen.server_time).total_seconds()
        return judge("clock", f"{skew:+.0f} s from that of the database's server", remedy)
    if seen.newest_at is not None and seen.newest_at - now > _MAX_SKEW:
        return judge(
            "clock", f"it is {now:%Y-%m-%d %H:%M}, and a job changed at {seen.newest_at:%Y-%m-%d %H:%M}", remedy
        )
    return judge("clock", f"{now:%Y-%m-%d %H:%M:%S} UTC")


def _kept(settings: Settings) -> Finding:
    days = {str(what): days for what, days in retention_of(settings).days.items()} | {"audit": settings.keep_audit_days}
    told = ", ".join(f"{what} {'for ever' if n is None else f'{n:g} days'}" for what, n in days.items())
    short = [what for what, n in days.items() if n is not None and n < 1]
    remedy = f"nobody will find the {', '.join(short)} of the day before: raise SYNCBN_KEEP_..._DAYS" if short else ""
    return judge("kept", told, remedy)
