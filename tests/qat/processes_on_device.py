"""Two processes fine-tune a model on a device: python processes_on_device.py OUT FOLDER-OF-THE-PRETENDED-DEVICE."""

import json
import os
import sys
from pathlib import Path

import pretended_device
import torch
from torch import distributed
from tuned_run import make_images, make_model

import qdq

SCHEDULE = qdq.Schedule(steps=4, lr=1e-3, range_lr=1e-2)


class Done(distributed.Work):
    """The work of a collective that has ended."""

    def wait(self, timeout=None):
        return True


class Copying(distributed.ProcessGroup):
    """Collectives of tensors on any device, over gloo on the CPU."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.gloo = distributed.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self):  # noqa: N802  # torch calls it
        return "copying"

    def allreduce(self, tensors, options):
        host = [tensor.cpu() for tensor in tensors]
        self.gloo.allreduce(host, options).wait()
        for tensor, result in zip(tensors, host, strict=True):
            tensor.copy_(result)
        return Done()

    def allgather(self, outputs, inputs, options):
        host = [[tensor.cpu() for tensor in row] for row in outputs]
        self.gloo.allgather(host, [tensor.cpu() for tensor in inputs], options).wait()
        for row, results in zip(outputs, host, strict=True):
            for tensor, result in zip(row, results, strict=True):
                tensor.copy_(result)
        return Done()

    def broadcast(self, tensors, options):
        host = [tensor.cpu() for tensor in tensors]
        self.gloo.broadcast(host, options).wait()
        for tensor, result in zip(tensors, host, strict=True):
            tensor.copy_(result)
        return Done()


def tune(device):
    """Losses and weights for each way in which ranges change."""
    results = {}
    for ranges in ("lsq", "ema"):
        model = make_model(8).to(device)
        batches = [make_images(size, size) for size in (8, 7, 3)]
        tuning = qdq.finetune(model, batches, ranges=ranges, schedule=SCHEDULE, held=batches[:1])
        state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
        results[ranges] = {"losses": tuning.losses, "state": state}
    return results


def main():
    rank = int(os.environ["RANK"])
    backend = "gloo"  # of one GPU: nccl would need two
    device = torch.device("cuda", 0)
    if not torch.cuda.is_available():
        device = pretended_device.install(Path(sys.argv[2]))
        backend = "copying"
        distributed.Backend.register_backend(
            backend, lambda *arguments: Copying(*arguments), devices=["cpu", device.type]
        )
    distributed.init_process_group(
        backend, init_method="file://" + os.environ["STORE"], rank=rank, world_size=2
    )
    try:
        results = tune(device)
    finally:
        distributed.destroy_process_group()
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
