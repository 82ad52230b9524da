# An image with the project, its pinned dependencies and the kernels of csrc/.
#
#   docker build -t flamingo-trainer .                               for NVIDIA GPUs
#   docker build -t flamingo-trainer:cpu --build-arg DEVICE=cpu .    for CPUs
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" flamingo-trainer python -m trainer.train CONFIG.yaml
#
# Build arguments:
#   DEVICE=cuda|cpu           which base, and which kernels
#   CUDA_IMAGE, CUDA_RUNTIME  bases with CUDA, of the CUDA version that the pinned torch is built for
#   CPU_IMAGE                 base without CUDA: Debian or Ubuntu with Python 3.11 or newer
#   TORCH_INDEX               another package index for torch alone, such as the one with torch's smaller CPU builds
#   TORCH_CUDA_ARCH_LIST      cards that the CUDA kernels are built for
#   MAX_JOBS                  compilations at a time
ARG DEVICE=cuda
ARG CUDA_IMAGE=nvidia/cuda:13.2.0-devel-ubuntu24.04
ARG CUDA_RUNTIME=nvidia/cuda:13.2.0-base-ubuntu24.04
ARG CPU_IMAGE=debian:bookworm-slim

FROM ${CUDA_IMAGE} AS build-cuda
FROM ${CPU_IMAGE} AS build-cpu
FROM ${CUDA_RUNTIME} AS runtime-cuda
FROM ${CPU_IMAGE} AS runtime-cpu

FROM build-${DEVICE} AS build
ARG DEVICE
ARG TORCH_INDEX=
ARG TORCH_CUDA_ARCH_LIST="8.0+PTX 9.0a"
ARG MAX_JOBS=2
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/flamingo/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/flamingo
# Dependencies come first, so that a change of the project does not install them again. mpi4py needs an MPI library.
COPY requirements.txt /source/
RUN sed '/^mpi4py==/d' /source/requirements.txt > /source/pins.txt \
    && if [ -n "$TORCH_INDEX" ]; then \
        pip install --index-url "$TORCH_INDEX" $(grep -E '^torch(vision)?==' /source/pins.txt); \
    fi \
    && pip install -r /source/pins.txt
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE /source/
COPY csrc /source/csrc
COPY model /source/model
COPY trainer /source/trainer
RUN if [ "$DEVICE" = cpu ]; then export FLAMINGO_BUILD=cpu; fi \
    && pip install --no-build-isolation --no-deps /source \
    && cd / \
    && DS_ACCELERATOR=cpu python -m trainer.doctor

FROM runtime-${DEVICE} AS runtime
ARG DEVICE
# g++ and libaio compile DeepSpeed's own ops when a setting asks for them; ssh and pdsh reach other nodes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libaio-dev python3 python3-dev openssh-client pdsh iproute2 \
        tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 flamingo \
    && mkdir -p /work \
    && chown flamingo:flamingo /work
COPY --from=build /opt/flamingo /opt/flamingo
COPY configs /opt/flamingo/share/flamingo-trainer/configs
COPY launch_scripts /opt/flamingo/share/flamingo-trainer/launch_scripts
ENV PATH=/opt/flamingo/bin:$PATH PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
USER flamingo
WORKDIR /work
# tini passes signals on, so that a stopped container saves a checkpoint.
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "trainer.doctor"]
