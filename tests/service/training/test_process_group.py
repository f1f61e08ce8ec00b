import subprocess
import sys
from pathlib import Path

JOIN = """
import sys, torch
import torch.distributed as dist
from service.training import process_group
rank, path, timeout_s = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
process_group.join(rank, 2, dist.FileStore(path, 2), torch.device("cpu"), timeout_s)
total = torch.tensor([float(rank + 1)])
dist.all_reduce(total)
print(total.item(), dist.get_backend(), torch.get_num_threads())
process_group.leave()
process_group.leave()
assert not dist.is_initialized()
"""


def _start(rank: int, store: Path, timeout_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", JOIN, str(rank), str(store), str(timeout_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_ranks_meet_exchange_and_leave(tmp_path: Path) -> None:
    ranks = [_start(rank, tmp_path / "store", 60) for rank in range(2)]
    try:
        outputs = [rank.communicate(timeout=90) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [output for output, _ in outputs] == ["3.0 gloo 1\n"] * 2, outputs


def test_a_rank_whose_peer_does_not_come_gives_up_in_time(tmp_path: Path) -> None:
    rank = _start(0, tmp_path / "store", 1)
    try:
        _, errors = rank.communicate(timeout=60)
    finally:
        rank.kill()
    assert rank.returncode == 1
    assert "timed out" in errors.lower() or "timeout" in errors.lower(), errors
