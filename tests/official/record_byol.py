"""Records the BYOL authors' own steps and recipes in float64, for tests/test_official.py.

    git clone https://github.com/google-deepmind/deepmind-research
    git -C deepmind-research checkout f5de0ed
    pip install jax==0.10.2 dm-haiku==0.0.17 optax==0.2.8 dm-tree absl-py numpy torch
    python tests/official/record_byol.py deepmind-research   # without its .git: --commit f5de0ed

"steps": their update function with a small ResNet. "recipe 40" and so on: their settings for 40,
100, 300 and 1000 epochs, and lr and tau at some steps. What JAX has dropped since is put back;
modules that read data and checkpoints are empty. Nothing of their code (Apache-2.0) is copied.
"""

import argparse
import functools
import importlib
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import drawn

SETTINGS = {"width": 0.25, "image_size": 33, "dim": 16, "hidden_dim": 64, "epochs": 3,
            "warmup_epochs": 1.0, "batch_size": 16, "base_lr": 32.0, "momentum": 0.9,
            "weight_decay": 0.01, "base_tau": 0.9}  # an odd size: an even one they pad otherwise
BLOCKS = (2, 1, 1, 1)  # bottlenecks, one of them without a convolution in its shortcut
STEPS, PER_EPOCH, SEED = 5, 2, 0
EPOCHS, IMAGES = (40, 100, 300, 1000), 1281167  # the recipes; images of ImageNet
NUMBERS = (  # tensors whose first numbers are recorded; of the others only the norm
    "encoder.conv1.weight", "encoder.bn1.running_mean", "encoder.layer4.0.bn3.weight",
    "projector.0.weight", "projector.0.bias", "projector.3.weight", "predictor.0.weight",
    "predictor.1.bias", "predictor.3.weight", "target_encoder.conv1.weight",
    "target_encoder.bn1.running_mean", "target_projector.1.running_mean",
    "target_projector.3.weight")


def inputs(shapes: dict) -> tuple[dict, torch.Tensor]:
    """Parameters by our names, the target's unlike the others, and views [STEPS, 2, B, 3, S, S] in
    [0, 1], not normalized."""
    random = np.random.RandomState(SEED)
    images = (SETTINGS["batch_size"], 3, SETTINGS["image_size"], SETTINGS["image_size"])
    views = 0.6 * random.random_sample((STEPS, 1, *images))  # both views show the same images
    views = views + 0.4 * random.random_sample((STEPS, 2, *images))
    return drawn.parameters(shapes, random), torch.from_numpy(views)


def points(total: int, warmup: int) -> tuple[int, ...]:
    """Steps of a recipe at which lr and tau are recorded."""
    return 0, 1, warmup // 2, warmup, total // 2, total * 9 // 10


def load(path: Path) -> SimpleNamespace:
    """Their modules by name."""
    import jax
    import jax.numpy as jnp
    jax.config.update("jax_enable_x64", True)
    jax.tree_map = jax.tree_util.tree_map
    for name in ("acme", "acme.jax", "dill", "tensorflow", "tensorflow.compat",
                 "tensorflow.compat.v2", "tensorflow_datasets"):
        sys.modules[name] = mock.MagicMock()
    sys.path.insert(0, str(path.resolve()))  # their package is called byol, as our script
    names = ("byol_experiment", "configs.byol", "utils.dataset", "utils.networks",
             "utils.optimizers", "utils.schedules")
    code = SimpleNamespace(**{name.split(".")[-1]: importlib.import_module(f"byol.{name}")
                              for name in names})
    # The warm-up casts to float32, which would round the lr.
    code.schedules.jnp = SimpleNamespace(**vars(jnp) | {"float32": jnp.float64})
    code.networks.Short = functools.partial(code.networks.ResNetTorso, BLOCKS)
    code.byol_experiment.augmentations.postprocess = lambda inputs, rng: inputs  # already views
    code.byol_experiment.checkpointing.Checkpointer = mock.MagicMock()
    return code


class Quarter:
    """A width_multiplier by which numbers of channels stay integers."""
    __mul__ = __rmul__ = lambda self, channels: channels // 4


KINDS = {"w": "weight", "scale": "weight", "b": "bias", "offset": "bias", "hidden": "running_mean"}
LAYERS = {"linear": "0", "batch_norm": "1", "linear_1": "3",  # of projector and predictor
          "initial_conv": "conv1", "initial_batchnorm": "bn1", "conv_0": "conv1",
          "batchnorm_0": "bn1", "conv_1": "conv2", "batchnorm_1": "bn2", "conv_2": "conv3",
          "batchnorm_2": "bn3", "shortcut_conv": "downsample.0",
          "shortcut_batchnorm": "downsample.1"}


def our_name(module: str, name: str) -> str | None:
    """Of a Haiku parameter, or of the moving mean of a batch norm; of anything else None."""
    path = [part for part in module.split("/") if part not in ("~", "mean_ema")]
    if path[0] == "classifier" or path[-1] == "var_ema" or name not in KINDS:
        return None
    part = path[0] if path[0] in ("projector", "predictor") else "encoder"
    if block := re.search(r"block_group_(\d).*block_(\d)", module):
        part += f".layer{int(block[1]) + 1}.{block[2]}"
    return f"{part}.{LAYERS[path[-1]]}.{KINDS[name]}"


def to_ours(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """A Haiku tree by our names and in our layout, of the first device. Prefix "target_": without
    the predictor, which their target has, too, and does not use."""
    found = {}
    for module, leaves in tree.items():
        for name, x in leaves.items():
            ours, x = our_name(module, name), np.array(x[0])
            if ours and not (prefix and ours.startswith("predictor")):
                x = x.transpose(-1, -2, *range(x.ndim - 2)) if name == "w" else x.ravel()
                found[prefix + ours] = torch.from_numpy(x.copy())
    return found


def to_theirs(values: dict[str, torch.Tensor], tree: dict, prefix: str = "") -> dict:
    """The Haiku tree with these values, where there are any."""
    def leaf(module, name, x):
        y = values.get(f"{prefix}{our_name(module, name)}")
        if y is not None and name == "w":
            y = y.permute(*range(2, y.ndim), 1, 0)
        return x if y is None else y.numpy().reshape(x.shape)

    return {module: {name: leaf(module, name, x) for name, x in leaves.items()}
            for module, leaves in tree.items()}


def record_steps(code) -> dict:
    """What five steps gave: {quantity: {name: its numbers, one a step where it is of a step}}.
    "adapted": 1 where LARS decays and adapts the parameter, 0 where it does not."""
    import jax
    import jax.numpy as jnp
    config = code.byol.get_config(300, SETTINGS["batch_size"])
    config.update(max_steps=SETTINGS["epochs"] * PER_EPOCH, base_target_ema=SETTINGS["base_tau"])
    config["network_config"].update(
        encoder_class="Short", encoder_config={"width_multiplier": Quarter()},
        projector_hidden_size=SETTINGS["hidden_dim"], projector_output_size=SETTINGS["dim"],
        predictor_hidden_size=SETTINGS["hidden_dim"])
    config["optimizer_config"].update({x: SETTINGS[x] for x in ("momentum", "weight_decay")})
    config["lr_schedule_config"].update(base_learning_rate=SETTINGS["base_lr"],
                                        warmup_steps=int(SETTINGS["warmup_epochs"] * PER_EPOCH))
    experiment = code.byol_experiment.ByolExperiment(**config)
    gradient = jax.pmap(jax.grad(experiment.loss_fn, has_aux=True), axis_name="i")

    def batch(views):  # with an axis for devices
        x1, x2 = jnp.asarray(views.permute(0, 1, 3, 4, 2).numpy())[:, None]
        return {"view1": x1, "view2": x2, "labels": jnp.zeros((1, len(x1[0])), int)}

    key = jax.random.PRNGKey(0)[None]
    state = jax.pmap(experiment._make_initial_state, axis_name="i")(key, batch(inputs({})[1][0]))
    initial = to_ours(state.online_params) | to_ours(state.target_params, "target_")
    values, views = inputs({name: x.shape for name, x in initial.items()})
    state = state._replace(online_params=to_theirs(values, state.online_params),
                           target_params=to_theirs(values, state.target_params, "target_"))

    def summary(when):
        trees = ((state.online_params, ""), (state.online_state, ""),
                 (state.target_params, "target_"), (state.target_state, "target_"))
        return drawn.summary({name: x for tree in trees for name, x in to_ours(*tree).items()},
                             NUMBERS, when)

    adapted = {our_name(module, name): [float(code.optimizers.exclude_bias_and_norm(
        (module, name), x))] for module, leaves in state.online_params.items()
        for name, x in leaves.items() if our_name(module, name)}
    found = summary("before") | {"adapted": adapted, "loss": {"loss": []}, "lr": {"lr": []},
                                 "tau": {"tau": []}, "gradients": {name: [] for name in adapted},
                                 "target": {name: [] for name in initial if "target_" in name}}
    for step in range(STEPS):
        gradients, _ = gradient(*state[:4], key, batch(views[step]))
        state, logs = experiment.update_pmap(state, jnp.array([step]), key, batch(views[step]))
        for quantity, name in (("loss", "repr_loss"), ("lr", "learning_rate"), ("tau", "tau")):
            found[quantity][quantity].append(float(logs[name][0]))
        for quantity, tensors in (("gradients", to_ours(gradients)),
                                  ("target", to_ours(state.target_params, "target_"))):
            for name, norms in found[quantity].items():
                norms.append(tensors[name].norm().item())
    return found | summary("after")


def record_recipe(code, epochs: int) -> dict:
    config = code.byol.get_config(epochs, 4096)
    network, rate = config["network_config"], config["lr_schedule_config"]
    total, tau = config["max_steps"], config["base_target_ema"]
    assert network["predictor_hidden_size"] == network["projector_hidden_size"]
    steps = np.array(points(total, rate["warmup_steps"]))
    schedules = {"lr": code.schedules.learning_schedule(steps, batch_size=4096, total_steps=total,
                                                        **rate),
                 "tau": code.schedules.target_ema(steps, tau, total)}
    settings = {"base_lr": rate["base_learning_rate"], "base_tau": tau, "total": total,
                "warmup": rate["warmup_steps"], "dim": network["projector_output_size"],
                "hidden_dim": network["projector_hidden_size"],
                "depth": int(network["encoder_class"].removeprefix("ResNet")),
                "width": network["encoder_config"]["width_multiplier"],
                **{x: config["optimizer_config"][x] for x in ("momentum", "weight_decay")}}
    return {"settings": {name: [x] for name, x in settings.items()}} | {
        key: {str(step): [float(x)] for step, x in zip(steps, y)} for key, y in schedules.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path, help="the checkout, the folder that holds byol/")
    parser.add_argument("--commit", help="of that code, where PATH has no .git")
    args = parser.parse_args()
    code = load(args.path)
    assert code.dataset.Split.TRAIN_AND_VALID.num_examples == IMAGES
    cases = {"steps": record_steps(code)} | {
        f"recipe {epochs}": record_recipe(code, epochs) for epochs in EPOCHS}
    versions = {name: version(name) for name in ("jax", "dm-haiku", "optax", "numpy", "torch")}
    drawn.write("byol", commit=args.commit or drawn.commit(args.path), versions=versions,
                settings=SETTINGS, cases=cases)


if __name__ == "__main__":
    main()
