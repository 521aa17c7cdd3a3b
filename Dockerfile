# rwkv-dpo with all of its extras, for CPUs or for NVIDIA GPUs:
#   docker build -t rwkv-dpo:cpu .
#   docker build -t rwkv-dpo:cuda --build-arg DEVICE=cuda .
ARG DEVICE=cpu

FROM python:3.12-slim-bookworm AS base
# A compiler, because kernels are built on first use. Debian has one version of it in a release, and drops that for its next fix.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt .

FROM base AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY RWKV-v5/src RWKV-v5/src
RUN pip wheel --no-cache-dir --no-deps -w dist .

FROM base AS torch-cpu
# The index that PyTorch's install page names for CPUs: without it pip takes the build for GPUs, gigabytes of libraries with it.
ARG PIP_EXTRA_INDEX_URL=
RUN sed -n 's/^torch==.*/&+cpu/p' constraints.txt > cpu.txt \
    && { pip install --no-cache-dir -r cpu.txt || pip install --no-cache-dir -c constraints.txt torch; }

FROM base AS torch-cuda
# nvcc comes from pip, of the same CUDA as torch's own libraries; the driver from the host, through NVIDIA's container toolkit.
RUN pip install --no-cache-dir -c constraints.txt torch "cuda-toolkit[nvcc,cccl]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# One of the two stages above.
# hadolint ignore=DL3006
FROM torch-${DEVICE}
COPY --from=wheel /build/dist /build/dist
RUN pip install --no-cache-dir -c /build/constraints.txt "$(echo /build/dist/*.whl)[all]" \
    && useradd --uid 1000 --create-home rwkv
USER 1000
WORKDIR /work
ENTRYPOINT ["rwkv-dpo"]
CMD ["--help"]
