"""What torch asks of its own SyncBatchNorm, ours does too."""

import inspect

from tests.ranks import run_ranks
from tests.syncbn.torch_suite import LEFT_OUT, PASSING, Unsynchronized, run_on_rank

Outcomes = dict[str, str | None]
SEES_UNEVEN_SIZES = "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_Running_Value"


def test_torchs_own_tests_pass_and_reject_a_layer_that_does_not_synchronize() -> None:
    for ours, wrong, names in run_ranks(2, _run_suite, timeout_s=110.0):
        failures = [f"{name}: {failure}" for name, failure in ours.items() if failure is not None]
        assert not failures, "\n".join(failures)
        assert list(ours) == list(PASSING)
        assert "Tensor-likes are not close" in str(wrong[SEES_UNEVEN_SIZES])
        assert set(names) == {*PASSING, *LEFT_OUT}


def _run_suite() -> tuple[Outcomes, Outcomes, list[str]]:
    ours = run_on_rank(PASSING)
    wrong = run_on_rank((SEES_UNEVEN_SIZES,), Unsynchronized)
    return ours, wrong, _tests_about_the_layer()


def _tests_about_the_layer() -> list[str]:
    """By what is called SyncBatchNorm or sync_bn, or calls it; so that what a later torch adds is not missed."""
    from torch.testing._internal.distributed.distributed_test import DistributedTest

    tests = inspect.getmembers(DistributedTest._DistTestBase, inspect.isfunction)
    return [
        name
        for name, test in tests
        if name.startswith("test_") and "SyncBatchNorm" in inspect.getsource(inspect.unwrap(test))
    ]
