"""Samplers by name; importing the list loads no sampler and no torch."""

from ...audit.registry import Entry, Registry

SAMPLERS = Registry(
    {  # a new sampler is one file and one line
        "uniform": Entry("sampler:Uniform", "every sample once per epoch, in random order"),
        "bss-h": Entry("bss:BssH", "the most balanced share of the samples, which grows"),
        "anti-curriculum": Entry("bss:AntiCurriculum", "the least balanced share first: the control of bss-h"),
        "balanced-first": Entry("balanced_first:BalancedFirst", "the share of small discrepancy first, as bss-h"),
        "bss-l": Entry("bss:BssL", "draws by a running balance score of the model in training"),
        "dus-h": Entry("dus:DusH", "more samples of the modality whose cumulative confidence is behind"),
        "dus-rl": Entry("dus_rl:DusRl", "as dus-h, by quantities that a policy learns"),
        "smv": Entry("smv:Smv", "extra copies in modalities of low Shapley value"),
        "remix": Entry("remix:Remix", "each sample trains only the modality that is least sure of it"),
        "class-balanced": Entry("sampler:ClassBalanced", "draws with replacement, every class equally likely"),
        "posterior": Entry("sampler:PosteriorWeighted", "draws by P(balanced) of the manifest"),
    },
    package=__name__,
    option="--sampling",
    group="mmaudit.samplers",
)
