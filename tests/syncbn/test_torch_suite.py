"""What torch asks of its own SyncBatchNorm, ours does too."""

import inspect

from tests.ranks import run_ranks
from tests.syncbn.torch_suite import (
    LEFT_OUT,
    PASSING,
    Unsynchronized,
    check_inputs_of_torchs_module_tests,
    run_on_rank,
)

Outcomes = dict[str, str | None]
SEES_UNEVEN_SIZES = "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_Running_Value"


def test_torchs_own_tests_pass_and_reject_a_layer_that_does_not_synchronize() -> None:
    """In the same ranks, as the suites take long to import: what torch's tests of modules feed BatchNorm with."""
    for checked, ours, wrong, names in run_ranks(2, _run_suites, timeout_s=110.0):
        assert {line.partition(" ")[0] for line in checked} == {f"nn.BatchNorm{dims}d" for dims in (1, 2, 3)}
        assert len(checked) >= 50
        failures = [f"{name}: {failure}" for name, failure in ours.items() if failure is not None]
        assert not failures, "\n".join(failures)
        assert list(ours) == list(PASSING)
        assert "Tensor-likes are not close" in str(wrong[SEES_UNEVEN_SIZES])
        assert set(names) == {*PASSING, *LEFT_OUT}


def _run_suites() -> tuple[list[str], Outcomes, Outcomes, list[str]]:
    checked = check_inputs_of_torchs_module_tests()
    ours = run_on_rank(PASSING)
    wrong = run_on_rank((SEES_UNEVEN_SIZES,), Unsynchronized)
    return checked, ours, wrong, _tests_about_the_layer()


def _tests_about_the_layer() -> list[str]:
    """By what is called SyncBatchNorm or sync_bn, or calls it; so that what a later torch adds is not missed."""
    from torch.testing._internal.distributed.distributed_test import DistributedTest

    tests = inspect.getmembers(DistributedTest._DistTestBase, inspect.isfunction)
    return [
        name
        for name, test in tests
        if name.startswith("test_") and "SyncBatchNorm" in inspect.getsource(inspect.unwrap(test))
    ]
