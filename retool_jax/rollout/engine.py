"""The host half of rollout: rows that take episodes, tools that answer while other rows decode.

An Engine drives all engines of its sampler, which run side by side. It holds what stays the same over calls – compiled
programs, turn rules, executor, the key – and takes the weights with each `run`. The loop over the rows is
`scheduler.Scheduler`. What an episode samples depends on its problem, sample index and step alone, never on its row,
its neighbours or a tool's latency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from retool_jax.core import columns, signals
from retool_jax.core.pytrees import Params, SampleState
from retool_jax.core.records import Episode
from retool_jax.rollout import turns
from retool_jax.rollout.journal import Journal
from retool_jax.rollout.requests import Executor, Link, Request
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.scheduler import Equipment, Scheduler
from retool_jax.rollout.settings import SamplingSettings
from retool_jax.rollout.stats import RolloutStats, Timeline


class Engine:
    """Runs episodes through a Sampler's rows; takes the weights with each call."""

    def __init__(
        self,
        sampler: Sampler,
        rules: turns.Rules,
        sampling: SamplingSettings,
        executor: Executor | None,
        seed: int,
        purpose: int,
        link: Link | None = None,
    ):
        """purpose: separates the randomness of training, evaluation, … under one seed. link: needed where the sampler
        is on the devices of several processes; all of them must make the same calls with the same requests.

        Raises:
          ValueError: tools without an executor, or turns longer than a row of the sampler.
        """
        if rules.settings.tools and executor is None:
            raise ValueError('an engine with tools needs an executor')
        if rules.settings.max_tokens > sampler.settings.slots:
            raise ValueError(
                f'turns.max_tokens={rules.settings.max_tokens} exceeds the {sampler.settings.slots} '
                'KV slots of a row; raise sampler.slots'
            )
        self.sampler, self.rules, self.sampling, self.executor = sampler, rules, sampling, executor
        self.link = link
        # Plain numbers: on a mesh over several processes an array would have to say where it lies.
        self.key_data = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(seed), purpose)))
        self.stats, self.told = RolloutStats(), 0  # of the last run; the signal that ended it before its end
        self.own = self.stats  # those of this process alone
        self.timeline: Timeline | None = None
        self.common: tuple[int, ...] = ()  # ids that prompts begin with, computed once per run (template.common_ids)
        self.keeps_cache = False  # keeps the KV cache between runs: quicker, where nothing else needs the memory
        self.kept: SampleState | None = None

    @property
    def rows(self) -> int:
        """Episodes that are made side by side."""
        return self.sampler.rows

    def warm_up(self, params: Params) -> None:
        """Compiles everything that runs call, for every length; takes the cache's memory for a moment."""
        self.sampler.warm_up(params, self.sampling.truncates)

    def run(
        self,
        params: Params,
        version: int,
        requests: Sequence[Request],
        step: int,
        *,
        journal: Journal | None = None,
        quanta: int | None = None,
        finished: Callable[[Episode], None] = lambda episode: None,
    ) -> list[Episode]:
        """Makes all requested episodes with `params` (sampling layout), in the order of the requests.

        quanta: decode calls that each episode may take part in; what is then unfinished comes back with stop None,
        to be taken up by `Request.resume` under later weights. They are counted per episode, so that where one is cut
        depends on no latency; a tool that runs is waited for. finished: is called with every episode that ends.

        Raises: `signals.stop` where it was told to; what is unfinished is lost, but for its tool results.
        """
        done = self.make(params, version, requests, step, journal=journal, quanta=quanta, finished=finished)
        if self.told:
            raise signals.stop(self.told)
        return done

    def make(
        self,
        params: Params,
        version: int,
        requests: Sequence[Request],
        step: int,
        *,
        journal: Journal | None = None,
        quanta: int | None = None,
        finished: Callable[[Episode], None] = lambda episode: None,
    ) -> list[Episode]:
        """`run`, with fewer episodes where `told` says why."""
        done: dict[int, Episode] = {}
        for index, episode in self.stream(params, version, requests, step, journal=journal, quanta=quanta):
            done[index] = episode
            if episode.stop is not None:
                finished(episode)
        return [done[i] for i in sorted(done)]

    def stream(
        self,
        params: Params,
        version: int,
        requests: Sequence[Request],
        step: int,
        *,
        journal: Journal | None = None,
        quanta: int | None = None,
    ) -> Iterator[tuple[int, Episode]]:
        """Yields (index of the request, episode) as they finish; ends early where `told` then says why."""
        equipment = Equipment(
            sampler=self.sampler,
            rules=self.rules,
            sampling=self.sampling,
            key_data=self.key_data,
            executor=self.executor,
            link=self.link,
            timeline=self.timeline,
            common=self.common,
        )
        scheduler = Scheduler(
            equipment,
            params,
            version,
            requests,
            step,
            journal=journal,
            quanta=quanta,
            state=self.kept or self.sampler.empty(),
        )
        self.kept, self.stats, self.own, self.told = None, scheduler.stats, scheduler.stats, 0
        for index, episode in scheduler.run():
            if episode.stop is not None:
                columns.settle(episode)
            yield index, episode
        self.told = scheduler.told
        if self.keeps_cache:
            self.kept = scheduler.state
