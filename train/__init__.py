"""Fine-tuning on manifests; FUSIONS and TRACKERS by name, without an import of torch."""

from __future__ import annotations

from ..audit.registry import Entry, Registry

FUSIONS = Registry(
    {
        "concat": Entry("fusion:Concat", "one linear classifier over the joined features"),
        "late": Entry("fusion:Late", "a classifier per modality, logits summed"),
        "gated": Entry("fusion:Gated", "the first modality gates the others, as in OGM-GE's code"),
        "gated-unit": Entry("fusion:GatedUnit", "gated multimodal unit"),
        "film": Entry("fusion:Film", "the first modality scales and shifts the others, as in OGM-GE's code"),
        "film-projected": Entry("fusion:FilmProjected", "as film, after a layer that projects each modality"),
        "mmtm": Entry("cross_modal:Mmtm", "cross-modal squeeze, and a classifier per modality, logits averaged"),
        "mmtm-stages": Entry("cross_modal:MmtmStages", "as mmtm, after three stages of ResNet-18, as in Greedy's code"),
        "shared": Entry("fusion:Shared", "one classifier for all modalities, weighted by entropy or fixed"),
    },
    package=__name__,
    option="--fusion",
)
TRACKERS = Registry(
    {
        "tensorboard": Entry("tracking:TensorBoard", "event files in the folder of the fine-tuning"),
        "wandb": Entry("tracking:Wandb", "Weights & Biases"),
        "mlflow": Entry("tracking:Mlflow", "MLflow"),
    },
    package=__name__,
    option="--report-to",
)
