"""Records five steps of the SimCLR authors' own code in float64, for tests/test_official.py.

    git clone https://github.com/google-research/simclr && git -C simclr checkout 383d414
    python3.11 -m venv tf && tf/bin/pip install tensorflow-cpu==2.15.1 "numpy<2" absl-py torch
    tf/bin/python tests/official/record_simclr.py simclr  # without simclr/.git: --commit 383d414

Their TensorFlow 1 code (Apache-2.0) runs with float64 in place of float32. "cifar", "sk": network,
head, loss, LARS and schedule; "sk" has fewer blocks than a ResNet-50, but of every kind. "loss",
"distillation": on drawn vectors, the latter as in their notebook. "networks": the number of
features, parameters of encoder and head. "schedules": the lr of the published recipes. Weights and
views come from numpy's RandomState, so the test makes the same ones without the authors' code.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import drawn

SHARED = {"width": 0.25, "dim": 16, "head_layers": 3, "epochs": 3, "warmup_epochs": 1.0,
          "batch_size": 8, "momentum": 0.9, "weight_decay": 0.01}
SETTINGS = {  # a case: our fields; 33 px, as even sides are padded otherwise in their max-pool
    "cifar": SHARED | {"arch": "resnet18", "sk": False, "small_images": True, "image_size": 32,
                       "temperature": 0.5, "lr_rule": "linear", "base_lr": 2.0},
    "sk": SHARED | {"arch": "resnet50", "sk": True, "small_images": False, "image_size": 33,
                    "temperature": 0.1, "lr_rule": "sqrt", "base_lr": 0.0005}}
BLOCKS = {"cifar": (2, 2, 2, 2), "sk": (2, 1, 1, 1)}
STEPS, PER_EPOCH, SEED = 5, 2, 0
NUMBERS = (  # tensors whose first numbers are recorded, where there are such; else only the norm
    "encoder.conv1.weight", "encoder.conv1.3.weight", "encoder.bn1.running_mean",
    "encoder.layer1.0.downsample.1.weight", "encoder.layer1.0.conv2.select.weight",
    "encoder.layer2.0.conv2.squeeze_bn.running_mean", "encoder.layer4.0.bn2.weight",
    "encoder.layer4.0.bn3.bias", "projector.0.0.weight", "projector.1.1.bias",
    "projector.2.0.weight", "projector.2.1.weight")
TEMPERATURES = {"loss": (0.1, 0.5, 1.0), "distillation": (1.0, 0.1)}
NETWORKS = ((18, 1, False), (34, 1, False), (50, 1, False), (50, 1, True), (50, 2, False),
            (50, 2, True), (101, 1, True), (152, 1, False), (152, 3, True), (200, 1, False))
SCHEDULES = {  # our command: images, and their lr, its scaling, batch, epochs, warm-up (README.md)
    "--recipe imagenet": (1281167, 0.1, "sqrt", 4096, 800, 40),  # lr, warm-up: an author
    "--recipe imagenet-v1": (1281167, 0.3, "linear", 4096, 1000, 10),
    "--recipe cifar": (50000, 1.0, "linear", 512, 1000, 10),
    "linear --recipe imagenet": (1281167, 0.1, "linear", 4096, 90, 0),
    "linear --recipe cifar": (50000, 0.1, "linear", 512, 100, 0),
    "finetune --recipe imagenet": (12811, 0.005, "sqrt", 1024, 60, 0)}


def inputs(case: str, shapes: dict) -> tuple[dict, torch.Tensor]:
    """Parameters by our names, and views [STEPS, 2B, 3, S, S]."""
    random, side = np.random.RandomState(SEED), SETTINGS[case]["image_size"]
    views = drawn.views(random, STEPS, SHARED["batch_size"], 3, side, side)
    return drawn.parameters(shapes, random), views.flatten(1, 2)


def vectors() -> torch.Tensor:
    """Two views of 12 images, or logits of student and teacher. [2, 12, 8]; of any length, one so
    short that the guard against division by 0 shows."""
    random = np.random.RandomState(SEED)
    x = random.standard_normal((1, 12, 8)) + 0.7 * random.standard_normal((2, 12, 8))
    x *= np.exp(random.standard_normal((2, 12, 1)))
    x[0, 3] *= 1e-9
    return torch.from_numpy(x)


def of_vectors(losses: dict) -> dict:
    """What is recorded of {temperature: (loss, its gradient)}: the latter's norms and numbers."""
    return {"loss": {f"{t}": [float(loss)] for t, (loss, _) in losses.items()},
            "gradients": {f"{t}": g.norm(dim=1).tolist() for t, (_, g) in losses.items()},
            "numbers": {f"{t}": g[:5].flatten().tolist() for t, (_, g) in losses.items()}}


def lr_steps(total: int, warmup: int) -> list[int]:
    """Steps whose lr is recorded; not the last ones, where 1 + cosine is rounding noise."""
    return sorted({0, 1, max(warmup - 1, 0), warmup, warmup + 1, total // 2, total - total // 20})


def summary(state: dict, when: str) -> dict:
    """Without variances: those of their batch norms are biased, of ours not. And without the last
    batch norm's bias: theirs has none, ours a constant 0."""
    state = {name: x for name, x in state.items() if "_var" not in name and "num_" not in name
             and name != "projector.2.1.bias"}
    return drawn.summary(state, tuple(name for name in NUMBERS if name in state), when)


def replaced(module, **names) -> SimpleNamespace:
    """A module with other objects under these names."""
    return SimpleNamespace(**{name: getattr(module, name) for name in dir(module)} | names)


def load(path: Path) -> SimpleNamespace:
    """Their modules, with float64 where they or TensorFlow would take float32."""
    import tensorflow.compat.v1 as tf
    from tensorflow.python.keras.optimizer_v2 import learning_rate_schedule
    from tensorflow.python.ops.losses import losses_impl
    tf.disable_v2_behavior()
    sys.path.insert(0, str(path))
    for name in ("tensorflow_datasets", "tensorflow_hub"):  # imported, but not needed here
        sys.modules[name] = mock.MagicMock()
    names = ("run", "lars_optimizer", "model_util", "objective", "resnet")  # run defines the flags
    x = SimpleNamespace(tf=tf, **{name: importlib.import_module(name) for name in names})
    x.flags = x.run.FLAGS
    notebook = json.loads((path / "colabs/distillation_self_training.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    source = next(text for text in cells if "def add_kd_loss" in text)
    exec(source.partition("# Define a small student")[0], vars(x))  # x.add_kd_loss

    def double(y):
        return tf.cast(y, tf.float64)

    x.objective.tf = replaced(tf, one_hot=lambda *a: double(tf.one_hot(*a)))
    x.model_util.tf = replaced(tf, to_float=double)
    x.lars_optimizer.tf = replaced(
        tf, get_variable=lambda **k: tf.get_variable(**k | {"dtype": tf.float64}),
        where=lambda condition, a, b: tf.where(condition, double(a), double(b)))
    losses_impl.dtypes = replaced(losses_impl.dtypes, float32=tf.float64)
    learning_rate_schedule.math = replaced(learning_rate_schedule.math, pi=np.float64(np.pi))
    return x


def start(theirs, **flags) -> None:
    """A new graph; all flags but these at their defaults."""
    theirs.tf.reset_default_graph()
    for flag in theirs.flags.flags_by_module_dict()["run"]:
        flag.unparse()
    theirs.flags(["run.py", "--use_tpu=False", *(f"--{name}={x}" for name, x in flags.items())])
    for name in ("momentum", "batch_norm_decay"):  # of Python's numbers TensorFlow makes float32
        setattr(theirs.flags, name, np.float64(getattr(theirs.flags, name)))


def layers(case: str) -> list[str]:
    """Our names of the layers with weights, in the order in which theirs makes them."""
    sk = SETTINGS[case]["sk"]
    shortcut = ["downsample.1", "downsample.2"] if sk else ["downsample.0", "downsample.1"]
    block = ["conv1", "bn1", *(("conv2.conv", "conv2.bn", "conv2.squeeze", "conv2.squeeze_bn",
                                "conv2.select", "conv3", "bn3") if sk else ("conv2", "bn2"))]
    names = [*(f"conv1.{i}" for i in (0, 1, 3, 4, 6)), "bn1"] if sk else ["conv1", "bn1"]
    for i, count in enumerate(BLOCKS[case], start=1):
        for j in range(count):  # a group's first block has a projection, of ResNet-18's first, too
            names += [f"layer{i}.{j}.{name}" for name in [*shortcut * (j == 0), *block]]
    return [f"encoder.{name}" for name in names] + [
        f"projector.{i}.{j}" for i in range(SETTINGS[case]["head_layers"]) for j in (0, 1)]


def variables(tf, case: str) -> tuple[dict, dict]:
    """Theirs by our names: parameters, and running means."""
    rest, parameters, means, name = iter(layers(case)), {}, {}, ""
    for v in tf.trainable_variables():
        kind = v.op.name.rpartition("/")[2]
        name = name if kind == "beta" else next(rest)  # a beta follows its gamma
        parameters[f"{name}.{'bias' if kind == 'beta' else 'weight'}"] = v
        if kind == "gamma":
            mean = v.op.name.replace("gamma", "moving_mean")
            means[f"{name}.running_mean"] = next(
                x for x in tf.global_variables() if x.op.name == mean)
    return parameters, means


def tensor(x: np.ndarray) -> torch.Tensor:
    """In our order of dimensions."""
    return torch.from_numpy(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T)


def record_steps(theirs, case: str) -> dict:
    """What five steps gave: {quantity: {name: its numbers, one a step where it is of a step}}."""
    tf, fields = theirs.tf, SETTINGS[case]
    n, side = fields["batch_size"], fields["image_size"]
    start(theirs, sk_ratio=fields["sk"] / 16, num_proj_layers=fields["head_layers"],
          proj_out_dim=fields["dim"], learning_rate_scaling=fields["lr_rule"], train_batch_size=n,
          train_steps=fields["epochs"] * PER_EPOCH, **{x: fields[x] for x in (
              "warmup_epochs", "momentum", "weight_decay", "temperature")})
    x = tf.placeholder(tf.float64, [2 * n, side, side, 3])
    block = theirs.resnet.bottleneck_block if fields["sk"] else theirs.resnet.residual_block
    h = theirs.resnet.resnet_v1_generator(block, BLOCKS[case], fields["width"],
                                          cifar_stem=fields["small_images"])(x, is_training=True)
    z = theirs.model_util.projection_head(h, True)
    theirs.objective.add_contrastive_loss(z, temperature=theirs.flags.temperature)
    loss = tf.losses.get_total_loss()
    parameters, means = variables(tf, case)
    lr = theirs.model_util.learning_rate_schedule(np.float64(fields["base_lr"]), PER_EPOCH * n)
    optimizer = theirs.model_util.get_optimizer(lr)
    gradients = tf.gradients(loss, [*parameters.values()])
    with tf.control_dependencies([lr, *gradients]):  # a weight changes after its last use
        step = optimizer.apply_gradients(
            [*zip(gradients, parameters.values())], tf.train.get_global_step())
    outputs = {"loss": loss, "lr": lr, "z": z, "gradients": dict(zip(parameters, gradients))}
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    values, views = inputs(case, {name: tensor(np.empty(v.shape)).shape
                                  for name, v in parameters.items()})
    with tf.Session() as s:

        def state() -> dict:
            return {name: tensor(x) for name, x in s.run(parameters | means).items()}

        s.run(tf.global_variables_initializer())
        for name, v in parameters.items():
            w = values[name].numpy()
            v.load(w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T, s)
        found = summary(state(), "before") | {
            "loss": {"loss": []}, "lr": {"lr": []}, "z": {"z": []},
            "gradients": {name: [] for name in parameters}}
        for images in views:
            seen, *_ = s.run([outputs, step, updates], {x: images.permute(0, 2, 3, 1).numpy()})
            found["loss"]["loss"].append(float(seen["loss"]))
            found["lr"]["lr"].append(float(seen["lr"]))
            found["z"]["z"] += np.linalg.norm(seen["z"][::5], axis=1).tolist()
            for name, g in seen["gradients"].items():
                found["gradients"][name].append(float(np.linalg.norm(g)))
        return found | summary(state(), "after")


def record_losses(theirs, case: str) -> dict:
    tf, losses = theirs.tf, {}
    start(theirs)
    x1, x2 = map(tf.constant, vectors().numpy())
    for t in TEMPERATURES[case]:
        if case == "loss":
            x = tf.concat([x1, x2], 0)
            loss, *_ = theirs.objective.add_contrastive_loss(x, temperature=t)
        else:
            x, loss = x1, theirs.add_kd_loss(x1, x2, np.float64(t))
        with tf.Session() as s:
            losses[t] = s.run(loss), torch.from_numpy(s.run(tf.gradients(loss, x)[0]))
    return of_vectors(losses)


def record_networks(theirs) -> dict:
    tf, found = theirs.tf, {}
    for depth, width, sk in NETWORKS:
        start(theirs, sk_ratio=sk / 16)
        h = theirs.resnet.resnet_v1(depth, width)(tf.zeros([2, 64, 64, 3]), is_training=True)
        base = [*tf.trainable_variables()]
        theirs.model_util.projection_head(h, True)
        head = tf.trainable_variables()[len(base):]
        found[f"{depth} {width} {sk}"] = [int(h.shape[-1]), *(
            sum(v.shape.num_elements() for v in part) for part in (base, head))]
    return {"networks": found}


def record_schedules(theirs) -> dict:
    tf, found = theirs.tf, {"steps": {}, "lr": {}}
    for ours, (images, base, scaling, batch, epochs, warmup) in SCHEDULES.items():
        start(theirs, learning_rate_scaling=scaling, train_batch_size=batch, train_epochs=epochs,
              warmup_epochs=warmup)
        step = tf.train.get_or_create_global_step()
        lr = theirs.model_util.learning_rate_schedule(np.float64(base), images)
        steps = [theirs.model_util.get_train_steps(images), warmup * images // batch]
        with tf.Session() as s:
            found["lr"][ours] = [float(s.run(lr, {step: i})) for i in lr_steps(*steps)]
        found["steps"][ours] = steps
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path, help="the authors' code")
    parser.add_argument("--commit", help="of that code, where PATH has no .git")
    args = parser.parse_args()
    theirs = load(args.path.resolve())
    cases = {case: record_steps(theirs, case) for case in SETTINGS}
    cases |= {case: record_losses(theirs, case) for case in TEMPERATURES}
    cases |= {"networks": record_networks(theirs), "schedules": record_schedules(theirs)}
    versions = {"tensorflow": theirs.tf.__version__, "numpy": np.__version__}
    drawn.write("simclr", commit=args.commit or drawn.commit(args.path), versions=versions,
                settings=SETTINGS, cases=cases)


if __name__ == "__main__":
    main()
