"""Find optional libraries that a configuration needs and this machine lacks.

Nothing is imported or compiled: DeepSpeed builds its CPU Adam at the first use.
"""

from __future__ import annotations

import ctypes.util
import difflib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from trainer.config.run_config import FlamingoRunConfig, RunConfig
from trainer.errors import Problem

# Attention of transformers that needs a package: the package to import, and the name under which it is installed.
_ATTENTION_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}
_ATTENTIONS = ("eager", "sdpa", "flex_attention", *_ATTENTION_PACKAGES)
# Packages that transformers needs for weights of a quantization method: to import, and to install.
_QUANTIZATION_PACKAGES = {
    "aqlm": (("aqlm", "aqlm"),),
    "auto-round": (("auto_round", "auto-round"),),
    "awq": (("gptqmodel", "gptqmodel"),),
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"),),
    "bitsandbytes_4bit": (("bitsandbytes", "bitsandbytes"),),
    "bitsandbytes_8bit": (("bitsandbytes", "bitsandbytes"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "eetq": (("kernels", "kernels"),),
    "fbgemm_fp8": (("fbgemm_gpu", "fbgemm-gpu"),),
    "fp_quant": (("fp_quant", "fp_quant"),),
    "gptq": (("optimum", "optimum"), ("gptqmodel", "gptqmodel")),
    "hqq": (("hqq", "hqq"),),
    "quanto": (("optimum", "optimum-quanto"),),
    "quark": (("quark", "amd-quark"),),
    "spqr": (("spqr_quant", "spqr_quant"),),
    "torchao": (("torchao", "torchao"),),
    "vptq": (("vptq", "vptq"),),
}


def missing_libraries(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each setting that needs a missing library."""
    reason = optimizer_obstacle(config.optimizer.name)
    if reason is not None:
        yield Problem("optimizer.name", reason)
    if config.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        yield Problem("logging.wandb_project", "wandb is not installed: pip install wandb, or leave this out")
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield Problem("logging.tensorboard", "tensorboard is not installed: pip install tensorboard, or set false")
    for name, offload in (
        ("offload_param", config.deepspeed.offload_param),
        ("offload_optimizer", config.deepspeed.offload_optimizer),
    ):
        reason = nvme_obstacle() if offload.device == "nvme" else None
        if reason is not None:
            yield Problem(f"deepspeed.{name}.device", f"nvme: {reason}, or take device: cpu")
    if isinstance(config, FlamingoRunConfig):
        yield from _attention_problems(config)
        trainable = {"vision": config.model.trainable.vision, "language_model": config.model.trainable.language_model}
        for part, mode in trainable.items():
            if mode == "lora" and importlib.util.find_spec("peft") is None:
                yield Problem(f"model.trainable.{part}", "lora needs peft, which is not installed: pip install peft")


def optimizer_obstacle(name: str) -> str | None:
    """Return why this machine cannot run an optimizer and how to change that, or None if nothing speaks against it."""
    if name == "cpu_adam":
        return _cpu_adam_obstacle()
    if name == "apex_fused_adam" and not _has_nvidia_apex():
        return (
            "NVIDIA apex is not installed; build it from github.com/NVIDIA/apex with --cpp_ext --cuda_ext (the package "
            "called apex on PyPI is another project), or take adamw, torch's own fused AdamW"
        )
    return None


def nvme_obstacle() -> str | None:
    """Return why DeepSpeed's op for drives cannot be compiled here and how to change that, or None."""
    if ctypes.util.find_library("aio") is None or not _has_header("libaio.h"):
        return "DeepSpeed needs libaio and its header; on Debian and Ubuntu: apt install libaio-dev"
    missing = _missing_build_tools()
    if missing:
        return f"DeepSpeed compiles its op for drives at the first use and needs {' and '.join(missing)}; install it"
    if _trains_on_nvidia() and not _has_nvcc():
        return "DeepSpeed compiles its op for drives with a CUDA toolkit where there is a GPU; set CUDA_HOME to one"
    return None


def _has_header(name: str) -> bool:
    folders = ["/usr/include", "/usr/local/include"]
    for variable in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        folders += os.environ.get(variable, "").split(":")
    folders += [word.removeprefix("-I") for word in os.environ.get("CFLAGS", "").split() if word.startswith("-I")]
    return any(Path(folder, name).is_file() for folder in folders if folder)


def quantization_obstacle(method: str) -> str | None:
    """Return which package weights of a quantization method need and lack here, or None."""
    packages = _QUANTIZATION_PACKAGES.get(method, ())
    missing = [install for package, install in packages if importlib.util.find_spec(package) is None]
    if not missing:
        return None
    names = " ".join(missing)
    return f"its weights are quantized with {method}, which needs a package that is not installed: pip install {names}"


def _attention_problems(config: FlamingoRunConfig) -> Iterator[Problem]:
    path, name = "model.language_model.attention", config.model.language_model.attention
    if name is None or name.startswith("paged|"):
        return
    has_kernels = importlib.util.find_spec("kernels") is not None
    if "/" in name:
        if not has_kernels:
            yield Problem(path, f"{name} is a kernel on the hub, and kernels is not installed: pip install kernels")
    elif name not in _ATTENTIONS:
        close = difflib.get_close_matches(name, _ATTENTIONS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        yield Problem(path, f"{name!r} is not one of {', '.join(_ATTENTIONS)}{hint}")
    elif name in _ATTENTION_PACKAGES:
        package, install = _ATTENTION_PACKAGES[name]
        if importlib.util.find_spec(package) is None and not has_kernels:
            yield Problem(path, f"{name} needs {install}, which is not installed; take sdpa, or leave this out")
        elif config.training.dtype == "float32":
            message = f"{name} has no float32; set training.dtype bfloat16, or take sdpa"
            yield Problem(path, message, related=("training.dtype",))


def _missing_build_tools() -> list[str]:
    """Return which programs that compile DeepSpeed's ops are missing."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    missing = [tool for tool in (compiler, "ninja") if shutil.which(tool) is None]
    if missing == ["ninja"] and importlib.util.find_spec("ninja") is not None:
        return []
    return missing


def _trains_on_nvidia() -> bool:
    return os.environ.get("DS_ACCELERATOR") != "cpu" and shutil.which("nvidia-smi") is not None


def _has_nvcc() -> bool:
    """Return whether torch finds a CUDA toolkit: in CUDA_HOME, of the nvcc in PATH, or at the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(home, "bin", "nvcc") if home else shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc")
    return os.access(found, os.X_OK)


def _cpu_adam_obstacle() -> str | None:
    if importlib.util.find_spec("deepspeed") is None:
        return "cpu_adam is part of deepspeed, which is not installed"
    missing = _missing_build_tools()
    if missing:
        return f"cpu_adam is compiled at its first use and needs {' and '.join(missing)}; install it, or take adamw"
    return None


def _has_nvidia_apex() -> bool:
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations if spec is not None else None
    has_optimizer = any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders or ())
    return has_optimizer and importlib.util.find_spec("amp_C") is not None
