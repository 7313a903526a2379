"""Pretrained models as encoders that are trained end to end, whole or by low-rank adapters."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from ..audit.errors import ConfigError
from ..audit.features.backbone_inputs import Backbone, InputLayout
from ..audit.features.pretrained import load_model, pooled_output
from .config import LoraConfig

INSTALL_HINT = 'finetune.lora needs peft, which is not installed: pip install "mmaudit[lora]"'


class PretrainedEncoder(nn.Module):
    """A pretrained model on rows (b, d) of its inputs; features (b, num_features), the vectors of `hf:MODEL`.

    What does not reach the features, such as the other tower of CLIP, is removed or not trained. The model's own
    masking of its input in training (SpecAugment of wav2vec2 and Whisper), which draws from NumPy, is off. With
    adapters only these are trained, and the state has no other parameters.
    """

    inputs_standardized = False  # NaN stands for an absent input

    def __init__(self, backbone: Backbone, *, lora: LoraConfig, dropout: float) -> None:
        super().__init__()
        self.backbone = backbone
        model, self._has_pooler = load_model(backbone.model, backbone.kind)
        if getattr(model.config, "apply_spec_augment", False):
            model.config.apply_spec_augment = False
        self.model: nn.Module = model
        self.dropout = nn.Dropout(dropout)
        self.num_features = self._remove_unused()
        self._has_adapters = bool(lora.rank)
        if lora.rank:
            _add_adapters(self.model, lora, name=backbone.model)
        self._register_state_dict_hook(_without_frozen)  # type: ignore[no-untyped-call]
        self.train()

    def forward(self, rows: Tensor) -> Tensor:
        """Compute the features of a batch."""
        if len(rows) == 0:
            return rows.new_zeros(0, self.num_features, dtype=torch.float32)
        output: Tensor = self.dropout(self._features(rows))
        return output

    def _features(self, rows: Tensor) -> Tensor:
        layout, kind = self.backbone.layout, self.backbone.kind
        inputs = to_inputs(rows, layout, kind=kind)
        features: Tensor = pooled_output(self.model, inputs, kind=kind, has_pooler=self._has_pooler)
        return features.view(len(rows), -1, features.shape[1]).mean(dim=1) if layout.by_frame else features

    def _remove_unused(self) -> int:
        """Remove parts that are not called, freeze parameters that the features do not depend on; return their number.

        Both are found by the gradient of the features of one empty input.
        """
        called: set[str] = set()
        children = dict(self.model.named_children())
        hooks = [
            module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in children.items()
        ]
        self.model.eval().requires_grad_(True)
        parameters = list(self.model.parameters())
        blank = torch.full((1, self.backbone.layout.num_features), torch.nan)
        with torch.enable_grad():
            features = self._features(blank)
            gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        for name, module in children.items():
            if name not in called and not any(p.requires_grad for p in module.parameters()):
                setattr(self.model, name, None)
        return features.shape[1]

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass. Raises ConfigError for a model that cannot."""
        model: Any = self.model
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ConfigError(
                f"finetune.gradient_checkpointing: {self.backbone.model} ({type(model).__name__}) does not support it"
            )
        options = {"use_reentrant": False}  # the other form needs an input with a gradient, which adapters do not give
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:  # before transformers 5.23
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Complete a state without frozen parameters by those of the pretrained model."""
        for name, parameter in self.named_parameters() if self._has_adapters else ():
            if not _is_adapter(name):
                state_dict.setdefault(prefix + name, parameter.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _without_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave all parameters but the adapters out of a state where there are adapters."""
    assert isinstance(module, PretrainedEncoder)
    for name, _ in module.named_parameters() if module._has_adapters else ():
        if not _is_adapter(name):
            state.pop(prefix + name, None)


def _is_adapter(name: str) -> bool:
    return "lora_" in name


def to_inputs(rows: Tensor, layout: InputLayout, *, kind: str) -> dict[str, Tensor]:
    """Return the arguments of a model for rows (b, d): pixels normalised, texts cut to the longest of the batch.

    NaN, of an absent input, becomes 0, the mean of normalised pixels and spectrograms; a text without tokens becomes
    one token, number 0.
    """
    if kind == "text":
        tokens = rows.nan_to_num(nan=-1.0).long()
        mask = tokens >= 0
        mask[:, 0] = True
        longest = int(mask.sum(dim=1).max())
        return {layout.name: tokens.clamp(min=0)[:, :longest], "attention_mask": mask.long()[:, :longest]}
    values = rows.view(len(rows), *layout.shape).float()
    if layout.scale is not None:
        mean, deviation = (
            torch.tensor(entries, device=rows.device)[:, None, None] for entries in (layout.mean, layout.deviation)
        )
        values = (values * layout.scale - mean) / deviation
    values = values.nan_to_num(nan=0.0)
    return {layout.name: values.flatten(0, 1) if layout.by_frame else values}


def check_lora(lora: LoraConfig) -> None:
    """Raise ConfigError where adapters are configured and peft is not installed."""
    if lora.rank and importlib.util.find_spec("peft") is None:
        raise ConfigError(INSTALL_HINT)


def _add_adapters(model: nn.Module, lora: LoraConfig, *, name: str) -> None:
    """Add adapters to a model's layers, with random weights of torch's generator; only they are trained."""
    check_lora(lora)
    import peft

    targets: Any = list(lora.target_modules) or [
        key for key, module in model.named_modules() if isinstance(module, nn.Linear)
    ]
    options: dict[str, Any] = {"lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": targets}
    config = peft.LoraConfig(r=lora.rank, bias="none", **options)
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        layers = sorted({key.rpartition(".")[2] for key, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise ConfigError(
            f"finetune.lora.target_modules: no layer of {name} is named {', '.join(lora.target_modules)}; its linear "
            f"layers are {', '.join(layers)}"
        ) from error
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(key))
