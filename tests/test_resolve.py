"""Tests of the methods of a fine-tuning: what they need of each other, their configs, and the table of them."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from itertools import product
from typing import Any

import pytest

from mmaudit.audit.errors import ConfigError
from mmaudit.rebalance.curriculum import OrderConfig
from mmaudit.train import FUSIONS
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.balancing.balancer import Balancer
from mmaudit.train.balancing.ogm import OgmConfig
from mmaudit.train.config import FinetuneConfig, OptimConfig, TrainConfig
from mmaudit.train.fusion import Fusion
from mmaudit.train.methods import check_schedule, list_methods, resolve
from mmaudit.train.sampling import SAMPLERS
from mmaudit.train.sampling.sampler import Sampler


def warnings_of(config: TrainConfig) -> list[str]:
    return check_schedule(resolve(config))


# Requirements of each method, stated independently of the source.
HAS_UNIMODAL_LOSS = {"sum", "gmm", "gblend", "pmr", "mmpareto", "mses", "mslr", "dgl", "inforeg", "mla", "aug"}
ONE_MODALITY = {"joint", "sum"}
FUSION_OF: dict[str, set[str]] = {
    "greedy": {"mmtm", "mmtm-stages"},
    "mla": {"shared"},
    "mmcosine": set(),
    "reconboost": set(),
    "aug": set(),
}
PER_MODALITY_SAMPLERS = {"dus-h", "dus-rl"}


def is_valid(fusion: str, sampling: str, balancing: str, only: str | None) -> bool:
    if fusion != "auto" and fusion not in FUSION_OF.get(balancing, set(FUSIONS) - {"shared", "mmtm-stages"}):
        return False
    if sampling in PER_MODALITY_SAMPLERS and balancing not in HAS_UNIMODAL_LOSS:
        return False
    if only is None:
        return True
    is_unimodal = balancing in ONE_MODALITY and sampling not in {*PER_MODALITY_SAMPLERS, "smv", "remix"}
    return is_unimodal and fusion in ("auto", "concat", "late")


def test_every_combination_is_accepted_or_raises() -> None:
    num_valid = 0
    for fused, sampling, balancing, only in product(("auto", *FUSIONS), SAMPLERS, BALANCERS, (None, "audio")):
        options: dict[str, Any] = {"fusion": fused, "sampling": sampling, "balancing": balancing, "only": only}
        if is_valid(**options):
            resolve(TrainConfig(finetune=FinetuneConfig(**options)))
            num_valid += 1
        else:
            with pytest.raises(ConfigError, match=f"--balancing {balancing}|--only {only}"):
                resolve(TrainConfig(finetune=FinetuneConfig(**options)))
    assert num_valid > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"balancing": "greedy", "fusion": "concat"},
            "--balancing greedy does not support --fusion concat: it measures and cuts the cross-modal path, which no "
            "other fusion has; use --fusion mmtm or mmtm-stages",
        ),
        (
            {"balancing": "mla", "fusion": "late"},
            "--balancing mla does not support --fusion late: it trains one classifier that all modalities share, one "
            "modality after another; use --fusion shared",
        ),
        (
            {"balancing": "ogm", "fusion": "shared"},
            "--balancing ogm does not support --fusion shared: a shared classifier is trained one modality at a time, "
            "which only mla does; use --fusion concat or late or gated or gated-unit or film or film-projected "
            "or mmtm",
        ),
        (
            {"sampling": "dus-h", "balancing": "ogm"},
            "--sampling dus-h selects samples per modality, and --balancing ogm has no unimodal loss that trains on "
            "them; use --balancing sum, gmm, gblend, pmr, mmpareto, mses, mslr, dgl, inforeg, aug, mla",
        ),
        (
            {"answer": "heads"},
            "finetune.answer = heads has no effect: the fused logits of --fusion concat are the sum of the unimodal "
            "ones; give the modalities heads of their own with --set finetune.own_heads=true",
        ),
        (
            {"only": "audio", "balancing": "pmr"},
            "--only audio leaves one modality, and --balancing pmr needs at least 2; use --balancing joint",
        ),
        (
            {"only": "audio", "sampling": "smv"},
            "--only audio leaves one modality, and --sampling smv needs at least 2",
        ),
        (
            {"only": "audio", "sampling": "dus-rl", "balancing": "sum"},
            "--only audio leaves one modality, and --sampling dus-rl needs at least 2",
        ),
        (
            {"only": "audio", "fusion": "film"},
            "--only audio leaves nothing to fuse: remove --fusion film",
        ),
    ],
)
def test_error_states_the_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(TrainConfig(finetune=FinetuneConfig(**options)))
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("balancing", "fused", "expected"),
    [("joint", "auto", "concat"), ("greedy", "auto", "mmtm"), ("mla", "auto", "shared"), ("gmm", "late", "late")],
)
def test_auto_fusion_follows_from_the_method(balancing: str, fused: str, expected: str) -> None:
    config = TrainConfig(finetune=FinetuneConfig(balancing=balancing, fusion=fused))
    assert resolve(config).config.finetune.fusion == expected


@pytest.mark.parametrize("mode", ["keep", "smooth"])
def test_mslr_keep_and_smooth_require_modality_rates(mode: str) -> None:
    balancing = {"mslr": {"mode": mode}}
    mslr, optim = FinetuneConfig(balancing="mslr"), OptimConfig(modality_lr=("audio=0.1",))
    with pytest.raises(ConfigError, match=f"balancing.mslr.mode = {mode} starts from the rates of optim.modality_lr"):
        resolve(TrainConfig(finetune=mslr, balancing=balancing))
    resolve(TrainConfig(finetune=mslr, balancing=balancing, optim=optim))
    resolve(TrainConfig(finetune=mslr))
    resolve(TrainConfig(balancing=balancing))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fusion": "conct"}, r"--fusion conct: no such name; did you mean concat\? .*late"),
        ({"sampling": "bss"}, r"--sampling bss: .*bss-h"),
        ({"balancing": "ogmge"}, r"--balancing ogmge: no such name; did you mean ogm-ge\? .*mmpareto"),
    ],
)
def test_unknown_method_raises_with_the_nearest(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(TrainConfig(finetune=FinetuneConfig(**options)))


def test_last_epoch_before_first_epoch_raises() -> None:
    with pytest.raises(ConfigError, match=r"balancing.ogm.first_epoch is 55, after last_epoch 51"):
        OgmConfig(first_epoch=55)
    assert OgmConfig(first_epoch=51).last_epoch == 51


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"epochs": 10, "sampling": "bss-h"},
            r"uses 50\.7% .* last one and never the rest; it uses all of them from epoch 40",
        ),
        ({"epochs": 39, "sampling": "anti-curriculum"}, r"uses 98\.7% "),
        (
            {"epochs": 5, "sampling": "smv", "balancing": "sum"},
            "smv starts in epoch 6 .*; until then it is uniform",
        ),
        ({"epochs": 10, "balancing": "gmm"}, r"gmm starts in epoch 11 \(balancing.gmm.warmup_epochs\); .* it is sum"),
        ({"epochs": 2, "balancing": "ogm"}, "ogm starts in epoch 3 .* it is joint"),
        ({"epochs": 2, "balancing": "ogm-ge"}, "ogm-ge starts in epoch 3"),
        ({"epochs": 5, "optim": OptimConfig(warmup_epochs=5)}, "is at its full value only from epoch 6 on"),
        ({"epochs": 70, "optim": OptimConfig(schedule="step")}, "falls only after epoch 70 .*constant"),
    ],
)
def test_setting_that_never_starts_gives_a_warning(options: dict[str, Any], message: str) -> None:
    optim, finetune = options.pop("optim", OptimConfig()), FinetuneConfig(**options)
    balancing = {"ogm": {"first_epoch": 3}}
    config = TrainConfig(finetune=finetune, optim=optim, balancing=balancing)
    (warning,) = warnings_of(config)
    assert re.search(f"^{finetune.epochs} epochs are too few: .*{message}", warning)
    longer = {**options, "epochs": finetune.epochs + 1}
    assert warnings_of(TrainConfig(finetune=FinetuneConfig(**longer), optim=optim, balancing=balancing)) == [] or (
        finetune.sampling == "bss-h"  # it needs 30 more
    )


def test_share_just_below_1_gives_a_warning() -> None:
    config = TrainConfig(finetune=FinetuneConfig(epochs=999, sampling="bss-h"), order=OrderConfig(grow_epochs=1000))
    (warning,) = warnings_of(config)
    assert "uses 99.9% of" in warning


def test_unused_settings_give_no_warning() -> None:
    assert warnings_of(TrainConfig(finetune=FinetuneConfig(epochs=1))) == []
    assert warnings_of(TrainConfig(finetune=FinetuneConfig(sampling="bss-h", balancing="gmm"))) == []  # the defaults


@pytest.mark.parametrize(
    ("options", "balancing", "words"),
    [
        ({}, "joint", None),
        ({"sampling": "bss-h"}, "joint", None),
        ({"sampling": "dus-h"}, "sum", "--sampling dus-h takes --balancing sum: it selects samples per modality"),
        ({"sampling": "dus-rl"}, "sum", "--sampling dus-rl takes --balancing sum"),
        ({"fusion": "shared"}, "mla", "--fusion shared takes --balancing mla: a shared classifier is trained"),
        ({"sampling": "dus-h", "fusion": "shared"}, "mla", "--fusion shared takes --balancing mla"),
        ({"sampling": "dus-h", "balancing": "gmm"}, "gmm", None),
    ],
)
def test_auto_balancing_is_the_fitting_one_and_logged(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], balancing: str, words: str | None
) -> None:
    with caplog.at_level(logging.INFO, logger="mmaudit"):
        config = resolve(TrainConfig(finetune=FinetuneConfig(**options))).config
    assert config.finetune.balancing == balancing
    assert [words in message for message in caplog.messages if words] == ([True] if words else [])
    assert len(caplog.messages) == (words is not None)


def test_only_the_first_process_of_torchrun_logs_the_choice(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, num_messages in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        with caplog.at_level(logging.INFO, logger="mmaudit"):
            assert resolve(TrainConfig(finetune=FinetuneConfig(sampling="dus-h"))).config.finetune.balancing == "sum"
        assert len(caplog.messages) == num_messages


@pytest.mark.parametrize("sampling", SAMPLERS)
@pytest.mark.parametrize("balancing", ["auto", "sum", "mla"])
def test_resolved_config_resolves_to_itself(sampling: str, balancing: str) -> None:
    resolved = resolve(TrainConfig(finetune=FinetuneConfig(sampling=sampling, balancing=balancing))).config
    assert resolve(resolved).config == resolved
    assert "auto" not in (resolved.finetune.balancing, resolved.finetune.fusion)


def test_resolved_sections_have_all_constants_of_the_methods_in_use_only() -> None:
    finetune = FinetuneConfig(sampling="bss-l", balancing="ogm-ge")
    sections: dict[str, dict[str, Any]] = {"ogm": {"alpha": 1}, "gmm": {"lam_gap": 2.0}}
    methods = resolve(TrainConfig(finetune=finetune, balancing=sections))
    assert methods.balancer_config == OgmConfig(alpha=1.0)
    assert methods.config.balancing == {"ogm": {"alpha": 1.0, "first_epoch": 1, "last_epoch": 51}}
    bss = {"score_source": "auto", "every_epochs": 8, "beta": 0.6, "alpha": 1.0}
    assert methods.config.sampling == {"bss": bss}
    unused = resolve(TrainConfig(balancing=sections)).config
    assert (unused.sampling, unused.balancing) == ({}, {})


@pytest.mark.parametrize(
    ("axis", "sections", "words"),
    [
        ("balancing", {"ogmm": {}}, r"no config key balancing.ogmm; did you mean balancing.ogm\?"),
        ("balancing", {"ogm": {"alfa": 1}}, r"no config key balancing.ogm.alfa; did you mean balancing.ogm.alpha\?"),
        ("balancing", {"ogm": {"section": "x"}}, "no config key balancing.ogm.section"),
        ("balancing", {"ogm": 3}, r"config key balancing.ogm is a section; set balancing.ogm.KEY"),
        ("balancing", {"pmr": {"alpha": "x"}}, "config key balancing.pmr.alpha is 'x'; it must be of type float"),
        ("balancing", {"gmm": {"fit_rows": 3}}, r"balancing.gmm.fit_rows is 3; it must lie in \[10, 1e12\]"),
        ("sampling", {"bbs": {}}, r"no config key sampling.bbs; did you mean sampling.bss\?"),
        ("sampling", {"dus": {"kappa": -1.0}}, "sampling.dus.kappa is -1.0; it must be at least 0"),
        ("sampling", {"smv": {"every_epochs": 0}}, "sampling.smv.every_epochs is 0; it must be at least 1"),
        ("sampling", {"bss": {"beta": 0.0}}, r"sampling.bss.beta is 0.0; it must lie in \(0, 1\]"),
    ],
)
def test_section_key_or_value_that_does_not_exist_raises(axis: str, sections: dict[str, Any], words: str) -> None:
    """Also where the method is not in use."""
    options: dict[str, Any] = {axis: sections}
    with pytest.raises(ConfigError, match=words):
        resolve(TrainConfig(**options))


@pytest.mark.parametrize(
    ("registry", "base"), [(SAMPLERS, Sampler), (BALANCERS, Balancer), (FUSIONS, Fusion)], ids=["s", "b", "f"]
)
def test_every_method_is_a_class_that_can_be_built(registry: Any, base: type[Any]) -> None:
    for name in registry:
        assert issubclass(registry.load(name), base)
        assert not registry.load(name).__abstractmethods__


def test_fusions_that_methods_name_exist() -> None:
    for name in BALANCERS:
        balancer = BALANCERS.load(name)
        assert set(balancer.fusions) <= set(FUSIONS)
        assert balancer.fusions or balancer.own_fusion


def test_table_lists_every_method_with_the_meaning_of_its_constants() -> None:
    rows = list_methods()
    assert [row.name for row in rows] == [*SAMPLERS, *BALANCERS, *FUSIONS]
    by_name = {row.name: row for row in rows}
    assert all(key.meaning.endswith((".", ")")) for row in rows for key in row.keys)
    ogm = {key.key: (key.default, key.meaning) for key in by_name["ogm-ge"].keys}
    assert ogm["balancing.ogm.first_epoch"] == (1, "First epoch with modulation, from 1.")
    assert by_name["ogm-ge"].paper == "Peng et al., CVPR 2022"
    assert by_name["dus-h"].needs == ("2 modalities", "unimodal losses, such as --balancing sum")
    assert by_name["greedy"].needs == ("2 modalities", "--fusion mmtm or mmtm-stages")
    assert by_name["shared"].needs == ("--balancing mla",)
    order_keys = [key.key for key in by_name["bss-h"].keys]
    assert [key for key in order_keys if key.startswith("order.")] == [
        *("order.pacing", "order.start", "order.grow_epochs", "order.steps")
    ]
    assert "sampling.bss.score_source" in order_keys


def test_names_and_help_need_no_torch() -> None:
    code = "import sys; from mmaudit.train.methods import list_methods; list_methods(details=False)"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


@pytest.mark.parametrize(
    "options", [{"own_heads": True}, {"fusion": "gated"}, {"balancing": "gblend"}, {"fusion": "mmtm"}]
)
def test_answers_that_differ_are_accepted(options: dict[str, Any]) -> None:
    for answer in ("heads", "all"):
        assert resolve(TrainConfig(finetune=FinetuneConfig(answer=answer, **options))).config.finetune.answer == answer


def test_weights_of_the_summed_losses_must_leave_one() -> None:
    with pytest.raises(ConfigError, match=r"balancing.sum.fused_weight and .* both 0: nothing would be trained"):
        resolve(TrainConfig(balancing={"sum": {"fused_weight": 0.0, "unimodal_weight": 0.0}}))
    with pytest.raises(ConfigError, match=r"balancing.mses.unimodal_weight is -1.0; it must lie in \[0, inf\)"):
        resolve(TrainConfig(balancing={"mses": {"unimodal_weight": -1.0}}))
