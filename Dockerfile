# The image for Ray clusters: the locked environment in /opt/venv, the project in /opt/cifar_dist.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PYTHON_DOWNLOADS=never UV_PROJECT_ENVIRONMENT=/opt/venv
RUN python3 -m pip install --no-cache-dir uv==0.13.9
WORKDIR /opt/cifar_dist
COPY pyproject.toml uv.lock README.md ./
RUN uv sync --locked --no-dev --no-install-project --no-cache
COPY cifar_dist cifar_dist
COPY jobs jobs
RUN uv sync --locked --no-dev --no-editable --no-cache

FROM ${BASE_IMAGE}
# torch.compile builds its launchers with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1000 ray && useradd --uid 1000 --gid 1000 --create-home ray \
    && printf 'export PATH=/opt/venv/bin:$PATH\n' > /etc/profile.d/venv.sh
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/cifar_dist/jobs /opt/cifar_dist/jobs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/cifar_dist
USER 1000:1000
