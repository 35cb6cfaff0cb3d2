"""TFDS builders of the public sets, from files on disk to array_record, without TensorFlow.

`Aime2024(path='aime24.jsonl', data_dir='data').download_and_prepare()` writes a folder that
`problems.read` reads, as does `tfds.builder_from_directory(folder).as_data_source('test')`.
Nothing is downloaded: `path` names a file or folder in any form that `problems` reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from retool_jax.core.errors import UserError
from retool_jax.tasks import problems

FIELDS = ('id', 'question', 'answer', 'source', 'family')


class _ProblemSet(tfds.core.GeneratorBasedBuilder):
    """What the builders share: TFDS wants a class for each set."""

    VERSION = tfds.core.Version('1.0.0')
    SPLIT = 'test'
    HOMEPAGE = ''
    code_path = Path(__file__)  # TFDS's own search for it needs a package that it does not install
    traces = False  # whether a row has a worked answer, field 'trace'

    def __init__(self, *, path: str | Path = '', **options):
        self.path = path
        super().__init__(file_format='array_record', **options)

    def _info(self) -> tfds.core.DatasetInfo:
        fields = (*FIELDS, 'trace') if self.traces else FIELDS
        return tfds.core.DatasetInfo(
            builder=self,
            description=(type(self).__doc__ or '').strip(),
            homepage=self.HOMEPAGE,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in fields}),
            disable_shuffling=True,  # the file's order: problem numbers mean something
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # it would fetch
        return {self.SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        if not self.path:
            raise UserError(f'{self.name}: give path=FILE, the file to build from ({self.HOMEPAGE})')
        if self.traces:
            pairs = problems.read_traces(self.path)
        else:
            pairs = [(problem, '') for problem in problems.read(self.path)]
        for number, (problem, trace) in enumerate(pairs):
            row = {name: getattr(problem, name) for name in FIELDS}
            yield number, {**row, 'trace': trace} if self.traces else row


class Aime2024(_ProblemSet):
    """American Invitational Mathematics Examination 2024, I and II: 30 problems."""

    HOMEPAGE = 'https://huggingface.co/datasets/HuggingFaceH4/aime_2024'


class Aime2025(_ProblemSet):
    """American Invitational Mathematics Examination 2025, I and II: 30 problems."""

    HOMEPAGE = 'https://huggingface.co/datasets/math-ai/aime25'


class Math500(_ProblemSet):
    """500 problems of the MATH test set."""

    HOMEPAGE = 'https://huggingface.co/datasets/HuggingFaceH4/MATH-500'


class DapoMath17k(_ProblemSet):
    """DAPO-Math-17k, deduplicated, without questions whose rows disagree about the answer."""

    SPLIT = 'train'
    HOMEPAGE = 'https://huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k'


class RetoolSft(_ProblemSet):
    """ReTool-SFT: 2,000 code-augmented solutions for the cold start."""

    SPLIT = 'train'
    HOMEPAGE = 'https://huggingface.co/datasets/JoeYing/ReTool-SFT'
    traces = True
