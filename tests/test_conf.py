"""Everything in conf/ composes, is accepted by what it configures, and says what its sources say."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from decoders import write_decoder
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from small import ROOT

from hydra_plugins.plato2_sweep import dimension, resolved
from plato2.commands.train import refuse_unknown
from plato2.config import UserError
from plato2.runs.build import build, check_arguments
from plato2.runs.folder import RunFolder
from plato2.runs.loggers import build_loggers
from plato2.runs.parts import build_parts
from plato2.runs.space import in_hydras_words
from plato2.stages import known_stages

STAGES = known_stages()

CONF = ROOT / "conf"
MODELS = ["tiny", "small", "93m", "314m", "1.6b", "336m_zh", "pretrained", "pretrained_lora"]
Compose = Callable[..., DictConfig]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def model_keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What chooses a model on the command line; the pretrained one needs a decoder's folder."""

    @cache
    def path() -> Path:
        return write_decoder(tmp_path_factory.mktemp("decoder"), max_position_embeddings=256)

    return lambda model: [f"model={model}", *([f"model.path={path()}"] if "pretrained" in model else [])]


@pytest.fixture
def compose() -> Any:
    """The configuration of a command line, with the choices that its interpolations read."""

    def composed(*overrides: str) -> DictConfig:
        config = hydra.compose("train", overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            composed.hydra = config.pop("hydra")  # type: ignore[attr-defined]
        return config

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield composed
    HydraConfig.instance().cfg = None


def built(config: DictConfig) -> tuple[Any, Any, Any]:
    """Keys, stage without memory for its weights, and data module of a configuration."""
    refuse_unknown(config)
    keys: Any = OmegaConf.to_object(config)
    keys.plan = True
    stage, _, data = build_parts(keys)
    return keys, stage, data


# ------------------------------------------------------------------------------------ all that can be chosen


@pytest.mark.parametrize("stage", options("stage"))
@pytest.mark.parametrize("model", options("model"))
def test_every_recipe_builds(
    compose: Compose, model_keys: Callable[[str], list[str]], model: str, stage: str
) -> None:
    keys, module, data = built(compose(*model_keys(model), f"stage={stage}"))
    assert type(module) is STAGES[module.name]
    assert stage in (module.name, f"{module.name}_{getattr(module, 'head', '')}")
    assert keys.name == f"{model}-{stage}"
    assert all(parameter.is_meta for parameter in module.parameters())
    assert data.batch_tokens == keys.optim.batch_tokens
    assert data.units_per_step >= 1
    assert (CONF / "recipe" / f"{model}-{stage}.yaml").exists()


def test_no_group_is_forgotten() -> None:
    tested = {
        "model",
        "stage",
        "recipe",
        "data",
        "optim",
        "trainer",
        "strategy",
        "logger",
        "callbacks",
        "experiment",
        "sweep",
        "hydra",  # tests/test_slurm.py
    }
    assert {path.name for path in CONF.iterdir() if path.is_dir()} - {"local"} == tested
    assert options("model") == sorted(MODELS)
    stages = [*STAGES, "2_eval_dual", "2_eval_pmi"]
    assert options("stage") == sorted(stages)
    recipes = {f"{model}-{stage}" for model in MODELS for stage in stages}
    recipes |= {f"evening-{stage}" for stage in stages if stage not in ("2_eval_pmi", "backward", "plato")}
    assert set(options("recipe")) == recipes | {"none"}


@pytest.mark.parametrize(
    "choice", [f"{group}={o}" for group in ("data", "optim", "trainer") for o in options(group)]
)
def test_every_data_optim_and_trainer_option_builds(compose: Compose, choice: str) -> None:
    _, _, data = built(compose(choice, "data.path=somewhere"))
    assert data.path == "somewhere"


@pytest.mark.parametrize("name", options("strategy"))
def test_every_strategy_is_taken_by_lightning(compose: Compose, name: str) -> None:
    strategy: Any = OmegaConf.to_container(compose(f"strategy={name}").strategy)
    known = inspect.signature(Trainer).parameters
    assert set(strategy) <= set(known)
    if isinstance(strategy.get("strategy"), dict):
        built_strategy = build(strategy["strategy"], "strategy.strategy")
        assert isinstance(built_strategy, ModelParallelStrategy)
        copies = {"fsdp": 1, "hsdp": 2, "fsdp_64": 1, "hsdp_64": "auto"}
        assert built_strategy.replicas == copies[name]
    elif strategy["accelerator"] != "gpu" and strategy["devices"] == 1:
        Trainer(**{**strategy, "precision": "32-true", "logger": False, "enable_checkpointing": False})
    assert ("num_nodes" in strategy) == name.endswith("_64")
    if name.endswith("_64"):
        assert strategy["devices"] * strategy["num_nodes"] == 64


def test_trainer_keys_are_lightning_s_own(compose: Compose) -> None:
    check_arguments(Trainer, compose().trainer, "trainer")


@pytest.mark.parametrize("name", options("logger"))
def test_every_logger_builds(
    compose: Compose, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    nodes: Any = OmegaConf.to_container(compose(f"logger={name}").logger)
    about: dict[str, Any] = {
        "name": "tiny-1_coarse",
        "stage": "1_coarse",
        "size": "tiny",
        "seed": 1,
        "family": "f",
        "parent": None,
        "tags": [],
        "config": {},
    }
    loggers = build_loggers(nodes, RunFolder(tmp_path / "run"), None, **about)
    assert len(loggers) == len(nodes)
    assert all(isinstance(logger, Logger) for logger in loggers)
    assert ("csv" in nodes) == (name != "none")
    for logger in loggers:
        if isinstance(logger, WandbLogger):  # or the next test in this process would go on with its run
            logger.experiment.finish()


@pytest.mark.parametrize("name", options("callbacks"))
def test_every_callback_builds(compose: Compose, name: str) -> None:
    nodes: Any = OmegaConf.to_container(compose(f"callbacks={name}").callbacks)
    assert [*nodes] == ([] if name == "none" else [name])
    for key, node in nodes.items():
        assert isinstance(build(node, f"callbacks.{key}"), Callback)


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_builds(compose: Compose, name: str) -> None:
    keys, module, _ = built(compose(f"experiment={name}", "stage=2_gen"))
    assert module.name == "2_gen"
    assert keys.model_name == ("small" if name == "small" else "tiny")


@pytest.mark.parametrize("name", options("sweep"))
def test_every_sweep_is_a_sweep_of_known_keys(compose: Compose, name: str) -> None:
    built(compose(f"sweep={name}"))
    sweep = compose.hydra  # type: ignore[attr-defined]
    assert sweep.mode.name == "MULTIRUN"
    for key, values in sweep.sweeper.params.items():
        word = in_hydras_words(f"{key}={values}")
        override = OverridesParser.create().parse_override(word)
        swept = override.is_discrete_sweep()
        first = (
            next(iter(override.sweep_string_iterator())) if swept else dimension(override).first.split("=")[1]
        )
        (job,) = resolved([f"{key}={first}"], lambda _: compose(f"sweep={name}"))
        built(compose(f"sweep={name}", job))


def test_quickstart_is_the_curriculum_without_m(compose: Compose) -> None:
    config = compose("experiment=quickstart")
    sweep = compose.hydra  # type: ignore[attr-defined]
    assert sweep.mode.name == "MULTIRUN"
    assert sweep.sweeper.params.stage == "1_coarse,2_gen,2_eval_dual"
    assert (config.init_from, config.report, config.model.n_layer, config.model.hidden_size) == (
        "auto",
        True,
        4,
        256,
    )
    assert config.data.prepare.corpus == "chitchat"


# ------------------------------------------------------------------------------------------------ the numbers

# docs/spec.md, Parameters: stage 1, stage 2.1 with its heads (what the paper counts), stage 2.2
COUNTS = {
    "93m": (91_999_041, 93_205_142, 92_591_171),
    "314m": (311_828_289, 313_958_038, 312_879_939),
    "1.6b": (1_632_591_681, 1_641_037_462, 1_636_792_131),
}


@pytest.mark.parametrize("model", COUNTS)
def test_parameters_are_those_of_the_paper(compose: Compose, model: str) -> None:
    for stage, count in zip(("1_coarse", "2_gen", "2_eval"), COUNTS[model], strict=True):
        _, module, _ = built(compose(f"model={model}", f"stage={stage}"))
        assert sum(parameter.numel() for parameter in module.parameters()) == count, stage


def test_the_chinese_model_is_314m_with_a_larger_vocabulary(compose: Compose) -> None:
    _, module, _ = built(compose("model=336m_zh", "stage=2_gen"))
    extra_rows = 30_000 - 8_000  # a row of the word table and a bias of the LM and BOW heads each
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == COUNTS["314m"][1] + extra_rows * (1024 + 2)
    assert round(count / 1e6) in (336, 337)


# lr, warmup_steps, batch_tokens, max_steps, unit_tokens
PAPER = {  # table 6; units: docs/spec.md, Optimizer, tokens of one of 64 GPUs
    "1_coarse": (5e-4, 3125, 524_288, 200_000, 8192),
    "2_gen": (1e-5, 3125, 65_536, 100_000, 1024),
    "2_eval": (5e-5, 3125, 524_288, 100_000, 8192),
}
KNOVER = {  # docs/spec.md, Optimizer, the 24L confs
    "1_coarse": (1e-3, 4000, 524_288, 200_000, 8192),
    "2_gen": (4e-5, 4000, 262_144, 100_000, 4096),
    "2_eval": (1e-4, 4000, 524_288, 100_000, 8192),
}


@pytest.mark.parametrize(("model", "published"), [("1.6b", PAPER), ("314m", KNOVER)])
@pytest.mark.parametrize("stage", list(PAPER))
def test_published_values(compose: Compose, model: str, published: dict[str, Any], stage: str) -> None:
    config = compose(f"model={model}", f"stage={stage}")
    optim = config.optim
    found = (
        optim.lr,
        optim.warmup_steps,
        optim.batch_tokens,
        config.trainer.max_steps,
        config.data.unit_tokens,
    )
    assert found == published[stage]
    assert optim.batch_tokens == 64 * config.data.unit_tokens  # 64 GPUs, no accumulation
    assert (optim.weight_decay, list(optim.betas), optim.eps, optim.clip_norm) == (
        0.01,
        [0.9, 0.999],
        1e-8,
        0.1,
    )


def test_tiny_is_the_same_by_whatever_name(compose: Compose) -> None:
    """The quickstart has no dropout, seed or batch of its own."""
    for stage in STAGES:
        plain, quick = compose(f"stage={stage}"), compose("experiment=quickstart", f"stage={stage}")
        assert {**quick.model, "max_position": 256} == plain.model  # samples of the quickstart are shorter
        assert quick.seed == plain.seed
        batches = [(c.optim.batch_tokens, c.data.unit_tokens, c.data.row_length) for c in (plain, quick)]
        assert batches[0] == batches[1]
    assert [compose(f"model={model}").model.dropout for model in MODELS] == [0, 0, 0.1, 0.1, 0.1, 0.1, 0, 0]


@pytest.mark.parametrize("model", [model for model in MODELS if model != "tiny"])
def test_the_backward_stage_has_the_values_of_stage_1_for_half_the_steps(
    compose: Compose, model: str
) -> None:
    config, coarse = (compose(f"model={model}", f"stage={stage}") for stage in ("backward", "1_coarse"))
    assert config.optim == coarse.optim
    assert config.data == coarse.data
    assert 2 * config.trainer.max_steps == coarse.trainer.max_steps


def test_the_backward_stage_is_stage_1_on_other_batches(compose: Compose) -> None:
    _, stage, data = built(compose("stage=backward"))
    _, coarse, _ = built(compose("stage=1_coarse"))
    shapes = [[(key, p.shape) for key, p in module.named_parameters()] for module in (stage, coarse)]
    assert shapes[0] == shapes[1]
    assert type(data.batch).__name__ == "BackwardBatch"
    with pytest.raises(UserError, match=r"model\.n_role=4: BackwardBatch has no roles; use model\.n_role=0"):
        built(compose("stage=backward", "model.n_role=4"))


@pytest.mark.parametrize("model", [model for model in MODELS if model != "tiny"])
def test_the_baseline_starts_from_nothing_with_the_values_of_stage_1(
    compose: Compose, model_keys: Callable[[str], list[str]], model: str
) -> None:
    keys, stage, data = built(compose(*model_keys(model), "stage=plato"))
    coarse = built(compose(*model_keys(model), "stage=1_coarse"))[0]
    assert (keys.optim, keys.trainer, keys.data) == (coarse.optim, coarse.trainer, coarse.data)
    assert stage.warm_starts_from == ("plato",)  # so init_from=auto means random weights
    assert type(data.batch).__name__ == "JointBatch"


# ----------------------------------------------------------------------------------------------- who wins


def test_command_line_beats_experiment_beats_recipe_beats_group(compose: Compose) -> None:
    group, recipe, experiment = (
        yaml.safe_load((CONF / file).read_text())
        for file in ("optim/adamw.yaml", "recipe/tiny-1_coarse.yaml", "experiment/smoke.yaml")
    )
    assert compose("recipe=none").optim.warmup_steps == group["warmup_steps"] == 4000
    assert compose().optim.warmup_steps == recipe["optim"]["warmup_steps"] == 200
    assert compose("experiment=smoke").optim.warmup_steps == experiment["optim"]["warmup_steps"] == 2
    assert compose("experiment=smoke", "optim.warmup_steps=7").optim.warmup_steps == 7
    assert compose("model=314m", "stage=2_gen", "optim.lr=3").optim.lr == 3
    assert compose("model=314m", "recipe=1.6b-2_gen").optim.warmup_steps == 3125
    assert compose("experiment=overfit", "model=93m").model.n_layer == 12
    assert compose("experiment=smoke", "stage=2_gen").optim.lr == compose("stage=2_gen").optim.lr


def test_experiments_may_set_top_level_keys(compose: Compose) -> None:
    assert (compose().checkpoint_steps, compose("experiment=smoke").checkpoint_steps) == (1000, 2)


def test_files_hold_literals_only() -> None:
    """No resolvers and no arithmetic; only train.yaml refers to other keys, and evening to a choice."""

    def leaves(node: Any) -> list[Any]:
        if isinstance(node, dict):
            return [leaf for child in node.values() for leaf in leaves(child)]
        return [leaf for child in node for leaf in leaves(child)] if isinstance(node, list) else [node]

    for path in CONF.rglob("*.yaml"):
        for leaf in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))):
            assert isinstance(leaf, str | int | float | bool | None), path
            if path != CONF / "train.yaml" and (path.stem, leaf) != ("evening", "evening-${stage}"):
                assert "${" not in str(leaf), f"{path}: {leaf}"
