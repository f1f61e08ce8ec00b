"""One rank of an attempt: training in a thread of its own, answering the runner beside it. No Ray in here."""

import os
import socket
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # public, yet not marked as exported

from service.cluster.failures import RankFailure, failure_of
from service.cluster.outbox import Record
from service.cluster.rank_actor import Drained
from service.cluster.retelling import retelling
from service.jobs import LaunchRequest, LogLine, StoppedEarly
from service.training.context import RankContext
from service.training.loop import train
from service.training.orders import Orders
from service.training.process_group import join, leave


class Rank:
    """One rank, on the node with address ``node_ip``.

    Its caller asks rank 0 for `open_store`, tells all ranks to `begin`, then calls `drain` until it is over.
    """

    def __init__(self, request: LaunchRequest, rank: int, node_ip: str) -> None:
        self._request = request
        self._rank = rank
        self._node_ip = node_ip
        self._store: Store | None = None
        self._lock = threading.Lock()
        self._records: list[Record] = []
        self._orders = Orders()
        self._stopped_step: int | None = None
        self._failure: RankFailure | None = None
        self._over = threading.Event()

    def place(self) -> str:
        """Where this rank runs, for people."""
        return f"rank {self._rank} on {socket.gethostname()} ({self._node_ip}), pid {os.getpid()}"

    def open_store(self) -> tuple[str, int]:
        """Serve the rendezvous store on this node's address, at a port that the system chooses and that stays bound."""
        host = self._node_ip
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family, backlog=2 * self._request.spec.num_workers) as listener:
            port = int(listener.getsockname()[1])
            self._store = TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=self._rendezvous_timeout,
                master_listen_fd=listener.detach(),
            )
        return host, port

    def begin(self, store_address: tuple[str, int]) -> None:
        """Meet the other ranks and train, in a thread; returns at once."""
        threading.Thread(target=self._run, args=store_address, name="training", daemon=True).start()

    def drain(self, wait_s: float, orders: Orders) -> Drained:
        """What has happened since the last call; answers after ``wait_s``, or sooner when it is over.

        The training hears of ``orders`` when it next asks.
        """
        self._orders = orders
        over = self._over.wait(wait_s)
        with self._lock:
            records, self._records = self._records, []
        return Drained(records, over, self._failure, self._stopped_step)

    def _run(self, host: str, port: int) -> None:
        try:
            self._train(host, port)
        except Exception as error:  # whatever user data or torch may raise is the runner's to judge
            self._note(error)
        finally:
            self._over.set()

    def _train(self, host: str, port: int) -> None:
        spec = self._request.spec
        context = RankContext(
            rank=self._rank,
            world_size=spec.num_workers,
            device=torch.device("cuda", 0) if spec.resources.gpus else torch.device("cpu"),
            storage=Path(self._request.storage),
            attempt=self._request.attempt,
            start_checkpoint=Path(self._request.start_checkpoint) if self._request.start_checkpoint else None,
            told_step=self._request.told_step,
        )
        store = self._store or TCPStore(host, port, is_master=False, timeout=self._rendezvous_timeout)
        join(self._rank, spec.num_workers, store, context.device, spec.timeouts.collective_s)
        try:
            for event in retelling(train(spec, context, lambda: self._orders), context):
                if isinstance(event, StoppedEarly):
                    self._stopped_step = event.step
                record = Record(time.time(), event.model_dump_json())
                with self._lock:
                    self._records.append(record)
        finally:
            leave()

    def _note(self, error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        lines = [LogLine(level="error", text=line) for line in text.splitlines()]
        with self._lock:
            self._failure = failure_of(error, self._rank, self.place())
            self._records.extend(Record(time.time(), line.model_dump_json()) for line in lines)

    @property
    def _rendezvous_timeout(self) -> timedelta:
        return timedelta(seconds=self._request.spec.timeouts.rendezvous_s)
