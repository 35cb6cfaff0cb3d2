"""What became of traces: the samples of a problem are told apart, however often some of them were judged."""

from retool_jax.core import episode_files
from retool_jax.core.records import Problem
from retool_jax.sandbox.feedback import FeedbackSettings
from retool_jax.tasks import answers
from retool_jax.text.template import make_template, wrap_answer
from retool_jax.traces import outcome, repair, verification
from retool_jax.traces.verification import Wording
from tests.fakes import byte_tokenizer


def test_traces_that_were_judged_apart_are_samples_of_their_own(tmp_path):
    feedback = FeedbackSettings(style='official', max_chars=400, max_frames=6)
    wording = Wording(make_template('tiny'), byte_tokenizer(), feedback)
    items = [repair.read(Problem(name, '?', '2', 's', ''), wrap_answer('2')) for name in 'aab']
    judge = lambda: verification.verify(items, None, wording, answers.equal_at_sight, progress=False)
    summary = outcome.keep(tmp_path, [*judge(), *judge()], wording.tokenizer)
    made = episode_files.read(tmp_path / 'episodes')
    assert sorted((e.problem.id, e.sample) for e in made) == [*(('a', n) for n in range(4)), ('b', 0), ('b', 1)]
    assert summary['counts']['kept'] == summary['statistics']['traces'] == 6
