"""What goes wrong while a run goes on: named alarms over the metrics of its steps."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from retool_jax.core.checks import MANY, check, one_of, within
from retool_jax.core.records import Episode

ACTIONS = ('ignore', 'warn', 'stop')
ALARMS = (
    'entropy', 'equal_rewards', 'mismatch', 'episode_mismatch', 'failures', 'faults', 'timeouts', 'straggler',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """Thresholds, and per alarm what follows: 'ignore', 'warn' or 'stop'."""

    entropy_below: float  # nats per token, at least 0: less rings `entropy`. H
    # steps in a row whose episodes are all right, or all wrong, at least 1: as many ring `equal_rewards`. H
    equal_steps: int
    mismatch_above: float  # |KL| between sampler and trainer, nats per token, at least 0: more rings `mismatch`. H
    # mean |Δ log p| of the worst episode, nats per token, at least 0: more rings `episode_mismatch`; bf16 gives up to
    # 0.02, a wrong context 0.1 and more. H
    episode_mismatch_above: float
    failures_above: float  # share of calls that end in anything but OK, 0 to 1: more rings `failures`. H
    faults_above: float  # share of calls that the sandbox itself failed, 0 to 1: more rings `faults`. H
    timeouts_above: float  # share of episodes whose answer the judge had no time for, 0 to 1: more rings `timeouts`. H
    # rollout time of the slowest process over the median one, at least 0: more rings `straggler`. H
    straggler_above: float
    straggler_steps: int  # steps in a row in which it is the same process, at least 1: as many ring it. H
    entropy: str  # the policy has collapsed: 'ignore', 'warn' or 'stop'. H
    equal_rewards: str  # there is nothing to learn from: 'ignore', 'warn' or 'stop'. H
    mismatch: str  # sampler and trainer disagree: 'ignore', 'warn' or 'stop'. H
    episode_mismatch: str  # they disagree about one episode: 'ignore', 'warn' or 'stop'. H
    failures: str  # most code fails: 'ignore', 'warn' or 'stop'. H
    faults: str  # the sandbox fails: 'ignore', 'warn' or 'stop'. H
    timeouts: str  # answers count as wrong unjudged: 'ignore', 'warn' or 'stop'. H
    straggler: str  # one process holds up the others: 'ignore', 'warn' or 'stop'. H

    def __post_init__(self):
        check(
            self,
            entropy_below=within(0, 1e9),
            **dict.fromkeys(('equal_steps', 'straggler_steps'), within(1, MANY)),
            **dict.fromkeys(('mismatch_above', 'episode_mismatch_above', 'straggler_above'), within(0, 1e9)),
            **dict.fromkeys(('failures_above', 'faults_above', 'timeouts_above'), within(0, 1)),
            **dict.fromkeys(ALARMS, one_of(ACTIONS)),
        )


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Something that a person should look at."""

    name: str  # the key of its action in block `watch`
    text: str
    stop: bool


class Watch:
    """Reads each step's metrics; remembers for how many steps all answers have been right, or all wrong, and for how
    many one process has held up the others.

    An alarm is given when its condition begins to hold, not again at every step in which it goes on.
    """

    def __init__(self, settings: WatchSettings):
        self.settings = settings
        self._equal = 0
        self._behind, self._slowest = 0, -1
        self._ringing: set[str] = set()

    def look(
        self, metrics: Mapping[str, float], episodes: Sequence[Episode], hosts: Sequence[Mapping] = ()
    ) -> list[Alarm]:
        """The alarms of a step that is over; hosts: what each process did in it (rollout/hosts.py: describe)."""
        s = self.settings
        # Correctness, not the reward: reward.style=verl and the overlong penalty tell wrong answers apart.
        self._equal = self._equal + 1 if len({e.reward.correct for e in episodes}) == 1 else 0
        right = bool(episodes) and episodes[0].reward.correct
        of = lambda name: metrics.get(name, 0.0)
        entropy = metrics.get('actor/entropy')
        why = (
            'weights move faster than carried episodes end; raise ppo.quanta or lower optimizer.lr'
            if of('partial/stale_tokens')
            else 'sampler and trainer disagree; compare sampler.dtype and sampler.weights with forward.dtype'
        )
        found = {
            'entropy': (entropy is not None and entropy < s.entropy_below,
                        f'actor/entropy {entropy or 0.0:.3g} is below {s.entropy_below:g}: the policy has collapsed; '
                        'lower optimizer.lr or raise loss.entropy_coef'),
            'equal_rewards': (self._equal >= s.equal_steps,
                              f'all answers of {self._equal} steps are {"right" if right else "wrong"}: there is '
                              'nothing to learn from; choose problems that the model solves sometimes'),
            'mismatch': (abs(of('mismatch/kl')) > s.mismatch_above,
                         f'mismatch/kl {of("mismatch/kl"):.3g} exceeds {s.mismatch_above:g}: {why}'),
            'episode_mismatch': (of('mismatch/episode_max') > s.episode_mismatch_above,
                                 f'mismatch/episode_max {of("mismatch/episode_max"):.3g} exceeds '
                                 f'{s.episode_mismatch_above:g}: one episode was sampled from another context than '
                                 f'the trainer scores, or {why}'),
            'failures': (of('tools/failure_frequency') > s.failures_above,
                         f'tools/failure_frequency {of("tools/failure_frequency"):.2f} exceeds {s.failures_above:g}: '
                         'most code fails; read the episodes'),
            'faults': (of('tools/fault_frequency') > s.faults_above,
                       f'tools/fault_frequency {of("tools/fault_frequency"):.2f} exceeds {s.faults_above:g}: the '
                       'sandbox itself fails; run python -m retool_jax.sandbox.doctor'),
            'timeouts': (of('grader/timeout_frequency') > s.timeouts_above,
                         f'grader/timeout_frequency {of("grader/timeout_frequency"):.2f} exceeds {s.timeouts_above:g}: '
                         'so many answers count as wrong because they were not judged in time; read them, and raise '
                         'reward.time_limit_s where they are in earnest'),
            'straggler': self._follow(hosts),
        }  # fmt: skip
        alarms = []
        for name, (rings, text) in found.items():
            action = getattr(s, name)
            if rings and action != 'ignore' and (action == 'stop' or name not in self._ringing):
                alarms.append(Alarm(name, text, action == 'stop'))
        self._ringing = {name for name, (rings, _) in found.items() if rings}
        return alarms

    def _follow(self, hosts: Sequence[Mapping]) -> tuple[bool, str]:
        """Whether one process has held up the others for long, and the words."""
        s = self.settings
        if len(hosts) < 2:
            return False, ''
        # The lower of two middle ones: over their mean the slower of two processes would never be twice the median.
        median_s = statistics.median_low(line['rollout_s'] for line in hosts)
        slowest = max(hosts, key=lambda line: line['rollout_s'])
        behind = slowest['rollout_s'] > s.straggler_above * median_s
        again = behind and slowest['process'] == self._slowest
        self._behind, self._slowest = self._behind + 1 if again else int(behind), slowest['process']
        return self._behind >= s.straggler_steps, (
            f'process {slowest["process"]} on {slowest["host"]} took {slowest["rollout_s"]:.1f} s for its part of the '
            f'rollout, the median one {median_s:.1f} s, and so for {self._behind} steps: look at that machine, its '
            'load, disk and sandbox; hosts.jsonl has a line for each process and step'
        )
