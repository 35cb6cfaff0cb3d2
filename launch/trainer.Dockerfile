# The trainer, for machines with accelerators. From the repository's root:
#   docker build -f launch/trainer.Dockerfile --build-arg ACCELERATOR=tpu -t retool-trainer:tpu .
#   docker build -f launch/trainer.Dockerfile --build-arg ACCELERATOR=cuda12 -t retool-trainer:cuda12 .
# It runs as an ordinary user and has no sandbox of its own: name servers (launch/sandbox.Dockerfile) in
# --config.sandbox.addresses, their token in RETOOL_SANDBOX_TOKEN.
FROM python:3.12-slim-bookworm
ARG ACCELERATOR=tpu

RUN case "$ACCELERATOR" in tpu|cuda12|cuda13) ;; *) echo "ACCELERATOR=$ACCELERATOR: tpu, cuda12 or cuda13" >&2; exit 2;; esac
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /srv
ENV PYTHONUNBUFFERED=1
COPY requirements.lock setup.py pyproject.toml README.md LICENSE ./
COPY retool_jax retool_jax
COPY configs configs
COPY launch launch
RUN pip install --no-cache-dir --constraint requirements.lock --editable ".[$ACCELERATOR,server]"

RUN useradd --create-home --uid 10001 trainer
USER 10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "python"]
CMD ["launch/ppo.py", "--help"]
