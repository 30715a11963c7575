"""Fits, saves and loads a model of keras whose layers are Modules of nnx."""

import json
import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_NNX_ENABLED"] = "true"

from flax import nnx
import keras
import numpy as np


@keras.saving.register_keras_serializable()
class Scale(keras.layers.Layer):
  """A layer whose configuration keras takes from how it was made."""

  def __init__(self, factor, **kwargs):
    super().__init__(**kwargs)
    self.factor = factor

  def call(self, x):
    return self.factor * x


keras.utils.set_random_seed(0)
model = keras.Sequential(
  [
    keras.layers.Input((8,)),
    keras.layers.Dense(16, activation="relu"),
    keras.layers.BatchNormalization(),
    keras.layers.Dropout(0.1),
    Scale(0.5),
    keras.layers.Dense(3, activation="softmax"),
  ]
)
draw = np.random.default_rng(0)
x = draw.normal(size=(128, 8)).astype("float32")
y = draw.integers(0, 3, 128)
model.compile(
  optimizer=keras.optimizers.Adam(1e-2),
  loss="sparse_categorical_crossentropy",
  metrics=["accuracy"],
)
history = model.fit(x, y, epochs=3, batch_size=32, verbose=0, shuffle=False)
predicted = model.predict(x, verbose=0)
with tempfile.TemporaryDirectory() as folder:
  path = os.path.join(folder, "model.keras")
  model.save(path)
  loaded = keras.models.load_model(path)
print(
  json.dumps(
    {
      "history": history.history,
      "predicted": predicted.tolist(),
      "loaded is equal": bool(
        (loaded.predict(x, verbose=0) == predicted).all()
      ),
      "factor": loaded.layers[-2].factor,
      "is a Module": isinstance(model, nnx.Module),
    }
  )
)
