"""The name, address and checksum of the published ImageNet weights."""

# ResNet50V2's ImageNet weights without the top. Address and checksum are from keras.applications (Keras 3.15).
PUBLISHED_NAME = "resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5"
PUBLISHED_URL = f"https://storage.googleapis.com/tensorflow/keras-applications/resnet/{PUBLISHED_NAME}"
PUBLISHED_MD5 = "fac2f116257151a9d068a22e544a4917"
