"""`build_empty`: a model made from its config alone, on the meta device, without weights and without its own code."""

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from vlreft.models.stacks import sub_configs

OPEN_CLIP = "open_clip:"
# What a config makes that names no class: the first of these that has one for it.
AUTO_CLASSES = (
    *("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    *("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "MODEL_MAPPING",
)
# What constructors raise for values of a config that do not fit together.
MISFITS = (
    *(AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, OSError, RuntimeError),
    *(StrictDataclassError, TypeError, ValueError, ZeroDivisionError),
)


def build_empty(name: str, class_name: str | None = None) -> nn.Module:
    """Make a model from its config, on the meta device: no weights are read, no memory is taken, no foreign code runs.

    name: a folder or a model of the Hub; "open_clip:" before it for open_clip's names, `local-dir:` and `hf-hub:` ids.
    class_name: a class of transformers, by default the one that the config names. Raises ValueError for a config that
    is not there, or that this transformers cannot make a model of.
    """
    if name.startswith(OPEN_CLIP):
        if class_name is not None:
            raise ValueError(f"an open_clip model has no class to choose; leave '{class_name}' out")
        return _empty_open_clip(name.removeprefix(OPEN_CLIP))
    config = _read_model_config(name)
    try:
        model_class = _model_class(config, class_name, name)
        wanted = model_class.config_class
    except ImportError as error:  # transformers has a class that needs a library which is not there
        raise ValueError(f"the class for '{name}' cannot be used: {first_line(error)}") from error
    if isinstance(wanted, type) and not isinstance(config, wanted):
        parts = [part for _, part in sub_configs(config) if isinstance(part, wanted)]
        if len(parts) != 1:
            raise ValueError(
                f"{model_class.__name__} is made from a {wanted.__name__}, '{name}' holds a {type(config).__name__}"
            )
        config = parts[0]
    try:
        with torch.device("meta"):
            return model_class(config)
    except MISFITS as error:
        raise ValueError(
            f"no {model_class.__name__} can be made from the config of '{name}': {first_line(error)}"
        ) from error


def _read_model_config(name: str) -> PreTrainedConfig:
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        hint = "; it holds an adapter, describe its base" if (folder / "reft_config.json").is_file() else ""
        hint = f"; write {OPEN_CLIP}local-dir:{name}" if (folder / "open_clip_config.json").is_file() else hint
        raise ValueError(f"the folder {name} has no config.json{hint}")
    try:
        data, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        if folder.exists():
            raise ValueError(f"the config in {name} is not to be read: {first_line(error)}") from error
        raise ValueError(
            f"'{name}' is neither a folder nor a model in the cache, and could not be fetched from the Hub"
        ) from error
    model_type, version = data.get("model_type"), transformers.__version__
    if not isinstance(model_type, str):
        raise ValueError(f"the config of '{name}' names no model type")
    # Refused here and not by `from_pretrained`, which would ask whether to run the code of the repository.
    if model_type not in transformers.CONFIG_MAPPING:
        raise ValueError(f"transformers {version} has no model type '{model_type}', which the config of '{name}' names")
    try:
        config = AutoConfig.from_pretrained(name)
    except MISFITS as error:
        raise ValueError(f"the config of '{name}' is no config of '{model_type}': {first_line(error)}") from error
    config._attn_implementation = "eager"  # it may ask for a kernel that this machine lacks; nothing is run here
    return config


def _model_class(config: PreTrainedConfig, class_name: str | None, name: str) -> type[PreTrainedModel]:
    if class_name is None and not config.architectures:
        for mapping in AUTO_CLASSES:
            found = getattr(transformers, mapping).get(type(config), None)
            if found is not None:
                return found[0] if isinstance(found, tuple) else found
        raise ValueError(f"the config of '{name}' names no class, and transformers has none for it")
    chosen = class_name or (config.architectures or [""])[0]
    found = getattr(transformers, chosen, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        whose = "" if class_name else f", which the config of '{name}' names"
        raise ValueError(f"transformers {transformers.__version__} has no model class '{chosen}'{whose}")
    return found


def _empty_open_clip(name: str) -> nn.Module:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError("open_clip is not installed; `pip install open_clip_torch`") from error
    if ":" not in name and name.replace("/", "-") not in open_clip.list_models():
        raise ValueError(f"open_clip has no model '{name}'; `open_clip.list_models()` names those it has")
    options: dict[str, Any] = {"load_weights": False, "pretrained_image": False, "pretrained_text": False}
    try:
        found = _open_clip_folder(name)
        try:
            with torch.device("meta"):
                return open_clip.create_model(found, device="meta", **options)
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):
                raise
            return open_clip.create_model(found, **options)  # some constructors read the values they make
    except MISFITS as error:
        raise ValueError(f"open_clip makes no model of '{name}': {first_line(error)}") from error


def _open_clip_folder(name: str) -> str:
    """Return an `hf-hub:` id as a folder with its config: open_clip itself would fetch the weights too."""
    if not name.startswith("hf-hub:"):
        return name
    from huggingface_hub import hf_hub_download

    return f"local-dir:{Path(hf_hub_download(name.removeprefix('hf-hub:'), 'open_clip_config.json')).parent}"


def first_line(error: BaseException) -> str:
    """Return what an exception says first, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:300]
