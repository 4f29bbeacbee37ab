"""Weights of which each process holds a part: loaded whole, split by the Trainer (ZeRO-3, FSDP), gathered again."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sf_mllm.errors import InputError
from sf_mllm.training.run_folder import is_main_process


@contextmanager
def whole_weights(arguments: TrainingArguments) -> Iterator[None]:
    """Within this context models are loaded whole in every process; under ZeRO-3 transformers would split them at once.

    Joining parts, taking fingerprints and placing adapters need whole weights. The Trainer splits them afterwards.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def prepare_fsdp(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Let FSDP split the language model only, layer by layer, and leave precision to autocast.

    The tower is small beside it. FSDP's own mixed precision would round all weights for each product, among them those
    that predict coordinates.

    Args:
        plugin: accelerate's settings, changed in place before the model is prepared.
        model: a PEFT model around an SFLlava.

    Raises:
        InputError: the settings cannot load or resume such a model.
    """
    for setting, is_unusable, instead in (
        ("fsdp_version: 1", plugin.fsdp_version == 1, "fsdp_version: 2"),
        (
            f"fsdp_state_dict_type: {plugin.state_dict_type.name}",
            plugin.state_dict_type is not StateDictType.SHARDED_STATE_DICT,  # others hang when a run resumes
            "SHARDED_STATE_DICT",
        ),
        ("fsdp_cpu_ram_efficient_loading: true", plugin.cpu_ram_efficient_loading, "false"),
    ):
        if is_unusable:
            raise InputError(f"{setting} cannot be used; set {instead}, as in configs/accelerate/fsdp2_8_gpus.yaml.")
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    plugin.ignored_modules = r".*\.vision_tower"
    decoder = next(module for name, module in model.named_modules() if name.endswith(".language_model"))
    # The model's own list also names layers of towers that this one does not have, at which accelerate would stop.
    plugin.transformer_cls_names_to_wrap = sorted(decoder._no_split_modules or ())


def has_split_weights(model: nn.Module) -> bool:
    """Whether this process holds only a part of each weight, as under ZeRO-3 and FSDP once training began."""
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every weight that trains, whole and on the CPU; all processes must call this together.

    Returns:
        By parameter name in the main process; nothing in the others.
    """
    gathered = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with _whole(parameter) as weight:
                if is_main_process():
                    gathered[name] = weight.detach().to("cpu", copy=True)
    return gathered


@contextmanager
def _whole(parameter: Tensor) -> Iterator[Tensor]:
    if hasattr(parameter, "ds_id"):
        import deepspeed  # an optional dependency, which is there if it split this weight

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
