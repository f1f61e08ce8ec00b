"""The report on a job as one file for a browser or for paper: no script, and nothing from the network."""

from service.report_page.page import render_page
from service.report_page.record import PageRecord, read_record

__all__ = ["PageRecord", "read_record", "render_page"]
