"""The published code, timed: run by `bench/published_run.py` in a Python of its own.

It knows nothing of this project, whose package has the name of the published one: the published
code needs transformers 4.37 to 4.41. `published_child.py JOB` reads JOB/job.json: `folders`, which
come first on the path, and, unless `check` is set, a checkpoint and inputs. It writes
JOB/result.json: versions, times and tokens, or `error`.
"""

import importlib
import importlib.machinery
import json
import os
import resource
import sys
import time
import types
from typing import Any

PACKAGE = "comemo.model.comemo_chat"
RELEASES = ("4.37", "4.38", "4.39", "4.40", "4.41")


def main() -> None:
    job_folder = sys.argv[1]
    with open(os.path.join(job_folder, "job.json")) as file:
        job = json.load(file)
    sys.path[:1] = job["folders"]  # instead of this file's folder, whose names are common ones
    try:
        found = run(job, job_folder)
    except Missing as error:
        found = {"error": str(error)}
    with open(os.path.join(job_folder, "result.json"), "w") as file:
        json.dump(found, file)


class Missing(Exception):
    """Something that has to be installed."""


def run(job: dict[str, Any], job_folder: str) -> dict[str, Any]:
    found = check(job["folders"])
    if not job["check"]:
        found |= answer(job, job_folder, not found["replaced"])
    return found


def check(folders: list[str]) -> dict[str, Any]:
    """Versions; raises Missing."""
    where = next((f for f in folders if os.path.isdir(os.path.join(f, "comemo", "model"))), None)
    if where is None:
        raise Missing(f"no folder of {folders} has comemo/model: give the published repository")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Missing(
            f"{error}; {sys.executable} needs torch and transformers 4.37 to 4.41"
        ) from None
    release = ".".join(transformers.__version__.split(".")[:2])
    if release not in RELEASES:
        raise Missing(
            f"transformers {transformers.__version__} of {transformers.__file__} is not 4.37 to"
            " 4.41; pip install 'transformers==4.37.2'"
        )
    # Not by the path: an installed `comemo` has an __init__.py, the published one has none.
    package = types.ModuleType("comemo")
    package.__path__ = [os.path.join(where, "comemo")]
    sys.modules["comemo"] = package
    replaced = without_flash_attention()
    try:
        importlib.import_module(f"{PACKAGE}.modeling_comemo_chat")
    except ImportError as error:
        raise Missing(f"the published code of {where} cannot be imported: {error}") from None
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "replaced": replaced,
    }


def without_flash_attention() -> list[str]:
    """It is imported by the published code even where it is never called, as in `generate`."""
    try:
        importlib.import_module("flash_attn.flash_attn_interface")
        return []
    except ImportError:
        pass

    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("flash_attn is not installed")

    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        module: Any = types.ModuleType(name)
        # Whoever asks whether it is installed looks at the spec.
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.flash_attn_varlen_func = flash_attn_varlen_func
        sys.modules[name] = module
    return ["flash_attn"]


def answer(job: dict[str, Any], job_folder: str, flash: bool) -> dict[str, Any]:
    """Generate greedily, and when each token came."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(job["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(job, device, flash)
    inputs = load_file(os.path.join(job_folder, "inputs.safetensors"))
    inputs = {name: t.to(device) for name, t in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    for _ in range(2 if device == "cuda" else 1):
        clock = Clock(torch)
        out = model.generate(
            **inputs,
            max_new_tokens=job["tokens"],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
            streamer=clock,
        )
    scale = 1 if sys.platform == "darwin" else 1024
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
    if device == "cuda":
        gib = torch.cuda.max_memory_allocated() / 2**30
    times = [later - clock.start for later in clock.times]
    return {"times": times, "tokens": out[0, -job["tokens"] :].tolist(), "peak_gib": gib}


def load(job: dict[str, Any], device: str, flash: bool) -> Any:
    """The published model with the weights of a checkpoint in its layout."""
    import torch
    from safetensors.torch import load_file

    configuration = importlib.import_module(f"{PACKAGE}.configuration_comemo_chat")
    modeling = importlib.import_module(f"{PACKAGE}.modeling_comemo_chat")
    with open(os.path.join(job["checkpoint"], "config.json")) as file:
        config = json.load(file)
    config.pop("auto_map", None)
    config.setdefault("use_temporal", False)  # read by the published code, which never sets it
    if not flash:
        config["llm_config"]["attn_implementation"] = "eager"
        config["vision_config"]["use_flash_attn"] = False
    config["llm_config"].setdefault("attn_implementation", "eager")
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    model = modeling.CoMemoChatModel(configuration.CoMemoChatConfig(**config)).eval()
    torch.set_default_dtype(torch.float32)
    weights: dict[str, Any] = {}
    for name in sorted(os.listdir(job["checkpoint"])):
        if name.endswith(".safetensors"):
            weights.update(load_file(os.path.join(job["checkpoint"], name)))
    model.load_state_dict(weights, strict=True)
    model.img_context_token_id = job["image_id"]
    return model.to(device)


class Clock:
    """A streamer of transformers: when each token came; `put` is first called with the prompt."""

    def __init__(self, torch: Any) -> None:
        self.torch, self.prompt = torch, True
        self.times: list[float] = []
        self.start = self.now()

    def now(self) -> float:
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def put(self, tokens: Any) -> None:
        if not self.prompt:
            self.times.append(self.now())
        self.prompt = False

    def end(self) -> None:
        pass


if __name__ == "__main__":
    main()
