"""A Forge extension for the tests alone: shrinks the sizes that Forge's loader has fixed for Flux, and tells more."""

import ctypes
import gc
import hashlib
import importlib.util
from collections import Counter
from pathlib import Path

import huggingface_guess
import torch
import transformers
from backend import loader
from backend.nn.vae import IntegratedAutoencoderKL
from modules import infotext_utils, script_callbacks, sd_models, shared
from modules_forge import main_entry

spec = importlib.util.spec_from_file_location("toy_sizes", Path(__file__).resolve().parent.parent / "sizes.py")
sizes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sizes)


def shrink(owner, name, change):
    """Pass what `owner.name` returns through `change`, once however often this file runs."""
    original = getattr(owner, name)
    if not hasattr(original, "is_toy"):

        def shrunk(*args, **kwargs):
            return change(original(*args, **kwargs))

        shrunk.is_toy = True
        setattr(owner, name, staticmethod(shrunk) if isinstance(owner, type) else shrunk)


def smaller_flux(guess):
    guess.unet_config.update(sizes.FLUX)
    return guess


def smaller_clip(config):
    config.update(sizes.CLIP)
    return config


shrink(huggingface_guess, "guess", smaller_flux)
shrink(loader, "read_arbitrary_config", lambda config: {**config, **sizes.T5})
shrink(transformers.CLIPTextConfig, "from_pretrained", smaller_clip)
shrink(IntegratedAutoencoderKL, "load_config", lambda config: {**config, **sizes.VAE})


def digests():
    """Of every packed weight that is loaded."""
    objects = sd_models.model_data.get_sd_model().forge_objects
    models = {"unet": objects.unet.model, "clip": objects.clip.cond_stage_model}
    return {
        f"{title}.{name}": hashlib.sha256(p.data.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for title, model in models.items()
        for name, p in model.named_parameters()
        if name.endswith(".weight") and p.data.element_size() == 1
    }


class Allocated(ctypes.Structure):
    """glibc's ``mallinfo2``, of all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def memory():
    """What is alive once all that can go is gone: Graft's objects by class, and bytes of tensors.

    And bytes that the C library has given out, and those that it keeps free for later, which the system counts as the
    process's all the same.
    """
    gc.collect()
    everything = gc.get_objects()
    ours = Counter(type(o).__qualname__ for o in everything if str(type(o).__module__).startswith("graft_gguf."))
    tensors = (o for o in everything if issubclass(type(o), torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Allocated
    found = mallinfo2()
    used = found.uordblks + found.hblkhd
    return {"objects": ours, "tensors": sum(sizes.values()), "used": used, "free": found.fordblks}


def online(on: bool):
    """Forge's own choice between merging LoRAs and keeping them on the layers, as its drop-down list does it."""
    shared.opts.set("forge_unet_storage_dtype", "Automatic (fp16 LoRA)" if on else "Automatic")
    main_entry.refresh_model_loading_parameters()


def overrides(body: dict):
    """What Forge takes for settings of its own in an image's parameters."""
    found = infotext_utils.get_override_settings(infotext_utils.parse_generation_parameters(body["infotext"]))
    return {setting: value for _, setting, value in found}


STARTS = shared.__dict__.setdefault("toy_starts", [])


def add_routes(_, app):
    STARTS.append(1)
    app.add_api_route("/toy/digests", digests, methods=["GET"])
    app.add_api_route("/toy/memory", memory, methods=["GET"])
    app.add_api_route("/toy/online", online, methods=["POST"])
    app.add_api_route("/toy/overrides", overrides, methods=["POST"])
    app.add_api_route("/toy/starts", lambda: len(STARTS), methods=["GET"])
    app.add_api_route("/toy/reload", shared.state.request_restart, methods=["POST"])


script_callbacks.on_app_started(add_routes)
