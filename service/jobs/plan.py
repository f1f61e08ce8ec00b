"""What a job would be before it runs: its batches, its BatchNorm layers, what its ranks would exchange."""

from service.jobs.job import View


class Outlook(View):
    """Something to know before the job runs; nothing that stops it."""

    pointer: str
    """JSON pointer to the field of the spec that could be changed."""
    code: str
    message: str


class LayerPlan(View):
    """One BatchNorm layer, in order of execution.

    ``num_values`` is how many values each channel's batch statistics rest on: images that share them times
    positions of an image. Bytes are those of the float64 vectors that each rank contributes in a training step,
    without what the transport adds; zero where nothing is exchanged.

    ``design_effect`` is assumed: how many positions of an image weigh as much as an independent one. With it follow,
    by `syncbn.outlook`, in standard deviations of the layer's input: ``batch_mean_error``, the standard error of a
    batch's mean, and ``running_mean_noise``, that of the running mean after the last step. ``worst_noise`` is the
    latter if all positions of an image say the same. ``var_bias`` is the relative bias of the running variance.
    """

    layer: str
    num_channels: int
    positions_per_image: int
    num_values: int
    forward_bytes: int
    backward_bytes: int
    design_effect: float
    batch_mean_error: float
    running_mean_noise: float
    worst_noise: float
    var_bias: float


class JobPlan(View):
    """What follows from a spec, reckoned without training."""

    global_batch_size: int
    normalization_batch_size: int
    """Images that share one batch statistic."""
    num_parameters: int
    gradient_bytes_per_step: int
    """What each rank contributes to the average of gradients; zero with one worker."""
    num_train_images: int
    steps_per_epoch: int
    total_steps: int
    layers: tuple[LayerPlan, ...]
    exchanges_per_step: int
    """Collectives of all BatchNorm layers in a training step, forward and backward."""
    exchange_bytes_per_step: int
    lag_steps: float
    """Mean age, in steps, of the batches in the running statistics."""
    initial_weight: float
    """Share of the running statistics that is still what they began with after the last step."""
    warnings: tuple[Outlook, ...] = ()


class PlannedJob(View):
    """A plan, and whether the cluster as it is now could hold the job: ``placement`` says why not."""

    plan: JobPlan
    feasible: bool
    placement: tuple[Outlook, ...]
