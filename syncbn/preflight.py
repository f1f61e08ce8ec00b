"""Preflight: whether all ranks hold the same synchronized layers, asked once before training, on any backend."""

import torch
from torch import nn
from torch.distributed import ProcessGroup, get_process_group_ranks

from syncbn.agreement import TEXT_SIZE, Exchange, disagreement, read_text, text_of
from syncbn.batchnorm import SyncBatchNorm
from syncbn.exchange import gather_over_ranks, peers
from syncbn.layers import unwrapped


def check_agreement(model: nn.Module, *, process_group: ProcessGroup | None = None) -> None:
    """Compare the SyncBatchNorm layers of all ranks' models: paths, order, channels, parameter types and modes.

    Over gloo every exchange is compared anyway; over NCCL, where that would make each wait for the device, this is
    how to find a difference before it hangs. Call it when the model is built and whenever modes change.

    Cost: two gathers, of one value and of 32 doubles a layer, and a wait for the device; all ranks must call.

    Raises:
        RanksDisagree: on every rank, naming the first layer that is not the same everywhere.
        RanksMissing: if a rank does not come within the group's timeout.
    """
    group = peers(process_group)
    if group is None:
        return
    layers = {path: layer for path, layer in unwrapped(model).named_modules() if isinstance(layer, SyncBatchNorm)}
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    exchanges = [_described(path, layer) for path, layer in layers.items()]

    # The number first, padded to by all, because only vectors of equal size can be gathered.
    count = torch.tensor([len(exchanges)], dtype=torch.float64, device=device)
    num_layers = int(gather_over_ranks(count, group, Exchange("number of layers", num_values=1)).max().item())
    exchanges += [Exchange("end of its layers")] * (num_layers - len(exchanges))
    if not exchanges:
        return
    texts = torch.cat([text_of(exchange) for exchange in exchanges]).to(device)
    purpose = Exchange("comparison of layers", num_values=texts.numel())
    by_rank = gather_over_ranks(texts, group, purpose).cpu().view(group.size(), num_layers, TEXT_SIZE)
    for place, exchange in enumerate(exchanges):
        if not torch.equal(by_rank[:, place], by_rank[:1, place].expand(group.size(), -1)):
            told = [read_text(doubles) for doubles in by_rank[:, place]]
            raise disagreement(exchange, dict(zip(get_process_group_ranks(group), told, strict=True)))


def _described(path: str, layer: SyncBatchNorm) -> Exchange:
    mode = "training" if layer.training else "evaluation"
    dtype = None if layer.weight is None else layer.weight.dtype
    return Exchange(f"{mode} mode", path, layer.num_features, dtype)
