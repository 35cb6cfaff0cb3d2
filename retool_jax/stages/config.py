"""What each stage reads: one frozen dataclass a stage, of the blocks of its configuration file.

`settings.build(Reinforcement, config)` checks every value of every key, then what joins blocks, before anything is
built or written. The names and the defaults of the keys are those of configs/base.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from retool_jax.algo.settings import AdvantageSettings, LossSettings
from retool_jax.core.checks import MANY, WRITTEN, Rule, above, address, check, filled, local_path, one_of, within
from retool_jax.core.endpoint_settings import EndpointSettings
from retool_jax.core.episode_files import EpisodeSettings
from retool_jax.core.errors import UserError
from retool_jax.core.profile import ProfileSettings
from retool_jax.core.sharding import AXES
from retool_jax.model.lora import LoRASettings
from retool_jax.rollout.settings import SamplerSettings, SamplingSettings
from retool_jax.rollout.turns import Budgets
from retool_jax.sandbox.feedback import FeedbackSettings
from retool_jax.sandbox.settings import SandboxSettings
from retool_jax.stages.alarms import WatchSettings
from retool_jax.tasks import arithmetic, grader, gym, solutions
from retool_jax.text import template
from retool_jax.train import ppo
from retool_jax.train.ppo import PPOSettings
from retool_jax.train.settings import ForwardSettings
from retool_jax.train.sft import SFTSettings
from retool_jax.train.state import OptimizerSettings

PROBLEMS = 10**7  # of the embedded task, which are made in memory
UNREADABLE = ('refuse', 'leave_out')
ENGINE, ENDPOINT = BACKENDS = 'engine', 'endpoint'


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run writes, and its seed."""

    # the folder a run writes to and goes on in; made where it is missing: a path, or an address gs://BUCKET/…
    dir: str
    seed: int  # of everything drawn: first weights, order of problems, tokens; 0 to 2³¹ − 1

    def __post_init__(self):
        check(self, dir=address(WRITTEN), seed=within(0, MANY))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and how it is spoken to."""

    path: str | None  # a Hugging Face directory, or its address; None: the embedded model with random weights
    name: str  # launch/plan.py knows the sizes of published models by it, without their files
    template: str  # family of prompts: text.template.NAMES; 'own' is the chat template beside the model's tokenizer
    tools: bool  # False: a model without an interpreter, the text-only baseline. P §3.2
    # what the user turn says: 'paper' (155 tokens), 'short' (50), or a file with {question} where the problem goes;
    # None: the template's own. Give every stage the same: a model knows the prompt that it was trained with
    instruction: str | None

    def __post_init__(self):
        check(self, path=address(), instruction=local_path(), name=filled(), template=one_of(template.NAMES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Devices along each axis; one axis may be -1 and takes what is left."""

    # devices among which episodes are divided, weights being whole in each; at least 1, or -1 for what is left
    data: int
    fsdp: int  # devices among which episodes and weights are divided; at least 1, or -1
    # devices among which heads and MLP of a layer are divided; at least 1, or -1; the chips of one host at most
    tensor: int
    # slices of TPUs that the data axis runs over, by the network between their hosts; 0: as many as there are
    slices: int

    def __post_init__(self):
        size = Rule(lambda n: n == -1 or 1 <= n <= 2**20, 'must be at least 1, or -1')
        check(self, **dict.fromkeys(AXES, size), slices=within(0, 2**20))
        rest = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(rest) > 1:
            raise UserError(f'{"=-1 and mesh.".join(rest)}=-1: only one axis can take the devices that are left')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandboxBlock(SandboxSettings):
    """The pool of this machine, or the servers that take its place."""

    # servers, as ('http://host:8080', …), with their token in RETOOL_SANDBOX_TOKEN; none: a pool of this machine
    addresses: tuple[str, ...]

    def __post_init__(self):
        super().__post_init__()
        url = Rule(
            lambda x: x.startswith(('http://', 'https://')) and bool(x.partition('://')[2].strip('/ ')),
            'must be http://host:port or https://host:port',
        )
        check(self, addresses=url)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """How answers are graded."""

    style: str  # 'paper': +1 or −1 by the answer alone (P eq. 2); 'verl': R's shaping by the number of calls besides
    # rows without an answer and gold answers that are no mathematics: 'refuse' the file, or 'leave_out' those and
    # list them in left_out.jsonl. H
    unreadable: str
    # CPU seconds for one answer, above 0, at most 3,600; an answer that takes more counts as wrong. H
    time_limit_s: float
    memory_mb: int  # MiB of one judging child, 256 to 1,048,576; an answer that takes more counts as wrong. H
    workers: int  # children that judge, 1 to 1,024

    def __post_init__(self):
        check(
            self,
            style=one_of(grader.STYLES),
            unreadable=one_of(UNREADABLE),
            time_limit_s=above(0, 3600),
            memory_mb=within(256, 2**20),
            workers=within(1, 1024),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Problems that are trained on."""

    # problem files or folders that are trained on, or generators (reasoning_gym:NAME?…); none: the embedded task
    sources: tuple[str, ...]
    # of the sources, each above 0: how often a problem comes from each; none: every problem equally often
    weights: tuple[float, ...]

    def __post_init__(self):
        check(self, sources=address(), weights=above(0, 1e9))
        if self.weights and len(self.weights) != len(self.sources):
            raise UserError(f'weights={self.weights} needs one weight for each of the {len(self.sources)} data.sources')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When state is saved."""

    every: int  # steps from one checkpoint to the next, at least 1; a killed run makes that many again at most
    every_s: float  # seconds after which one is due besides, at the end of a step; 0: steps alone decide. H
    keep_last: int  # checkpoints that are kept, at least 1; the best one stays besides

    def __post_init__(self):
        check(self, every=within(1, MANY), every_s=within(0, 1e9), keep_last=within(1, MANY))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalvesSettings:
    """One half of a step alone."""

    # an episodes/ folder to train on, a part a step: no sampler, sandbox or grader; None: the run makes its own
    episodes: str | None
    train: bool  # False: episodes are made and kept, and the weights stay as they are

    def __post_init__(self):
        check(self, episodes=address())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Scores while a policy learns."""

    # a problem file that is never trained on, or a generator, whose held-out problems it is; None: no validation
    problems: str | None
    limit: int | None  # the first problems of it only, at least 1; None: all
    every: int  # steps from one validation to the next, at least 1; the last step is always followed by one
    samples: int  # answers per problem, 1 to 65,536. P 32

    def __post_init__(self):
        check(self, problems=address(), limit=within(1, MANY), every=within(1, MANY), samples=within(1, 2**16))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Shares of trace kinds in easy families and in those that need the tool."""

    # share of each kind of trace in families that mental arithmetic can do, 0 to 1, together 1: mental (worked in
    # the head), direct (said at once), code, repair (a failing snippet and its correction). H
    easy: Mapping[str, float]
    needy: Mapping[str, float]  # the same in families that need the tool. H: both ways, so that RL learns when to call

    def __post_init__(self):
        for name in ('easy', 'needy'):
            shares = getattr(self, name)
            for kind, share in shares.items():
                if kind not in arithmetic.TRACE_KINDS:
                    raise UserError(f'{name}.{kind}: no such kind of trace; use {", ".join(arithmetic.TRACE_KINDS)}')
                if not 0 <= share <= 1:
                    raise UserError(f'{name}.{kind}={share} must lie in [0, 1]')
            if not abs(sum(shares.values()) - 1) <= 1e-6:
                listed = ', ./'.join(f'{name}.{kind}={share}' for kind, share in shares.items())
                raise UserError(f'{listed}: the shares must add up to 1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColdStart:
    """launch/cold_start.py."""

    run: RunSettings
    traces: str | None  # a file of rewritten answers; None: traces are made from the embedded task
    golds: str | None  # a problem file with the answers of traces that have none but their own last box
    # generators (reasoning_gym:NAME?…) whose worked solutions become traces, of the kinds of mix.needy; none: `traces`
    worked: tuple[str, ...]
    problems: int  # of the embedded task, or of `worked`, that traces are made of, 1 to 10⁷
    mix: Mix
    max_tokens: int  # longer traces are dropped; at least 1
    model: ModelSettings
    sandbox: SandboxBlock
    feedback: FeedbackSettings
    reward: RewardSettings

    def __post_init__(self):
        check(
            self,
            traces=address(),
            golds=address(),
            problems=within(1, PROBLEMS),
            max_tokens=within(1, MANY),
            worked=Rule(gym.named, f'must be a generator: {gym.PREFIX}NAME'),
        )
        require_path(self.model)
        if self.traces is None and self.model.path is not None and not self.worked:
            raise UserError(
                'traces is missing: config.traces has to name a file of rewritten answers, or '
                'config.worked generators with worked solutions'
            )
        if self.traces is not None and self.worked:
            raise UserError(
                f'traces={self.traces!r} and worked={self.worked} both name what traces are made of; give one of them'
            )
        if self.worked:
            fit_mix(self.mix)
        if self.golds is not None and self.traces is None:
            raise UserError(f'golds={self.golds!r} answers the traces of a file, and traces names none')


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
    """launch/sft.py."""

    run: RunSettings
    traces: str | None  # the episodes/ folder of a cold start
    unreadable: str  # traces whose gold answers cannot be read: 'refuse' the folder, or 'leave_out' and list them
    model: ModelSettings
    lora: LoRASettings
    mesh: MeshSettings
    forward: ForwardSettings
    optimizer: OptimizerSettings
    sft: SFTSettings
    checkpoints: CheckpointSettings

    def __post_init__(self):
        check(self, traces=address(), unreadable=one_of(UNREADABLE))
        if self.traces is None:
            raise UserError('config.traces is missing; give the episodes/ folder that launch/cold_start.py wrote')
        require_path(self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """launch/evaluate.py."""

    run: RunSettings
    problems: str | None  # the problem file that is scored, or a generator, whose held-out problems it is
    limit: int | None  # the first problems of it only, at least 1; None: all
    samples: int  # answers per problem, 1 to 65,536. P 32
    # who writes the tokens: 'engine' is this program, with the weights at model.path; 'endpoint' a server, of which
    # `endpoint` says what it is: model.path then needs no more than the tokenizer, mesh and sampler mean nothing
    backend: str
    endpoint: EndpointSettings
    model: ModelSettings
    mesh: MeshSettings
    sampler: SamplerSettings
    turns: Budgets
    sampling: SamplingSettings
    sandbox: SandboxBlock
    feedback: FeedbackSettings
    reward: RewardSettings

    def __post_init__(self):
        check(self, problems=address(), limit=within(1, MANY), samples=within(1, 2**16), backend=one_of(BACKENDS))
        if self.problems is None:
            raise UserError('config.problems is missing; give a problem file')
        if self.backend == ENGINE:
            require_path(self.model)
            fit_cache(self.turns, self.sampler)
        elif self.model.path is None:
            raise UserError(
                'model.path is missing; give a directory with the tokenizer of the model that the server holds'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What every stage that learns from its own episodes reads."""

    run: RunSettings
    model: ModelSettings
    lora: LoRASettings
    mesh: MeshSettings
    forward: ForwardSettings
    sampler: SamplerSettings
    turns: Budgets
    train_sampling: SamplingSettings
    evaluate_sampling: SamplingSettings
    sandbox: SandboxBlock
    feedback: FeedbackSettings
    reward: RewardSettings
    optimizer: OptimizerSettings
    critic_optimizer: OptimizerSettings
    advantage: AdvantageSettings
    loss: LossSettings
    ppo: PPOSettings

    def __post_init__(self):
        fit_cache(self.turns, self.sampler)
        if self.turns.max_tokens > self.forward.row_width:
            raise UserError(
                f'turns.max_tokens={self.turns.max_tokens} exceeds forward.row_width='
                f'{self.forward.row_width}, the longest episode that can be trained on; change one of them'
            )
        if self.ppo.overlong_buffer > self.turns.max_tokens:
            raise UserError(
                f'ppo.overlong_buffer={self.ppo.overlong_buffer} exceeds '
                f'turns.max_tokens={self.turns.max_tokens}; choose a smaller one'
            )
        ppo.check(self.ppo, self.advantage, self.loss, self.train_sampling, self.sampler.weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforcement(Rollouts):
    """launch/ppo.py, and launch/plan.py, which needs no files of the model."""

    data: DataSettings
    halves: HalvesSettings
    watch: WatchSettings
    checkpoints: CheckpointSettings
    validation: ValidationSettings
    episodes: EpisodeSettings
    profile: ProfileSettings

    def __post_init__(self):
        super().__post_init__()
        if self.episodes.keep != 1 and not self.halves.train:
            raise UserError(
                f'episodes.keep={self.episodes.keep} throws away what halves.train=False makes; set episodes.keep=1'
            )
        if self.ppo.quanta and not (self.halves.train and self.halves.episodes is None):
            raise UserError(
                f'ppo.quanta={self.ppo.quanta} carries episodes over to the weights of the next step, '
                'which one half alone has not; set ppo.quanta=0'
            )
        if self.halves.episodes is not None and self.loss.correction == 'none':
            raise UserError(
                f'halves.episodes={self.halves.episodes!r} trains on tokens of other weights, which '
                'loss.correction=none takes for those of the current ones; set loss.correction=token or '
                'sequence'
            )


def fit_mix(mix: Mix) -> None:
    """Refuses kinds of traces that cannot be made of worked solutions.

    Raises:
      UserError: a share of such a kind is above 0.
    """
    for kind, share in mix.needy.items():
        if share and kind not in solutions.KINDS:
            raise UserError(
                f'mix: {share} of the needy traces are {kind}, and worked solutions become '
                f'{" or ".join(solutions.KINDS)}; set that share to 0'
            )


def require_path(model: ModelSettings) -> None:
    """Refuses a family of published models without the directory of one. Raises: UserError."""
    if model.path is None and model.template != 'tiny':
        raise UserError('model.path is missing; give a Hugging Face model directory')


def fit_cache(turns: Budgets, sampler: SamplerSettings) -> None:
    """Refuses a budget that a row's cache does not hold. Raises: UserError."""
    if turns.max_tokens > sampler.slots:
        raise UserError(
            f'turns.max_tokens={turns.max_tokens} exceeds sampler.slots={sampler.slots}, the KV slots of '
            'a row; change one of them'
        )
