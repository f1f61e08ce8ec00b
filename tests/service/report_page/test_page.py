"""The page, made from what a real service tells over a real socket and read back as a browser would."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
import pytest

from service.client import Client
from service.jobs import JobSpec, JobState, MetricSeries
from service.report_page import PageRecord, read_record, render_page
from service.store import JobStore
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.report_page.course import LAYERS, course
from tests.service.store.telling import started

_VOID = {"meta", "br", "link", "img", "hr", "input"}


@dataclass
class Page(HTMLParser):
    """What stands on a page; each element that is opened must be closed in order."""

    source: str
    tags: Counter[str] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} would run a script: {name}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, PageRecord]]:
    """Of a run with everything that can be told, and of one that has only started."""
    store = JobStore.open(tmp_path_factory.mktemp("page") / "jobs.sqlite")
    house = House(store)
    wanted = JobSpec(name="brighter", num_workers=4, max_steps=400, bn_momentum=0.01)
    whole, _ = house.running_job(*course(), wanted=wanted)
    store.transition(store.get(whole.id), JobState.SUCCEEDED)
    begun, _ = house.running_job(started())
    with listening(house.app()) as url, Client(url) as client:
        yield {"whole": read_record(client, whole.id), "begun": read_record(client, begun.id)}
    store.close()


def test_the_page_says_first_what_is_wrong_and_shows_why(records: dict[str, PageRecord]) -> None:
    record = records["whole"]
    page = Page(render_page(record))
    assert page.tags["svg"] == 5
    for sentence in (
        record.report.drift.sentence,
        record.report.stale.sentence,
        record.report.ranks.sentence,
        record.report.convergence.sentence,
        *record.report.advice,
        *(finding.sentence for finding in record.report.findings),
    ):
        assert " ".join(sentence.split()) in page.text
    order = [
        page.text.index(title) for title in ("Damage by the stored", "What to change", "Verdicts", "Training loss")
    ]
    assert order == sorted(order)
    assert all(layer in page.text for layer in LAYERS)
    assert "rank 1" in page.text
    assert "best: 0.1" in page.text


def test_nothing_is_loaded_and_no_two_elements_share_an_id(records: dict[str, PageRecord]) -> None:
    source = render_page(records["whole"])
    page = Page(source)
    assert not re.search(r"https?:|//\w", source)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert "default-src 'none'" in source
    assert len(set(page.ids)) == len(page.ids)
    assert {reference.lstrip("#") for reference in page.references} <= set(page.ids)
    assert page.references
    assert not re.search("#0102", source)  # a colour that the page would not turn over in the dark


def test_a_job_that_has_told_nothing_gets_a_page_without_plots(records: dict[str, PageRecord]) -> None:
    page = Page(render_page(records["begun"]))
    assert page.tags["svg"] == 0
    assert page.text.count("undecided") >= 3
    assert "No step has been told yet." in page.text


def test_numbers_that_are_not_finite_are_written_and_drawn_around(records: dict[str, PageRecord]) -> None:
    record = records["whole"]
    ill = MetricSeries(name="train/loss", rank=None, steps=(1, 2), values=(float("nan"), float("inf")), num_points=2)
    layers = record.layers.model_copy(
        update={
            "series": tuple(
                series.model_copy(update={"values": (*series.values[:-1], float("nan"))})
                for series in record.layers.series
            )
        }
    )
    page = Page(render_page(record.model_copy(update={"losses": ill, "block_means": ill, "layers": layers})))
    assert page.tags["svg"] == 4
    assert "nan" in page.text


def test_what_a_job_calls_itself_is_never_markup(records: dict[str, PageRecord]) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>&$x^2$'
    text = records["whole"].model_dump_json()
    for name in ("brighter", *LAYERS):
        text = text.replace(f'"{name}"', '"' + evil.replace('"', r"\"") + '"')
    record = PageRecord.model_validate_json(text)
    assert record.report.name == evil
    page = Page(render_page(record))
    assert not page.tags.keys() & {"script", "img"}
    assert evil in "".join(page.words)


def test_means_of_blocks_are_those_of_the_single_steps(records: dict[str, PageRecord]) -> None:
    told = [fact for fact in course() if fact.type == "step"]
    means = records["whole"].block_means
    losses = np.array([fact.loss for fact in told])
    length = 400 // len(means.values)
    np.testing.assert_allclose(means.values, losses.reshape(-1, length).mean(axis=1), rtol=1e-12)
    assert means.steps == tuple(range(length, 401, length))
    assert records["begun"].block_means.values == ()
