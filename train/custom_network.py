"""Networks of the user: what one must have, and its form for balancers and for fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..audit.errors import ConfigError, MmauditError, TrainError
from ..audit.features.encoders import load_function
from ..audit.probes.crops import to_pictures
from .fusion import Fusion
from .network import FusionNet, ModelConfig, Outputs
from .network_encoders import VectorStandardization


@runtime_checkable
class MultimodalModel(Protocol):
    """What a network of yours must have for `balance` and `finetune --model`: any nn.Module with these attributes.

    The fused logits are `fuse` of the features of all modalities. A network may also have
    `unimodal_logits(features) -> (m, b, k)`, the logits of each modality alone; without it, methods that need them give
    each modality a linear head of its own, trained on features without gradient.

    Logits of label sets are those of the sigmoid of each label. Of a regression there is one, k = 1: the number itself,
    in `finetune` in standard deviations of the training targets from their mean. `unimodal_logits` of a regression
    predict the whole number by each modality, not parts of a sum.

    Attributes:
        encoders: Encoder of each modality by name, such as an nn.ModuleDict: inputs (b, ...) to features (b, d_j).
        num_features: Number of features d_j of each modality, by name.
        num_classes: Number of outputs k: of classes, of labels, or 1 of a regression.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.num_features, self.num_classes = {"audio": 64, "image": 64}, 10
        ...         self.encoders = nn.ModuleDict({"audio": nn.Linear(40, 64), "image": nn.Linear(512, 64)})
        ...         self.head = nn.Linear(128, 10)
        ...     def fuse(self, features):
        ...         return self.head(torch.cat(features, dim=1))
        ...     def forward(self, inputs):
        ...         return self.fuse([encoder(inputs[name]) for name, encoder in self.encoders.items()])
    """

    encoders: Mapping[str, nn.Module]
    num_features: Mapping[str, int]
    num_classes: int

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the fused logits (b, k) of features, m of (b, d_j); those of an absent modality are 0."""


class PictureStandardization(nn.Module):
    """Standardisation of pictures and spectrograms by channel, from rows (b, d) or pictures (b, f, c, h, w)."""

    inputs_standardized = False
    mean: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        num_channels = 1 if len(shape) == 2 else shape[-1]
        self.register_buffer("mean", torch.zeros(num_channels, 1, 1))
        self.register_buffer("scale", torch.ones(num_channels, 1, 1))

    def standardise_by(self, mean: Tensor, scale: Tensor) -> None:
        """Set mean and standard deviation of each channel (c,); the scale of a constant channel is 1."""
        self.mean.copy_(mean[:, None, None])
        self.scale.copy_(torch.where(scale > 1e-6 * mean.abs(), scale, 1.0)[:, None, None])  # smaller is rounding

    def forward(self, rows: Tensor) -> Tensor:
        """Return standardised pictures in the form of `input_shape`, (b, c, h, w) or (b, f, c, h, w)."""
        pictures = rows if rows.ndim == 5 else to_pictures(rows, self.shape)
        pictures = ((pictures.float() - self.mean) / self.scale).nan_to_num(nan=0.0)
        return pictures if len(self.shape) == 4 else pictures.squeeze(1)


def input_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an encoder's input, without the batch, for rows of a shape.

    Vectors (d,); spectrograms (1, mel, t) of (mel, t); images (c, h, w) of (h, w, c); frames (f, c, h, w).
    """
    if len(shape) == 1:
        return shape
    return (1, *shape) if len(shape) == 2 else (*shape[:-3], shape[-1], *shape[-3:-1])


class CustomEncoder(nn.Module):
    """An encoder of the user's network, and its number of features. standardization: of its inputs, before it."""

    def __init__(
        self, module: nn.Module, *, name: str, num_features: int, standardization: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.module, self.name, self.num_features = module, name, num_features
        self.standardization = standardization
        self._dtype: torch.dtype | None = None

    @property
    def inputs_standardized(self) -> bool:
        """Whether an input of 0 stands for an absent one, not NaN."""
        return self.standardization is None or bool(self.standardization.inputs_standardized)

    def forward(self, rows: Tensor) -> Tensor:
        """Compute the features (b, d). Raises TrainError for another shape."""
        self._dtype = self._dtype or rows.dtype
        if self.standardization is not None:
            rows = self.standardization(rows)
        elif not self._dtype.is_floating_point:
            rows = rows.to(self._dtype)
        with _running_means(self.module.modules(), size=len(rows)):
            features: Tensor = self.module(rows)
        if features.shape != (len(rows), self.num_features):
            raise TrainError(
                f"the encoder of {self.name} returns features of shape {tuple(features.shape)}, must be "
                f"({len(rows)}, {self.num_features}) as in num_features"
            )
        return features


class CustomFusion(Fusion):
    """All of the user's network but its encoders."""

    min_modalities = 1
    decomposes = False

    def __init__(self, model: nn.Module, encoders: Sequence[nn.Module]) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.decomposes = callable(getattr(model, "unimodal_logits", None))  # type: ignore[misc]
        inside = {id(module) for encoder in encoders for module in encoder.modules()}
        object.__setattr__(self, "_outside", [module for module in model.modules() if id(module) not in inside])
        self._encoder_weights = {id(weight) for encoder in encoders for weight in encoder.parameters()}

    _outside: list[nn.Module]
    _modes: list[bool] | None = None

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that are in no encoder, with their names in this module."""
        for name, parameter in super().named_parameters(*args, **options):
            if id(parameter) not in self._encoder_weights:
                yield name, parameter

    def train(self, mode: bool = True) -> CustomFusion:
        """Set training or eval mode of all modules outside the encoders; see `CustomNet.train`."""
        if self.training and not mode:
            self._modes = [module.training for module in self._outside]
        for module, training in zip(self._outside, self._modes or [True] * len(self._outside), strict=True):
            module.training = mode and training
        self.training = mode
        return self

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the fused logits (b, k)."""
        with _running_means(self._outside, size=len(features[0])):
            return self.model.fuse(tuple(features))  # type: ignore[operator, no-any-return]

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the unimodal logits (m, b, k)."""
        with _running_means(self._outside, size=len(features[0])):
            logits: Tensor = self.model.unimodal_logits(tuple(features))  # type: ignore[operator]
        return logits


@contextmanager
def _running_means(modules: Iterable[nn.Module], *, size: int) -> Iterator[None]:
    """Use the running means of batch normalisation where the batch is one sample, which has no variance."""
    training = [module for module in modules if isinstance(module, _BatchNorm) and module.training] if size == 1 else []
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


class CustomNet(FusionNet):
    """The user's network in the form of mmaudit's own, for balancers and for fine-tuning.

    It registers the network itself, the separate heads and the standardisation of inputs; `encoders` and `fusion` are
    views of the network's parts.

    Args:
        model: The network, see MultimodalModel.
        heads: Give each modality a separate head.
        config: Architecture, see `custom_config` for that of a network in a loop of the user's. Inputs whose shapes it
            has are standardised.
    """

    def __init__(self, model: nn.Module, *, heads: bool, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        check_model(model)
        self.model: nn.Module = model
        assert isinstance(model, MultimodalModel)
        names, num_classes = tuple(model.encoders), int(model.num_classes)
        self.config = config
        self.standardization = nn.ModuleList(
            VectorStandardization(shape[0]) if len(shape) == 1 else PictureStandardization(shape)
            for shape in config.shapes
        )
        encoders = [
            CustomEncoder(
                model.encoders[name],
                name=name,
                num_features=int(model.num_features[name]),
                standardization=self.standardization[j] if config.shapes else None,
            )
            for j, name in enumerate(names)
        ]
        object.__setattr__(self, "encoders", nn.ModuleList(encoders))
        object.__setattr__(self, "fusion", CustomFusion(model, encoders))
        self.has_own_heads = heads
        sizes = [encoder.num_features for encoder in encoders] if heads else []
        device = next(model.parameters()).device
        self.heads = nn.ModuleList(nn.Linear(size, num_classes, device=device) for size in sizes)
        self._frozen = frozenset()
        self._register_target_moments(device)
        self._modes: list[tuple[nn.Module, bool]] | None = None

    def standardizations(self) -> list[nn.Module]:
        """Return the module that standardises the inputs of each modality."""
        return list(self.standardization)

    def train(self, mode: bool = True) -> CustomNet:
        """Set training or eval mode; after eval mode each module gets the mode of before: some may be frozen."""
        if self.training and not mode:
            self._modes = [(module, module.training) for module in (*self.modules(), self.fusion)]
        super().train(mode)
        self.fusion.training = mode
        for module, training in self._modes or () if mode else ():
            module.training = training
        for j in self._frozen:
            self.encoders[j].eval()
        return self

    def follow_mode(self) -> None:
        """Set the mode of the views to that of the user's network; frozen encoders stay in eval mode."""
        self.training = self.fusion.training = self.model.training
        for j in self._frozen:
            self.encoders[j].eval()


def custom_config(model: nn.Module, *, task: str, regression_loss: str) -> ModelConfig:
    """Return the architecture of a network in a loop of the user's, where shapes and names of classes are unknown."""
    check_model(model)
    assert isinstance(model, MultimodalModel)
    classes = tuple(map(str, range(int(model.num_classes))))
    return ModelConfig(
        modalities=tuple(model.encoders), shapes=(), classes=classes, task=task, regression_loss=regression_loss
    )


def check_model(model: nn.Module) -> None:
    """Raise ConfigError where a network lacks what MultimodalModel has."""
    name = type(model).__name__
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ConfigError("pass the network itself, model.module: gradients are summed over the processes here")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} is no nn.Module")
    missing = [key for key in ("encoders", "num_features", "num_classes", "fuse") if not hasattr(model, key)]
    if missing:
        raise ConfigError(
            f"the network {name} lacks {', '.join(missing)}; see mmaudit.MultimodalModel for their meaning"
        )
    assert isinstance(model, MultimodalModel)
    if {*model.encoders} != {*model.num_features}:
        raise ConfigError(
            f"the network {name} has encoders of {', '.join(model.encoders)} and num_features of "
            f"{', '.join(model.num_features)}: the names must be the same"
        )
    registered = {id(parameter) for parameter in model.parameters()}
    if unregistered := [
        key for key, part in model.encoders.items() if not {id(p) for p in part.parameters()} <= registered
    ]:
        raise ConfigError(f"the encoder of {unregistered[0]} is no part of {name}: put it into an nn.ModuleDict")


@contextmanager
def in_eval_mode(net: CustomNet) -> Iterator[None]:
    """Put all modules into eval mode, and restore each one's mode."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


def build_custom(config: ModelConfig) -> CustomNet:
    """Build the network of the factory `config.model`, with random weights.

    Raises ConfigError where the factory raises, or its network does not have the modalities and outputs of the samples.
    """
    assert config.model is not None
    factory: Callable[..., Any] = load_function(config.model)
    try:
        model = factory(config.modalities, tuple(map(input_shape, config.shapes)), len(config.classes))
    except Exception as error:  # user code may raise anything
        raise ConfigError(f"{config.model} raised {type(error).__name__}: {error}") from error
    check_model(model)
    if tuple(model.encoders) != config.modalities:
        raise ConfigError(
            f"the network of {config.model} has encoders of {', '.join(model.encoders)}; they must be those of the "
            f"modalities, in their order: {', '.join(config.modalities)}"
        )
    if model.num_classes != len(config.classes):
        kind = {"multilabel": "labels", "regression": "number"}.get(config.task, "classes")
        raise ConfigError(
            f"the network of {config.model} has num_classes {model.num_classes}, and the samples have "
            f"{len(config.classes)} {kind}"
        )
    has_logits = callable(getattr(model, "unimodal_logits", None))
    return CustomNet(model, heads=config.own_heads or not has_logits, config=config)


def check_target(label: Tensor, config: ModelConfig) -> Tensor:
    """Return the target of a batch as `FusionNet.loss_of` has it; ConfigError where it is none of the task."""
    num_outputs, expected = len(config.classes), "a class per sample (b,), as int64"
    if config.task == "classification":
        if label.ndim == 1 and label.dtype == torch.int64:
            return label
    elif config.task == "multilabel":
        expected = f"0 or 1 for each label (b, {num_outputs})"
        if label.ndim == 2 and label.shape[1] == num_outputs:
            return label.float()
    else:
        expected = "a number per sample, (b,) or (b, 1)"
        if label.ndim == 1 or (label.ndim == 2 and label.shape[1] == 1):
            return label.float().view(-1, 1)
    received = f"label has shape {tuple(label.shape)} and type {label.dtype}"
    raise ConfigError(f"{received}; the task {config.task} has {expected}")


def check_whole_numbers(net: FusionNet, outputs: Outputs) -> None:
    """Raise ConfigError where the user's unimodal predictions of a regression are parts of a sum.

    Each would be tested on a part of the number. Outputs without unimodal logits are not checked.
    """
    if net.config.task != "regression" or net.has_own_heads or net.num_modalities == 1 or outputs.is_fused_only:
        return
    fused, total = outputs.fused.detach(), outputs.unimodal.detach().sum(dim=0)
    size = outputs.unimodal.detach().abs().sum(dim=0).max()
    if size > 0 and bool(((fused - total).abs() <= 1e-4 * size).all()):  # half precision of inputs does not matter
        raise ConfigError(
            "unimodal_logits add up to the fused logits, so that each is a part of the number and not a prediction of "
            "it: without unimodal_logits each modality gets a head of its own"
        )


def check_first_pass(net: FusionNet, read: Callable[[Callable[[Outputs, Tensor], Tensor]], Tensor]) -> None:
    """Evaluate some samples; ConfigError where the user's network raises or its logits have another shape.

    read: evaluates a function of outputs and label on the samples. Other networks are not evaluated.
    """
    if not isinstance(net, CustomNet):
        return
    m, k = net.num_modalities, len(net.config.classes)

    def check_shapes(outputs: Outputs, label: Tensor) -> Tensor:
        for name, logits, shape in (
            ("fuse", outputs.fused, (len(label), k)),
            ("unimodal_logits", outputs.unimodal, (m, len(label), k)),
        ):
            if logits.shape != shape:
                raise ConfigError(f"{name} returns logits of shape {tuple(logits.shape)}, must be {shape}")
        check_whole_numbers(net, outputs)
        return outputs.fused.float().sum(dim=1)

    try:
        read(check_shapes)
    except MmauditError as error:
        raise ConfigError(f"the network of {net.config.model} cannot be trained: {error}") from error
    except Exception as error:  # user code may raise anything
        raise ConfigError(
            f"the network of {net.config.model} raised {type(error).__name__} on the first samples: {error}"
        ) from error
