"""Training with the faults that the name of the job asks for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

from benchmarks.planted_faults.scenarios import trial_of
from service.jobs import JobSpec, TelemetryEvent
from service.training.context import RankContext
from service.training.orders import Orders

Train = Callable[[JobSpec, RankContext, Callable[[], Orders]], Iterator[TelemetryEvent]]


def planted(train: Train) -> Train:
    """``train`` with plants that are active while it runs, on data with what is wrong in them.

    Jobs that are named by no scenario are trained as ever.
    """

    def train_with_plants(
        spec: JobSpec, context: RankContext, orders: Callable[[], Orders] = Orders
    ) -> Iterator[TelemetryEvent]:
        trial = trial_of(spec.name)
        if trial is None:
            yield from train(spec, context, orders)
            return
        scenario, seed = trial
        if scenario.data:
            uri = scenario.data(seed, context.rank).write(context.storage / f"data of rank {context.rank}")
            spec = spec.model_copy(update={"data": uri})
        with ExitStack() as stack:
            for plant in scenario.planted(seed):
                stack.enter_context(plant)
            yield from train(spec, context, orders)

    return train_with_plants
