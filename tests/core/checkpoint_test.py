"""Checkpoints: exact, atomic, bounded in number, and refused where they do not fit."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from retool_jax.core import checkpoint, cli, mirror
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.pytrees import TrainState
from tests import buckets, namespaces


def state(width: int = 8) -> dict:
    params = {'layers': {'q': jax.random.normal(jax.random.key(0), (4, width)), 'bias': jnp.ones(width, jnp.bfloat16)}}
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {'policy': TrainState(jnp.int32(3), params, transform.init(params)), 'key': jax.random.key(7)}


def words(leaf) -> np.ndarray:
    return np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(words(x), words(y))


def test_a_train_state_comes_back_bit_for_bit_with_its_meta(tmp_path):
    meta = {'cursor': 12345678901, 'version': 3, 'score': 0.1 + 0.2, 'partial': [{'tokens': [1, 2], 'text': 'é'}]}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, state(), meta)
        assert checkpoints.latest() == 3 and checkpoints.meta(3) == meta
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        tree, got = checkpoints.restore(3, jax.eval_shape(state))
    assert got == meta
    assert_same(tree, state())


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jnp.arange(2_000_000, dtype=jnp.float32)
    expected = np.array(x)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(0, {'x': x}, {})
        jax.block_until_ready(overwrite(x))
        tree, _ = checkpoints.restore(0, {'x': jax.ShapeDtypeStruct(expected.shape, expected.dtype)})
    np.testing.assert_array_equal(np.array(tree['x']), expected)


def test_meta_may_change_as_soon_as_save_returns(tmp_path):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        meta = {'cursor': [1]}
        checkpoints.save(0, {'x': jnp.ones(3)}, meta)
        meta['cursor'].append(2)
        assert checkpoints.meta(0) == {'cursor': [1]}


def test_the_last_ones_and_the_best_one_stay(tmp_path):
    scores = [0.1, 0.9, 0.3, 0.9, 0.2, 0.1]
    with Checkpoints(tmp_path, keep_last=2, keep_best_metric='score') as checkpoints:
        for step, score in enumerate(scores[:3]):
            checkpoints.save(step, {'x': jnp.full(3, step)}, {'score': score})
        assert checkpoints.steps() == [1, 2] and checkpoints.best() == 1
        for step, score in enumerate(scores[3:], 3):
            checkpoints.save(step, {'x': jnp.full(3, step)}, {'score': score})
        checkpoints.save(6, {'x': jnp.full(3, 6)}, {})  # not scored: it never is the best
        assert checkpoints.steps() == [3, 5, 6] and checkpoints.best() == 3
    with Checkpoints(tmp_path, keep_last=2, keep_best_metric='score') as checkpoints:
        assert checkpoints.best() == 3
        assert checkpoints.restore(3, {'x': jnp.zeros(3, jnp.int32)})[0]['x'].tolist() == [3, 3, 3]


def test_saving_a_step_again_leaves_it_as_it_is(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        checkpoints.save(1, {'x': jnp.ones(3)}, {'n': 1})
        checkpoints.save(1, {'x': jnp.zeros(3)}, {'n': 2})
        tree, meta = checkpoints.restore(1, {'x': jnp.zeros(3)})
    assert meta == {'n': 1} and tree['x'].tolist() == [1, 1, 1]


def test_what_one_device_saved_is_restored_onto_a_mesh_and_back(tmp_path):
    x = jnp.arange(64.0).reshape(8, 8)
    mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec('fsdp', 'tensor'))
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        checkpoints.save(0, {'x': x}, {})
        on_mesh, _ = checkpoints.restore(0, {'x': jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)})
        assert on_mesh['x'].sharding == split
        checkpoints.save(1, on_mesh, {})
        back, _ = checkpoints.restore(1, {'x': jax.ShapeDtypeStruct(x.shape, x.dtype)})
    assert len(back['x'].devices()) == 1
    np.testing.assert_array_equal(np.array(back['x']), np.array(x))


@pytest.mark.parametrize(
    'like, message',
    [
        (lambda: state(16), r'policy\.params\.layers\.bias is bfloat16\[8\], this run has bfloat16\[16\]'),
        (lambda: state()['policy'], r'step is not in it; params'),
        (lambda: {**state(), 'critic': jnp.ones(2)}, r'critic is not in it$'),
        (lambda: {'policy': state()['policy']}, r'key is not in this run$'),
        (lambda: jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state()),
         r'layers\.bias is bfloat16\[8\], this run has float32\[8\]'),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path, like, message):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(0, state(), {})
        with pytest.raises(ValueError, match=f'another architecture: .*{message}'):
            checkpoints.restore(0, jax.eval_shape(like))


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        with pytest.raises(ValueError, match='no checkpoint of step 4; there are: none'):
            checkpoints.restore(4, {})
        checkpoints.save(2, {'x': jnp.ones(3)}, {})
        with pytest.raises(ValueError, match='no checkpoint of step 4; there are: 2'):
            checkpoints.meta(4)


def child(code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*prefix, sys.executable, '-c', textwrap.dedent(code), *arguments],
        cwd=cli.ROOT, text=True, capture_output=True, timeout=120,
    )  # fmt: skip


def test_a_save_killed_half_way_leaves_the_checkpoint_before_it(tmp_path):
    killed = child(
        """
        import os, signal, sys
        import jax, jax.numpy as jnp
        from retool_jax.core.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], keep_last=1)
        checkpoints.save(1, {'x': jnp.ones(3)}, {'n': 1}, wait=True)
        checkpoints.save(2, {'x': jnp.ones(20_000_000)}, {'n': 2})
        while len(os.listdir(sys.argv[1])) < 2:  # a thread of its own begins it
            pass
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        str(tmp_path),
    )
    assert killed.returncode == -9, killed.stderr
    assert len(list(tmp_path.iterdir())) == 2  # step 1, and what was begun of step 2
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        assert checkpoints.latest() == 1 and checkpoints.meta(1) == {'n': 1}
        checkpoints.save(2, {'x': jnp.ones(4)}, {'n': 3})
        assert checkpoints.latest() == 2
    assert [p.name for p in tmp_path.iterdir()] == ['2']


def test_a_full_disk_is_an_oserror_that_names_the_directory(tmp_path):
    mount = namespaces.small_disk(tmp_path, '1M')
    if not namespaces.allow(*mount):
        pytest.skip('a full disk is played with a mount in a namespace of its own, which this machine refuses')
    full = child(
        """
        import subprocess, sys
        subprocess.run(sys.argv[2:], check=True)
        import jax
        from retool_jax.core import cli
        from retool_jax.core.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], keep_last=1)
        checkpoints.save(1, {'x': jax.random.normal(jax.random.key(0), (1_000_000,))}, {})
        try:
            checkpoints.wait()
        except OSError as error:
            print(cli.explain(error))
        assert checkpoints.latest() is None
        """,
        str(tmp_path), *mount, prefix=namespaces.OWN,
    )  # fmt: skip
    assert full.returncode == 0, full.stderr
    assert full.stdout == f"'{tmp_path}': No space left on device (saving a checkpoint)\n" and full.stderr == ''


def test_in_a_bucket_a_step_that_was_half_deleted_or_half_written_stands_in_nobodys_way(tmp_path):
    with buckets.served():
        fs, place = fsspec.url_to_fs(f'gs://{buckets.BUCKET}', use_listings_cache=False)[0], f'{buckets.BUCKET}/run'
        with mirror.mirrored(mirror.Mirror(f'gs://{place}', tmp_path / 'run')) as folder:
            save = lambda c, step: c.save(step, {'a': jnp.arange(8.0) * step}, {'step': step, 'score': -float(step)})
            with Checkpoints(folder / 'checkpoints', 2, 'score') as checkpoints:
                for step in (1, 2, 3, 4):
                    save(checkpoints, step)
                assert (checkpoints.steps(), checkpoints.best()) == ([1, 3, 4], 1)
            assert not (folder / 'checkpoints').exists()
            fs.rm_file(f'{place}/checkpoints/4/commit_success.txt')
            for name in fs.find(f'{place}/checkpoints/1'):
                if not name.endswith('/1/commit_success.txt'):
                    fs.rm_file(name)
            with Checkpoints(folder / 'checkpoints', 2, 'score') as checkpoints:
                assert checkpoints.latest() == 3 and checkpoints.meta(3)['step'] == 3
                assert not fs.find(f'{place}/checkpoints/4')
                save(checkpoints, 4)
                save(checkpoints, 5)
                assert (checkpoints.steps(), checkpoints.best()) == ([3, 4, 5], 3)
                state, _ = checkpoints.restore(5, {'a': jnp.zeros(8)})
            assert state['a'].tolist() == [5.0 * i for i in range(8)]


def test_what_killed_saves_have_left_is_gone_before_anyone_lists_the_folder(tmp_path, monkeypatch):
    left, seen, inner = tmp_path / '3.orbax-checkpoint-tmp-7', [], checkpoint.ocp.training.Checkpointer
    (left / 'state').mkdir(parents=True)
    spy = lambda *given, **named: seen.append(left.exists()) or inner(*given, **named)
    monkeypatch.setattr(checkpoint.ocp.training, 'Checkpointer', spy)

    async def in_a_notebook():  # whose thread has an event loop
        with Checkpoints(tmp_path, keep_last=1) as checkpoints:
            assert checkpoints.steps() == [] and seen == [False]

    asyncio.run(in_a_notebook())
