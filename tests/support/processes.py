"""Gloo processes on loopback, and a meter of the bytes that they send."""

import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

WORLDS = tuple(map(int, os.environ.get("INTAGLIO_RANKS", "2").split(",")))  # `make distributed` asks for more


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank, world, port, folder, work, args):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(work(rank, world, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def on_processes(world, folder, work, *args):
    """What `work(rank, world, *args)` returns on each of `world` processes; those that wait for ever are killed."""
    running = mp.spawn(_enter, args=(world, free_port(), str(folder), work, args), nprocs=world, join=False)
    deadline = time.monotonic() + 600
    while not running.join(timeout=5):
        if time.monotonic() > deadline:
            for process in running.processes:
                process.kill()
            raise TimeoutError(f"{work.__name__}: {world} processes wait for each other")
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


class Wire(TorchDispatchMode):
    """Bytes that a process puts into collectives, by kind: of an all-gather the result, of the others the input."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and not any(w in name for w in ("wait", "barrier", "wrap_tensor")):
            kind = name.split("::")[1].strip("_").replace("_base", "")
            self.bytes[kind] = self.bytes.get(kind, 0) + max((t.nbytes for t in _tensors(args)), default=0)
        return func(*args, **(kwargs or {}))

    def take(self):
        """Kind → bytes since the last call."""
        found, self.bytes = self.bytes, {}
        return found


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
