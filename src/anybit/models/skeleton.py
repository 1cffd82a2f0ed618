"""A model without weights: parameters on `meta`, buffers real, built from its config alone.

Buffers (rotary frequencies, embedding scales) are in no checkpoint and follow from the config, so they are computed
for real while the model class runs; torch's parameter registration hook sends each parameter to `meta` the moment it
is registered. The uninitialised memory of a parameter lives for that moment only and is never touched.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PretrainedConfig

from anybit.errors import InputError


def empty_model(config: PretrainedConfig) -> nn.Module:
    """The causal language model of `config`: float32, eval, parameters on meta, tied parameters still shared.

    The hook is torch-wide: build one skeleton at a time and no other module meanwhile.
    Raises InputError when transformers has no such architecture (code from a checkpoint is never run), or cannot build it with
    these numbers.
    """
    hook: Any = _to_meta  # torch annotates the hook as returning None, and documents the replacement it may return
    handle = register_module_parameter_registration_hook(hook)
    try:
        own = copy.deepcopy(config)  # from_config writes the dtype into it
        model = AutoModelForCausalLM.from_config(own, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # model classes raise whatever a wrong number in their config leads to
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{config.model_type}: not a causal language model transformers can build ({type(error).__name__}: {reason})"
        ) from error
    finally:
        handle.remove()
    return model.eval().requires_grad_(False)


def _to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:  # a tied parameter registered again must stay the same object
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def release(module: nn.Module) -> None:
    """Sends every parameter of `module` back to `meta`, in place; buffers stay (they are small and may be computed)."""
    seen: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in seen:
                seen[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            owner.register_parameter(name, seen[id(parameter)])
