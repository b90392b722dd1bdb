# The image for Ray clusters: the locked environment in /opt/venv, the project in /opt/project and /opt/cifar_dist.
# What changes rarely comes first: a change of the project's code is a layer of less than a megabyte.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS environment
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PYTHON_DOWNLOADS=never UV_PROJECT_ENVIRONMENT=/opt/venv
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv==0.13.9
WORKDIR /build
COPY pyproject.toml uv.lock ./
# The builds of torch and DALI: cuda13, or cuda12 for older GPU drivers.
ARG CUDA=cuda13
# Behind all else on Python's path: the code that a job uploads goes before that of the image.
RUN /opt/uv/bin/uv sync --locked --extra "${CUDA}" --no-dev --no-install-project --no-cache \
    && echo /opt/project > "$(/opt/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/project.pth"

FROM environment AS project
COPY README.md LICENSE ./
COPY cifar_dist cifar_dist
RUN /opt/uv/bin/uv pip install --no-deps --no-cache --python /opt/venv --target /opt/project .
ARG REVISION=unknown
RUN echo "${REVISION}" > /opt/project/cifar_dist/REVISION

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
# torch.compile builds its launchers with a C compiler. Without the libraries of libibverbs, NCCL silently uses TCP on
# InfiniBand and RoCE. The base's version decides on those of its packages.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libibverbs1 ibverbs-providers \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 ray \
    && useradd --no-log-init --uid 1000 --gid 1000 --create-home ray \
    && echo "export PATH=/opt/venv/bin:/usr/local/nvidia/bin:\$PATH" > /etc/profile.d/path.sh
COPY --from=environment /opt/venv /opt/venv
COPY --from=project /opt/project /opt/project
COPY jobs /opt/cifar_dist/jobs
# A node that only mounts its driver has it in /usr/local/nvidia (GKE). With the NVIDIA runtime, CUDA and nvidia-smi suffice.
ENV PATH=/opt/venv/bin:/usr/local/nvidia/bin:$PATH LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# The root may be read-only: what is written goes to /tmp.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp/matplotlib
ARG REVISION=unknown
LABEL org.opencontainers.image.title="cifar_dist" \
      org.opencontainers.image.description="Distributed image classification with Ray Train, NVIDIA DALI and PyTorch" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
WORKDIR /opt/cifar_dist
USER 1000:1000
CMD ["/bin/bash"]
