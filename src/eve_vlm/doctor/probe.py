"""What torch says of this machine, as JSON; run as a program of its own by `eve doctor`.

In a process of its own because importing torch, or asking a driver, is what may crash or hang on
the machines where a doctor is called. Easy to get wrong: this file is run by its path and not as a
part of the package, so it must import nothing of it.
"""

import json
import sys
import time
import warnings
from typing import Any

SIDE = 384  # of the matrices; 0.1 billion operations, 6 ms in float32 on a slow CPU core
REPEATS = 5  # the fastest counts


def seconds_of_product(dtype: Any) -> float:
    """Time of one matrix product on one CPU core in this dtype, the best of a few."""
    import torch

    torch.set_num_threads(1)  # with more, what else runs here decides
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one also loads the kernel


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes, compute capability and native bfloat16 of every CUDA device."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        found.append(
            {
                "name": torch.cuda.get_device_name(index),
                "free": free,
                "total": total,
                "capability": list(torch.cuda.get_device_capability(index)),
                "bfloat16": native,
            }
        )
    return found


def main() -> None:
    """Writes the answers to standard output."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    threads = torch.get_num_threads()
    answers: dict[str, Any] = {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "hip_build": torch.version.hip,
        "threads": threads,
        "mps": torch.backends.mps.is_available(),
        "cuda": available,
        "cuda_warning": str(caught[0].message).splitlines()[0] if caught else "",
        "architectures": torch.cuda.get_arch_list() if available else [],
        "gpus": gpus() if available else [],
        "bfloat16_ratio": seconds_of_product(torch.bfloat16) / seconds_of_product(torch.float32),
    }
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
