"""What launchers tell each process by its environment, by the names that torchrun uses.

torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT,
PyTorchJob all but LOCAL_RANK. Slurm's srun says the same by other names.
"""

import os
import re
from collections.abc import MutableMapping

FIRST_PORT, PORTS = 15_000, 10_000  # of the address where ranks meet, by the number of the job


def complete_environment(environment: MutableMapping[str, str] | None = None) -> None:
    """Set the variables of torchrun in a process that was started as one of several without it.

    What is set stays. srun: the variables of its tasks are translated. A batch script itself has
    SLURM_PROCID, too, but no number of tasks of a step: it is one process. RANK and WORLD_SIZE
    without LOCAL_RANK, as of PyTorchJob: one process on each machine.

    Args:
        environment: None for that of this process.
    """
    env = os.environ if environment is None else environment
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in env and "SLURM_PROCID" in env and tasks != "1":
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], tasks
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")))
        job = re.sub(r"\D", "", env.get("SLURM_JOB_ID", "")) or "0"
        env.setdefault("MASTER_PORT", str(FIRST_PORT + int(job) % PORTS))
    elif "RANK" in env and env.get("WORLD_SIZE", "1") != "1":
        env.setdefault("LOCAL_RANK", "0")


def first_host(nodes: str) -> str:
    """The first name of a list of Slurm, such as node03 of "node[03-05,9],login1"."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes
