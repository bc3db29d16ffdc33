# syntax=docker/dockerfile:1
# pisa-train in a container, with the tested versions of constraints.txt.
#
#   docker build -t pisa-dist .                                    CPU
#   docker build -t pisa-dist --build-arg TORCH=cu126 .            CUDA 12.6; any index of download.pytorch.org/whl
#   docker build -t pisa-dist --build-arg EXTRAS="[tensorboard]" . with optional dependencies
#   docker run --rm -v "$PWD/runs:/home/pisa/runs" --user "$(id -u):$(id -g)" pisa-dist experiment=digits_label1
#
# docs/clusters.md has more: GPUs, data, several processes, stopping.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH=cpu
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/pisa
ENV PATH=/opt/pisa/bin:$PATH
WORKDIR /build
# torch alone first: the large layer stays when the package changes.
COPY constraints.txt .
RUN pip install -c constraints.txt --extra-index-url "https://download.pytorch.org/whl/${TORCH}" torch
COPY . .
RUN pip install -c constraints.txt --extra-index-url "https://download.pytorch.org/whl/${TORCH}" ".${EXTRAS}"

FROM python:${PYTHON}-slim-bookworm
RUN useradd --create-home --uid 1000 pisa && install -d -o pisa -g pisa /home/pisa/runs
COPY --from=build /opt/pisa /opt/pisa
# Drawing and compiling keep their caches where any user may write; data sets are mounted at /data.
ENV PATH=/opt/pisa/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    PISA_DATA=/data \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER pisa
WORKDIR /home/pisa
# The image trains, or it is not built.
RUN pisa-train device=cpu rounds=1 run_dir=/tmp/check && rm -r /tmp/check /tmp/matplotlib
# `docker stop` sends TERM: a checkpoint is written, and the status is 75.
ENTRYPOINT ["pisa-train"]
