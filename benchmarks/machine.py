"""`python -m benchmarks.machine`: what is missing here, and what that means."""

import importlib.util
import os
import platform
import shutil

NEEDED = {
    "torch": "nothing runs",
    "numpy": "the tests do not run",
    "pytest": "the tests do not run",
    "setuptools": "the CUDA extension is not built",
    "triton": "no Triton kernel is built",
    "transformers": "the engine has no peer",
    "yaml": "no PPO iteration is measured",
    "trl": "no TRL rows on a GPU",
    "pytest_timeout": "a test that hangs stops with its whole step",
    "xdist": "the tests run one after the other",
    "pytest_benchmark": "`pytest benchmarks` does not run; `python -m benchmarks` does",
    "liger_kernel": "no Liger rows",
    "vllm": "no vLLM rows",
}
"""Import name -> what its absence means."""
TOOLS = {
    "nvcc": "the CUDA extension is not built, so there are no cuda rows",
    "compute-sanitizer": "memory accesses are not checked",
    "nvidia-smi": "driver and clocks are not recorded",
    "git": "the commit is not recorded",
}


def describe() -> str:
    """One line: the machine, and what is missing with its consequence."""
    missing = [f"{name} ({meaning})" for name, meaning in NEEDED.items()
               if importlib.util.find_spec(name) is None]
    missing += [f"{tool} ({meaning})" for tool, meaning in TOOLS.items()
                if shutil.which(tool) is None]
    return (f"{device_name()}, {os.cpu_count()} processors, Python {platform.python_version()}; "
            f"missing: {', '.join(missing) or 'nothing'}")


def device_name() -> str:
    """The GPU and its torch, or why there is none."""
    if importlib.util.find_spec("torch") is None:
        return "no torch"
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{gpu}, torch {torch.__version__}"


def device_and_architecture() -> str:
    """"cpu", or "cuda" with the GPU's entry of TORCH_CUDA_ARCH_LIST; nothing without torch."""
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if major == 9 else ""  # what Hopper has beyond the instructions of 9.0
    return f"cuda {major}.{minor}{suffix}"


if __name__ == "__main__":
    print(describe())
    print(device_and_architecture())
