"""Precision and processes: what the hardware does well, and how many there are."""

import os

import torch

from plato2.config import UserError
from plato2.runs.folder import cpu_info

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
"""Lightning's names of what plato2 trains on."""


def best_precision(accelerator: str) -> str:
    """`bf16-mixed` where the hardware multiplies bf16 matrices faster than float32 ones, else `32-true`.

    On Intel's CPUs that takes matrix units (AMX): with vector instructions alone (AVX512-bf16), PyTorch's
    bf16 products take 1.7 times as long as float32 there, but 0.4 times on AMD's (docs/benchmarks.md).
    """
    if is_on_gpu(accelerator):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    flags = cpu_flags()
    faster = "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in "".join(cpu_info()))
    return "bf16-mixed" if faster else "32-true"


def is_on_gpu(accelerator: str) -> bool:
    """Whether an accelerator means NVIDIA's GPUs on this machine."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def cpu_flags() -> set[str]:
    """Instruction sets of the CPU; empty where the system does not tell."""
    for line in cpu_info():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def n_ranks(devices: int | str | list[int], num_nodes: int, accelerator: str) -> int:
    """Processes of a strategy: devices (a number, a list, or `auto`) x machines.

    `auto` means all GPUs of a machine where the accelerator may be one, else one process, as in Lightning.
    """
    if isinstance(devices, str) and "," in devices:
        devices = [int(number) for number in devices.split(",") if number.strip()]
    if isinstance(devices, list):
        return len(devices) * num_nodes
    if isinstance(devices, str) and not devices.isdigit():
        on_gpus = accelerator in ("auto", "gpu", "cuda")
        return (torch.cuda.device_count() or 1 if on_gpus else 1) * num_nodes
    return int(devices) * num_nodes


def check_devices(accelerator: str, devices: int | str | list[int]) -> None:
    """Refuses an accelerator that plato2 does not train on, and devices that are no devices.

    Raises:
        UserError: names the key, the value and what to give.
    """
    if accelerator not in ACCELERATORS:
        raise UserError(
            f"strategy.accelerator={accelerator}: must be {' or '.join(ACCELERATORS)}; give strategy=auto, "
            "or strategy=cpu"
        )
    numbers = devices.split(",") if isinstance(devices, str) else [devices]
    if devices == "auto" or isinstance(devices, list):
        return
    whole = all(str(number).strip().isdecimal() for number in numbers)
    if not whole or devices in (0, "0"):
        raise UserError(
            f"strategy.devices={devices}: must be a number of devices from 1 on, a list of their numbers "
            "such as [0,1], or auto (all there are)"
        )


def check_processes(devices: int | str | list[int], num_nodes: int, accelerator: str) -> None:
    """Compares a strategy with the processes that torchrun or srun has started.

    Raises:
        UserError: names the devices and machines that these processes would be.
    """
    variables, ranks = os.environ, n_ranks(devices, num_nodes, accelerator)
    wanted = f"strategy.devices={devices} on {num_nodes} machine(s)"
    if "LOCAL_WORLD_SIZE" in variables:  # only torchrun sets it
        starter, started, here = "torchrun", int(variables["WORLD_SIZE"]), int(variables["LOCAL_WORLD_SIZE"])
    elif _started_by_srun():
        starter, started = "srun", int(variables["SLURM_NTASKS"])
        here = started // int(variables.get("SLURM_NNODES", "1"))
        if started > 1 and "SLURM_NTASKS_PER_NODE" not in variables:
            raise UserError(
                f"{wanted}: srun has started {started} processes wherever there was room; give it "
                f"--ntasks-per-node={max(1, ranks // num_nodes)} --nodes={num_nodes} in place of --ntasks"
            )
    else:
        return
    if started == ranks:
        return
    machines = max(1, started // max(1, here))
    cure = "strategy=ddp" if machines == 1 else f"strategy=ddp_64 strategy.num_nodes={machines}"
    raise UserError(
        f"{wanted}: {starter} has started {started} process(es), {here} per machine; give {cure} "
        f"strategy.devices={here} (or fsdp or hsdp in place of ddp), or start as many as the strategy has"
    )


def check_launch(devices: int | str | list[int], num_nodes: int, accelerator: str) -> None:
    """Refuses what would wait for processes that nobody starts.

    Raises:
        UserError: says how to start them.
    """
    ranks = n_ranks(devices, num_nodes, accelerator)
    if ranks == 1 or "LOCAL_WORLD_SIZE" in os.environ or _started_by_srun():
        return
    if "SLURM_NTASKS" in os.environ and not _interactive_job():
        raise UserError(
            f"strategy.devices={devices} on {num_nodes} machine(s): in a Slurm job srun starts the {ranks} "
            "processes; write srun before the command, and "
            f"--ntasks-per-node={ranks // num_nodes} --nodes={num_nodes} into the job's script"
        )
    needed = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    lacking = [name for name in needed if name not in os.environ]
    if num_nodes > 1 and lacking:
        raise UserError(
            f"strategy.num_nodes={num_nodes}: on each machine, torchrun or srun starts its processes "
            f"(docs/train.md, More than one device), or set {' '.join(lacking)} there"
        )


def _started_by_srun() -> bool:
    return {"SLURM_STEP_ID", "SLURM_NTASKS"} <= os.environ.keys() and not _interactive_job()


def _interactive_job() -> bool:
    """A shell in a Slurm job, in which Lightning starts processes as outside Slurm."""
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def check_replicas(replicas: int | str, num_nodes: int, ranks: int) -> int:
    """The copies of the model.

    Raises:
        UserError: the ranks cannot be shared out over them.
    """
    copies = num_nodes if replicas == "auto" else int(replicas)
    if copies < 1 or ranks % copies:
        fitting = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise UserError(
            f"strategy.strategy.replicas={replicas}: {ranks} ranks cannot be {copies} copies of the model; "
            f"use {' or '.join(map(str, fitting))}, or auto (one copy a machine)"
        )
    return copies
