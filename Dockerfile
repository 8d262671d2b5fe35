# The tuner as one image, for the service, its workers, the scheduler and the command line.
#
#   docker build -t localhost/tuner:0.1.0 .                       TensorFlow for processors
#   docker build -t localhost/tuner:0.1.0 --build-arg LOCK=gpu .  TensorFlow with CUDA
#   docker build --secret id=pip,src=$HOME/.config/pip/pip.conf . your own package index
#
# The version after `tuner:` is that of pyproject.toml, as in docker-compose.yml (a test).

FROM python:3.12-slim-trixie AS build
ARG LOCK=cpu
WORKDIR /build
# The base image's pip installs into the environment from outside: none is left in it.
RUN python -m venv --without-pip /opt/tuner
COPY locks/${LOCK}.txt lock.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip --python /opt/tuner/bin/python install --no-cache-dir --disable-pip-version-check \
    --require-hashes --no-deps --only-binary=:all: -r lock.txt
# setuptools is in the lock, so that the project's own build asks no index.
COPY pyproject.toml README.md LICENSE ./
COPY tuner tuner
RUN pip --python /opt/tuner/bin/python install --no-cache-dir --disable-pip-version-check \
    --no-index --no-deps --no-build-isolation .

FROM python:3.12-slim-trixie
ARG LOCK=cpu
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tuner" \
      org.opencontainers.image.description="Hyperparameter tuning with a sealed test split" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="python:3.12-slim-trixie" \
      tuner.lock="${LOCK}"
# A named volume takes the owner of the folder that it is first mounted on.
RUN rm -r /usr/local/lib/python3.12/site-packages/pip* /usr/local/lib/python3.12/ensurepip \
      /usr/local/bin/pip* \
    && groupadd --gid 10001 tuner \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin tuner \
    && install --directory --owner tuner --group tuner --mode 750 /artifacts
COPY --from=build /opt/tuner /opt/tuner
COPY studies /studies
# Everything that is written goes to /artifacts (a volume) and /tmp: the rest may be read-only.
# A worker's network logs nothing of use: TensorFlow says on stderr what processor it found.
ENV PATH=/opt/tuner/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TF_CPP_MIN_LOG_LEVEL=2 \
    TUNER_ARTIFACTS=/artifacts
WORKDIR /
USER 10001:10001
# It serves several roles; docker-compose.yml and docs/clusters/kubernetes.yaml check each its own way.
HEALTHCHECK NONE
ENTRYPOINT ["tuner"]
CMD ["--help"]
