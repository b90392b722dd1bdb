"""The deck's two networks in Keras, statement by statement as the deck has them.

`layers`, `models` and `applications` are Keras's, as the deck imports them. What a parameter changes is said there; its
default is the deck's.
"""

from keras import applications, layers, models
from keras.layers import Activation, BatchNormalization, Conv2D, Dense, Dropout, Flatten


def resnet50v2(side: int = 224, weights: str | None = None, trainable: bool = False) -> models.Model:
    """The deck's ResNet50V2. `weights`: the deck has "imagenet", which needs a network; `side`: smaller is faster."""
    base_model = applications.ResNet50V2(weights=weights, input_shape=(side, side, 3), include_top=False)
    model = models.Sequential(
        [
            layers.Resizing(side, side),
            layers.RandomFlip("horizontal_and_vertical"),
            base_model,
            layers.Conv2D(128, (3, 3), activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(512),
            layers.BatchNormalization(),
            layers.Dropout(0.1),
            layers.Activation("relu"),
            layers.Dense(256),
            layers.BatchNormalization(),
            layers.Dropout(0.1),
            layers.Activation("relu"),
            layers.Dense(128),
            layers.BatchNormalization(),
            layers.Dropout(0.1),
            layers.Activation("relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.layers[2].trainable = trainable
    model.build((None, 32, 32, 3))
    return model


def fan() -> models.Model:
    """The deck's Fan."""
    return models.Sequential(
        [
            Conv2D(32, (3, 3), input_shape=(32, 32, 3)),
            BatchNormalization(),
            Activation("relu"),
            Dropout(0.05),
            Conv2D(64, (3, 3)),
            BatchNormalization(),
            Activation("relu"),
            Dropout(0.1),
            Conv2D(128, (3, 3)),
            BatchNormalization(),
            Activation("relu"),
            Dropout(0.1),
            Conv2D(128, (3, 3)),
            BatchNormalization(),
            Activation("relu"),
            Dropout(0.1),
            Conv2D(256, (3, 3)),
            BatchNormalization(),
            Activation("relu"),
            Dropout(0.1),
            Conv2D(256, (3, 3)),
            BatchNormalization(),
            Activation("relu"),
            Dropout(0.1),
            Conv2D(512, (3, 3)),
            BatchNormalization(),
            Activation("relu"),
            Flatten(),
            Dense(512),
            BatchNormalization(),
            Activation("relu"),
            Dense(128),
            BatchNormalization(),
            Activation("relu"),
            Dense(10, activation="softmax"),
        ]
    )
