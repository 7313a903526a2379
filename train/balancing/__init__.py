"""Balancers by name; importing the list loads no balancer and no torch."""

from ...audit.registry import Entry, Registry

BALANCERS = Registry(
    {  # a new balancer is one file and one line
        "joint": Entry("balancer:Joint", "cross entropy of the fused prediction: the baseline"),
        "sum": Entry("balancer:Sum", "cross entropy of the fused prediction and of every modality"),
        "modality-dropout": Entry("modality_dropout:ModalityDropout", "modalities of a sample left out at random"),
        "gmm": Entry("gmm:Gmm", "losses by the posterior of the modality gap"),
        "ogm": Entry("ogm:Ogm", "gradients of the modality that is ahead are scaled down"),
        "ogm-ge": Entry("ogm:OgmGe", "as ogm, with noise added to all encoders' gradients"),
        "gblend": Entry("gblend:Gblend", "loss weights by overfitting-to-generalisation ratios"),
        "greedy": Entry("greedy:Greedy", "extra steps of the modality that is learned slowly"),
        "pmr": Entry("pmr:Pmr", "a prototype loss for the weaker modality"),
        "agm": Entry("agm:Agm", "gradients scaled by how far a modality leads in this step, against its mean lead"),
        "mmpareto": Entry("mmpareto:MmPareto", "Pareto combination of unimodal and fused gradients"),
        "mses": Entry("mses:Mses", "early stopping by modality"),
        "mslr": Entry("mslr:Mslr", "learning rates by modality"),
        "mmcosine": Entry("mmcosine:MmCosine", "scaled cosine logits per modality, summed"),
        "lfm": Entry("lfm:Lfm", "fused loss and divergence of the modalities, weighted by the epoch"),
        "reconboost": Entry("reconboost:ReconBoost", "one modality after another learns what the others miss"),
        "relearning": Entry("relearning:Relearning", "encoders that overfit move back towards their initial weights"),
        "dgl": Entry("dgl:Dgl", "encoders by unimodal losses only, the fusion by detached features"),
        "inforeg": Entry("inforeg:InfoReg", "the modality ahead is kept near its weights, while it learns quickly"),
        "aug": Entry("aug:Aug", "further classifiers for the modality that classifies worse"),
        "mla": Entry("mla:Mla", "a shared classifier, trained on one modality after another"),
    },
    package=__name__,
    option="--balancing",
    group="mmaudit.balancers",
)
