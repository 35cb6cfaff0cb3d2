"""Every block of a configuration: its values.

What a key means, its unit, which values it may have and what the paper or a recipe sets stand beside the field of the
block's dataclass, and in `--help`; here is a comment only where a value departs from its source, or has none there.
Sources: P the ReTool paper (arXiv 2504.11536), O its authors' evaluation code, R public reproductions (verl's recipe),
H this project's choice. Letters speak of the real sizes: every number of `tiny` is H, and so is a key without a letter,
which is of the machine and not of the algorithm.
"""

from ml_collections import ConfigDict, config_dict

# ARG → template family; sizes are in the checkpoint's config.json
MODELS = {
    'tiny': 'tiny',
    'qwen2_5_0_5b': 'qwen2_5', 'qwen2_5_1_5b': 'qwen2_5', 'qwen2_5_7b': 'qwen2_5', 'qwen2_5_14b': 'qwen2_5',
    'qwen2_5_32b': 'qwen2_5', 'r1_distill_qwen_32b': 'r1_distill',
    'smollm2_135m': 'own', 'smollm2_1_7b': 'own', 'llama3_1_8b': 'own', 'r1_distill_llama_8b': 'r1_distill',
    'qwen3_0_6b': 'qwen3', 'qwen3_4b': 'qwen3', 'qwen3_8b': 'qwen3', 'qwen3_32b': 'qwen3',
}  # fmt: skip


LARGE = ('2_5_7b', '_8b', '_14b', '_32b')  # 64 rows would not fit beside the weights on 80 GB


def check(arg: str) -> str:
    """Refuses an ARG that names no model."""
    if arg not in MODELS:
        raise ValueError(f'ARG {arg!r} is unknown; choose one of {", ".join(MODELS)}')
    return arg


def is_tiny(arg: str) -> bool:
    return check(arg) == 'tiny'


def longest(arg: str) -> int:
    """Tokens of an episode: P's longest sequence, or the context of a smaller model."""
    return 200 if is_tiny(arg) else 8192 if arg.startswith('smollm2') else 16384


def run(arg: str, name: str) -> ConfigDict:
    """Where a run writes, and its seed."""
    return ConfigDict({'dir': f'runs/{name}_{arg}', 'seed': 0})


def model(arg: str) -> ConfigDict:
    return ConfigDict(
        {
            # A Hugging Face directory: config.json, safetensors, tokenizer. tiny: random weights of the
            # embedded size and a tokenizer made on the spot when none is given.
            'path': config_dict.placeholder(str),
            'name': arg,  # launch/plan.py knows the sizes of these without their files
            'template': MODELS[check(arg)],
            'tools': True,  # False: the text-only baseline (P §3.2)
            # What the model is asked: 'paper' (155 tokens; none is the same, but of the embedded model), 'short' (50),
            # or a file, {question} where the problem goes. Give the same one to every stage: a model knows the prompt
            # that it was trained with.
            'instruction': 'short' if arg.startswith('smollm2') else config_dict.placeholder(str),
        }
    )


def lora() -> ConfigDict:
    """Every weight is trained unless a rank is given; the learning rates then want ten times their value."""
    targets = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
    return ConfigDict({'rank': 0, 'alpha': 32.0, 'targets': targets})


def mesh(arg: str = 'tiny') -> ConfigDict:
    # -1 takes the devices that are left. tensor: a host's chips, beyond what one chip holds in rollout.
    return ConfigDict({'data': 1, 'fsdp': -1, 'tensor': 4 if '32b' in arg or '14b' in arg else 1, 'slices': 1})


def forward(arg: str) -> ConfigDict:
    tiny = is_tiny(arg)
    return ConfigDict(
        {
            'dtype': 'float32' if tiny else 'bfloat16',
            'gradient_dtype': 'float32',
            'attention': 'dense' if tiny else 'auto',
            'remat': 'none' if tiny else 'full',
            'unroll': 4 if tiny else 1,
            'logprob_chunk': 200 if tiny else 2048,
            'vocab_chunk': 1024 if tiny else 8192,
            'micro_rows': 16 if tiny else 0,
            'row_width': longest(arg),
            'row_segments': 8 if tiny else 16,
        }
    )


def sampler(arg: str) -> ConfigDict:
    tiny = is_tiny(arg)
    return ConfigDict(
        {
            'rows': 32 if check(arg).endswith(LARGE) else 64,
            'slots': 256 if tiny else longest(arg),
            'chunk': 64 if tiny else 256,
            'feed_rows': 8,
            'quota': 16 if tiny else 64,
            'decode_rows': 0,
            'min_bound': 64 if tiny else 256,
            'dtype': 'float32' if tiny else 'bfloat16',
            'weights': 'float',
            'cache_dtype': 'float32' if tiny else 'bfloat16',
        }
    )


def turns(arg: str) -> ConfigDict:
    tiny = is_tiny(arg)
    return ConfigDict(
        {
            'max_tokens': longest(arg),
            'max_turn_tokens': longest(arg),
            'max_turns': 4 if tiny else 8,
            'max_calls': 3 if tiny else 7,
            'on_cap': 'answer',
            'on_answer': 'end',
        }
    )


def sampling(training: bool) -> ConfigDict:
    return ConfigDict({'temperature': 1.0, 'top_p': 1.0 if training else 0.7, 'top_k': 0, 'min_p': 0.0})


def endpoint() -> ConfigDict:
    """A server that speaks OpenAI's protocol; none unless one is named."""
    return ConfigDict(
        {
            'url': config_dict.placeholder(str),  # http://host:8000/v1
            'model': config_dict.placeholder(str),  # the name under which it serves the model
            'key_variable': config_dict.placeholder(str),  # the environment variable that holds the key, never the key
            'concurrency': 16,
            'timeout_s': 600.0,  # some services send nothing while a model thinks
            'retries': 8,  # two to three minutes in all
            'backoff_s': 1.0,
            'max_requests': config_dict.placeholder(int),  # of the whole run; none: as many as it takes
            'max_tokens': config_dict.placeholder(int),
        }
    )


def sandbox(arg: str) -> ConfigDict:
    return ConfigDict(
        {
            'addresses': (),  # servers, as ('http://host:8080', …), with RETOOL_SANDBOX_TOKEN; none: a pool of our own
            'path': 'warm',
            'zygotes': 2,
            'spares': 3,
            'concurrency': 0,  # 0: two per core
            'recycle': 2000,
            'cpu_s': 5.0,  # O: 5 s; R: 30 s
            'wall_s': 15.0,  # three times the CPU time: a loaded host must not change rewards
            'memory_mb': 256 if is_tiny(arg) else 1024,  # R: 1 GiB
            'processes': 64,
            'files': 256,
            'scratch_mb': 64,
            'scratch_inodes': 4096,
            'output_bytes': 262144,
            'preload': ('numpy', 'sympy'),
            'packages': ('numpy', 'scipy', 'sympy'),
            'echo': False,  # O prints what is printed, no more
            'retries': 3,
            'queue': 16384,  # snippets
            'queue_mb': 256,
            'require_groups': False,
        }
    )


def reward() -> ConfigDict:
    return ConfigDict(
        {
            'style': 'paper',  # P eq. 2: +1 or −1; 'verl' adds R's shaping
            # Rows of a problem file without an answer, and gold answers that are no mathematics: 'refuse' the file, or
            # 'leave_out' those, said and listed in left_out.jsonl.
            'unreadable': 'refuse',
            'time_limit_s': 5.0,  # of CPU time, per answer
            'memory_mb': 1024,
            'workers': 1,
        }
    )


def optimizer(
    lr: float, *, schedule: str = 'constant', warmup_steps: int = 0, weight_decay: float = 0.01, b2: float = 0.999
) -> ConfigDict:
    return ConfigDict(
        {
            'kind': 'adamw',
            'lr': lr,
            'schedule': schedule,
            'warmup_steps': warmup_steps,
            'b1': 0.9,
            'b2': b2,
            'weight_decay': weight_decay,
            'grad_clip': 1.0,
        }
    )


def advantage() -> ConfigDict:
    return ConfigDict({'kind': 'gae', 'gamma': 1.0, 'lam': 1.0, 'whiten': True})


def loss(arg: str = 'tiny') -> ConfigDict:
    tiny = is_tiny(arg)
    config = ConfigDict(
        {
            'kind': 'ppo',
            'clip_low': 0.2,
            'clip_high': 0.28,
            'dual_clip': 10.0,
            'aggregation': 'token-mean',
            'aggregation_constant': config_dict.placeholder(float),
            'entropy_coef': 0.0,
            'kl_coef': 0.0,
            'kl_kind': 'k3',
            'kl_in': 'loss',
            'value_coef': 0.5 if tiny else 1.0,  # a head shares the policy's trunk, and its gradient
            'value_clip': config_dict.placeholder(float),
            'correction': 'token',  # R: none
            'correction_cap': 2.0,
            'correction_low': 0.5,
            'correction_high': 2.0,
        }
    )
    if not tiny:
        config.value_clip = 0.5
    return config


def ppo(arg: str) -> ConfigDict:
    tiny = is_tiny(arg)
    return ConfigDict(
        {
            'steps': 20 if tiny else 400,
            'problems_per_step': 64 if tiny else 1024,
            'samples': 4 if tiny else 1,
            'minibatches': 2,
            'epochs': 1,
            'critic': 'head' if tiny else 'backbone',
            'critic_warmup_steps': 0 if tiny else 20,
            'drop_void': False,
            'mask_truncated': False,
            'overlong_buffer': 0,
            'dynamic_rounds': 0,
            'quanta': 0,
            'offload': not tiny,
            'rescore': True,
        }
    )


def episodes() -> ConfigDict:
    return ConfigDict({'keep': 1})  # those of every step


def profile() -> ConfigDict:
    return ConfigDict({'steps': ()})


def halves() -> ConfigDict:
    """Both halves of a step, unless one is asked for alone."""
    return ConfigDict(
        {
            'episodes': config_dict.placeholder(str),  # an episodes/ folder to train on, without a sampler
            'train': True,  # False: episodes are made and kept, weights stay as they are
        }
    )


def watch() -> ConfigDict:
    """Alarms (all H): a threshold, and what follows: 'ignore', 'warn' or 'stop'."""
    return ConfigDict(
        {
            'entropy_below': 0.01,
            'entropy': 'warn',  # nats per token
            'equal_steps': 3,
            'equal_rewards': 'warn',  # steps in a row in which all answers are right, or all wrong
            'mismatch_above': 0.05,
            'mismatch': 'warn',  # KL between sampler and trainer, nats per token
            # mean |Δ log p| of the worst episode; bf16 gives up to 0.02, a wrong context 0.1 and more
            'episode_mismatch_above': 0.05,
            'episode_mismatch': 'warn',
            'failures_above': 0.9,
            'failures': 'warn',  # share of calls that fail
            'faults_above': 0.5,
            'faults': 'stop',  # share of calls that the sandbox itself failed
            'timeouts_above': 0.02,
            'timeouts': 'warn',  # share of episodes whose answer is not judged in time
            'straggler_above': 1.5,
            'straggler_steps': 3,
            'straggler': 'warn',  # the slowest process of a rollout over the median, so many steps in a row
        }
    )


def data() -> ConfigDict:
    return ConfigDict(
        {
            'sources': (),  # problem files; none: the embedded task
            'weights': (),  # of the sources; none: every problem equally often
        }
    )


def checkpoints(every: int) -> ConfigDict:
    return ConfigDict({'every': every, 'every_s': 0.0, 'keep_last': 2})  # every: steps


def mix(arg: str = 'tiny') -> ConfigDict:
    """Shares of trace kinds in a cold start that is made here. The tool model sees both ways of working, so that
    RL has to learn when to call."""
    if not is_tiny(arg):  # of worked solutions
        return ConfigDict({'easy': {'code': 0.55, 'mental': 0.45}, 'needy': {'code': 0.55, 'mental': 0.45}})
    return ConfigDict(
        {
            'easy': {'code': 0.4, 'mental': 0.6},  # families that mental arithmetic can do
            'needy': {'code': 0.48, 'repair': 0.1, 'mental': 0.42},  # repair: a failing snippet and its correction
        }
    )


def feedback(arg: str) -> ConfigDict:
    return ConfigDict(
        {
            'style': 'official' if is_tiny(arg) else 'paper',  # P fig. 8 shows a whole traceback; O its last line
            'max_chars': 60 if is_tiny(arg) else 400,  # O: over 400, the first and last 200; R: 256
            'max_frames': 6,
        }
    )


def reinforcement(arg: str, name: str) -> ConfigDict:
    """Everything launch/ppo.py reads, as ReTool's PPO has it; the other algorithms change values."""
    tiny = is_tiny(arg)
    return ConfigDict(
        {
            'run': run(arg, name),
            'data': data(),
            'model': model(arg),
            'lora': lora(),
            'mesh': mesh(arg),
            'forward': forward(arg),
            'sampler': sampler(arg),
            'turns': turns(arg),
            'train_sampling': sampling(training=True),
            'evaluate_sampling': sampling(training=False),
            'sandbox': sandbox(arg),
            'feedback': feedback(arg),
            'reward': reward(),
            'optimizer': optimizer(3e-4 if tiny else 1e-6),
            'critic_optimizer': optimizer(1e-3 if tiny else 2e-6),
            'advantage': advantage(),
            'loss': loss(arg),
            'ppo': ppo(arg),
            'halves': halves(),
            'watch': watch(),
            'checkpoints': checkpoints(every=10),
            'episodes': episodes(),
            'profile': profile(),
            'validation': {
                'problems': config_dict.placeholder(str),  # a problem file; none: no validation
                'limit': config_dict.placeholder(int),
                'every': 10,  # steps
                'samples': 8 if tiny else 32,  # P: 32
            },
        }
    )
