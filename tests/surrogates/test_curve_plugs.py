"""Plugs for training libraries: a short real training that is stopped, and one that is not."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    # of the libraries themselves, as they are imported and run
    pytest.mark.filterwarnings("ignore"),
]
EPOCHS = 30


def data(n: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes that a linear model tells apart in most cases."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    noise = torch.randn(n, generator=generator)
    return x, (x[:, 0] + x[:, 1] + 0.7 * noise > 0).long()


# Lightning


def fit_lightning(
    best: float | None,
    rate: float,
    path: Path,
    monitor: str = "val_acc",
    mode: str = "max",
    state: dict | None = None,
    **arguments,
):
    pl = pytest.importorskip("lightning.pytorch")
    from surrogates import CurveStopping

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 2)

        def training_step(self, batch, index):
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch, index):
            hits = (self.net(batch[0]).argmax(-1) == batch[1]).float().mean()
            self.log("val_acc", hits)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), rate)

    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*data()), batch_size=64, num_workers=0
    )
    callback = CurveStopping(monitor, best, mode, warmup=4, verbose=False)
    if state is not None:
        callback.load_state_dict(state)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, callbacks=[callback], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=path,
        enable_checkpointing=False, **arguments,
    )  # fmt: skip
    trainer.fit(Net(), loader, loader)
    return trainer, callback


def test_lightning_stops_a_training_that_does_not_learn(tmp_path) -> None:
    trainer, callback = fit_lightning(0.95, 1e-6, tmp_path)
    assert trainer.current_epoch < EPOCHS and callback.decision.stop
    assert "0.95" in callback.decision.reason
    state = json.loads(json.dumps(callback.state_dict()))
    assert len(state["values"]) == trainer.current_epoch


def test_lightning_goes_on_with_one_that_leads(tmp_path) -> None:
    trainer, callback = fit_lightning(0.6, 0.02, tmp_path)
    assert trainer.current_epoch == EPOCHS and len(callback.state_dict()["values"]) == EPOCHS


def test_lightning_keeps_to_min_epochs_and_names_a_metric_that_is_not_logged(tmp_path) -> None:
    trainer, _ = fit_lightning(0.95, 1e-6, tmp_path, min_epochs=20)
    assert 20 <= trainer.current_epoch < EPOCHS
    pl = pytest.importorskip("lightning.pytorch")
    from surrogates import CurveStopping

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 2)

        def training_step(self, batch, index):
            return self.net(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(64)), num_workers=0)
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[CurveStopping("val_acc")], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="Expected monitor among"):
        trainer.fit(Net(), loader)


def test_lightning_reads_validations_within_epochs_and_metrics_of_the_training(tmp_path) -> None:
    _, quarters = fit_lightning(None, 0.02, tmp_path, val_check_interval=0.5, min_epochs=EPOCHS)
    steps = quarters.state_dict()["steps"]
    assert steps[:4] == [0.5, 1.0, 1.5, 2.0] and len(steps) == 2 * EPOCHS
    _, training = fit_lightning(
        None, 0.02, tmp_path, monitor="train_loss", mode="min", min_epochs=EPOCHS
    )
    values = training.state_dict()["values"]
    assert len(values) == EPOCHS and values[-1] < values[0]


@pytest.mark.parametrize(("given", "saved", "kept"), [(0.7, 0.6, 0.7), (None, 0.6, 0.6)])
def test_lightning_resumes_with_the_better_incumbent(given, saved, kept, tmp_path) -> None:
    state = {"best": saved, "values": [0.5], "steps": [0.001], "hopeless": 0}
    _, callback = fit_lightning(given, 0.02, tmp_path, state=state, min_epochs=EPOCHS)
    assert callback.state_dict()["best"] == kept
    assert callback.state_dict()["values"][0] == 0.5


# Keras, in a process of its own: its backend is chosen when it is first imported

KERAS = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
import keras, numpy as np
from surrogates import KerasCurveStopping
rng = np.random.default_rng(0)
x = rng.normal(size=(256, 4)).astype("float32")
y = (x[:, 0] + x[:, 1] + 0.7 * rng.normal(size=256) > 0).astype("float32")
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.layers.Dense(1, activation="sigmoid")])
model.compile(keras.optimizers.SGD(float(sys.argv[1])), "binary_crossentropy", metrics=["accuracy"])
stop = KerasCurveStopping("val_accuracy", float(sys.argv[2]), "max", warmup=4)
history = model.fit(
    x, y, epochs=30, verbose=0, validation_data=(x, y), batch_size=64, callbacks=[stop],
    validation_freq=int(sys.argv[3]),
)
print("epochs", len(history.history["loss"]))
"""


# not imported here, which would choose its backend
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs keras")
@pytest.mark.parametrize(
    ("rate", "best", "every", "stops"),
    [(1e-6, 0.97, 1, True), (0.05, 0.6, 1, False), (1e-6, 0.97, 2, True)],
)
def test_keras(rate: float, best: float, every: int, stops: bool) -> None:
    command = [sys.executable, "-c", KERAS, str(rate), str(best), str(every)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    epochs = int(done.stdout.rsplit("epochs", 1)[1])
    assert (epochs < EPOCHS) == stops
    assert ("beats" in done.stdout) == stops


# Hugging Face


@pytest.mark.parametrize(("rate", "best", "stops"), [(1e-7, 0.2, True), (0.02, 0.69, False)])
def test_hugging_face(rate: float, best: float, stops: bool, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from surrogates import TrainerCurveStopping

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 2)

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": a, "labels": b} for a, b in zip(*data(), strict=True)]
    callback = TrainerCurveStopping("loss", best, "min", warmup=4, verbose=False)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=EPOCHS, eval_strategy="epoch",
        learning_rate=rate, per_device_train_batch_size=64, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, logging_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(
        Net(), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback]
    )
    trainer.evaluate()  # before the training, and of another set after it: neither counts
    trainer.train()
    trainer.evaluate(rows[:64], metric_key_prefix="test")
    assert (trainer.state.global_step < trainer.state.max_steps) == stops
    assert callback.decision is not None and math.isfinite(callback.decision.probability) == stops


# Ray


def test_ray_stops_the_trials_that_do_not_learn(tmp_path) -> None:
    ray = pytest.importorskip("ray")
    tune = pytest.importorskip("ray.tune")
    from surrogates import CurveScheduler

    def train(config) -> None:
        for step in range(1, EPOCHS + 1):
            value = config["end"] - 0.4 * 0.7**step
            tune.report({"val_acc": value})

    scheduler = CurveScheduler(EPOCHS, warmup=4)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        tuner = tune.Tuner(
            train,
            param_space={"end": tune.grid_search([0.9, 0.5, 0.91])},
            tune_config=tune.TuneConfig(
                metric="val_acc", mode="max", scheduler=scheduler, max_concurrent_trials=1
            ),
            run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
        )
        results = tuner.fit()
    finally:
        ray.shutdown()
    steps = {r.config["end"]: r.metrics["training_iteration"] for r in results}
    assert steps[0.9] == EPOCHS and steps[0.91] == EPOCHS
    assert steps[0.5] < EPOCHS
    assert scheduler.debug_string() == "Using CurveScheduler: 1 of 3 trials stopped."


def test_a_loop_in_the_style_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    from surrogates import StopRule

    x, y = (part.numpy() for part in data(400))
    model, steps = linear_model.SGDClassifier(eta0=1e-9, learning_rate="constant"), 0
    rule = StopRule(horizon=60, best=0.95, warmup=4)
    for _ in range(60):
        model.partial_fit(x[:200], y[:200], classes=np.array([0, 1]))
        steps += 1
        if rule.update(model.score(x[200:], y[200:])).stop:
            break
    assert steps < 60
