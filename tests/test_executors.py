"`data_stats(files, executor=...)`: processes, threads, a local dask cluster and executors that fail, against one process; the lesson is in nbs/howto/many_processes.ipynb."
import multiprocessing, os, random, sys, threading, warnings
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from fastai_normx.stats import ChannelStats, DataStatsWarning, data_stats

pytestmark = pytest.mark.filterwarnings('ignore:.*multi-threaded, use of fork')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "700 small images, no two alike in brightness"
    d, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for i in range(700): Image.fromarray(rng.integers(rng.integers(100), rng.integers(101, 256), (8, 8, 3), dtype=np.uint8)).save(d/f'{i:03}.png')
    return sorted(d.iterdir())


@pytest.fixture(scope='module')
def exact(files):
    "Mean and std of all pixels, in float64"
    x = np.stack([np.asarray(Image.open(f)) for f in files]).astype(np.float64)/255
    return x.mean((0, 1, 2)), x.std((0, 1, 2))


class Later(Executor):
    "Calls in this process, in threads that end in any order; what it was asked, and how much at once"
    def __init__(self, lose=lambda files, i: False):
        self.lose, self.asked, self.now, self.most, self.lock, self.threads = lose, [], 0, 0, threading.Lock(), []
    def submit(self, fn, files, *args):
        f = Future()
        with self.lock:
            self.asked.append([Path(o).name for o in files])
            i = len(self.asked)
            self.now += 1
            self.most = max(self.most, self.now)
        def work():
            threading.Event().wait(random.random()/50)
            try:
                res = fn(files, *args)
                if self.lose(files, i): raise ConnectionError('worker 3 has gone')
            except Exception as e: out, res = f.set_exception, e
            else: out = f.set_result
            with self.lock: self.now -= 1
            out(res)
        if f.set_running_or_notify_cancel():
            t = threading.Thread(target=work)
            self.threads.append(t)
            t.start()
        return f


def stats(files, executor=None, **kw):
    "`(ChannelStats, warnings)`"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        s = data_stats(files, executor=executor, progress=False, **kw)
    return s, [str(w.message) for w in ws if issubclass(w.category, DataStatsWarning)]


def forks(n): return ProcessPoolExecutor(n, mp_context=multiprocessing.get_context('fork'))


@pytest.mark.parametrize('make', [lambda: forks(1), lambda: forks(3), lambda: ThreadPoolExecutor(5), Later], ids='process processes threads later'.split())
@pytest.mark.parametrize('kw', [{}, dict(n_items=333), dict(tol=.03), dict(tol=.02, n_items=500, seed=3)], ids=str)
def test_the_same_bits(files, exact, make, kw):
    alone, _ = stats(files, **kw)
    with make() as ex: s, said = stats(files, ex, **kw)
    assert s == alone and len(s) == len(alone)
    if not kw:
        assert len(s) == 700
        np.testing.assert_allclose(s.mean, exact[0], rtol=1e-12)
        np.testing.assert_allclose(s.std, exact[1], rtol=1e-12)
    if kw == dict(tol=.03): assert 256 <= len(s) < 700 and s.margin().max() <= .03


def test_folder(files):
    with ThreadPoolExecutor(2) as ex: assert len(data_stats(files[0].parent, executor=ex, mode='L', progress=False)) == 700


def test_broken_files_are_named_as_without(files, tmp_path):
    bad = tmp_path/'bad.png'
    bad.write_bytes(b'nothing')
    some = files[:70]+[bad]+files[70:200]
    for kw in ({}, dict(n_items=150), dict(n_items=201)):
        alone, said = stats(some, **kw)
        with forks(2) as ex: s, same = stats(some, ex, **kw)
        assert s == alone and same == said
        assert len(s) == min(200, kw.get('n_items', 200))
    assert len(said) == 1 and 'bad.png' in said[0]
    with forks(1) as ex, pytest.raises(ValueError, match="none of the 1 image files; .*bad.png': cannot identify"): data_stats([bad], executor=ex, progress=False)


def test_memory_is_flat(files):
    "However many files, only so many parts are under way"
    ex = Later()
    ex._max_workers = 2
    assert len(data_stats(files*10, executor=ex, progress=False)) == 7000
    assert ex.most <= 4 and len(ex.asked) == 110 and max(map(len, ex.asked)) == 64


def test_no_more_is_read_than_tol_needs(files):
    ex = Later()
    ex._max_workers = 1
    s = data_stats(files*100, executor=ex, tol=.03, progress=False)
    assert len(ex.asked) <= -(-len(s)//64)+2


@pytest.mark.parametrize('i', [1, 4, 11])
def test_a_lost_worker_is_made_up_for(files, i):
    ex = Later(lambda files, k: k == i)
    s, said = stats(files, ex)
    alone = stats(files)[0]
    assert said == [] and len(s) == len(alone) and torch.allclose(s.std, alone.std, rtol=1e-13)
    asked = [o for part in ex.asked for o in part]
    twice = {o for o in asked if asked.count(o) == 2}
    assert twice == set(ex.asked[i-1]) and len(asked) == 700+len(twice)


def test_lost_twice(files):
    "What cannot be read by any worker is left out and named, and nothing else is"
    ex = Later(lambda fs, k: any(f.name == '300.png' for f in fs))
    s, (said,) = stats(files, ex)
    assert len(s) == 692 and '8 image files were left out' in said and '300.png' in said and 'worker 3 has gone' in said and '100.png' not in said
    left = {Path(n).name for n in said.replace(',', ' ').split() if n.endswith('.png')}
    assert len(left) == 8 and s == s+ChannelStats()
    exact = np.stack([np.asarray(Image.open(f)) for f in files if f.name not in left])/255
    np.testing.assert_allclose(s.mean, exact.mean((0, 1, 2)), rtol=1e-12)


def test_all_lost(files):
    ex = Later(lambda fs, k: True)
    with pytest.raises(ValueError, match=r'none of the first 64 image files: .*worker 3 has gone.*fastai_normx') as e: data_stats(files, executor=ex, progress=False)
    assert len(ex.asked) < 100 and isinstance(e.value.__cause__, ConnectionError)


class Deadly:
    "A path that ends the process that opens it, unless that is the one that made it; only the first time, if there is a file `once` to be made"
    def __init__(self, path, once=None): self.path, self.once, self.pid = path, once, os.getpid()
    @property
    def name(self): return Path(self.path).name
    def __fspath__(self):
        if os.getpid() != self.pid and not (self.once and Path(self.once).exists()):
            if self.once: Path(self.once).touch()
            os._exit(1)
        return str(self.path)


def test_a_process_that_dies_once(files, tmp_path):
    some = files[:400]+[Deadly(files[400], tmp_path/'once')]+files[401:]
    with forks(2) as ex: s, said = stats(some, ex)
    assert (tmp_path/'once').exists() and said == [] and len(s) == 700 and torch.allclose(s.std, stats(files)[0].std, rtol=1e-13)


def test_a_file_that_kills(files):
    some = files[:400]+[Deadly(files[400])]+files[401:]
    with forks(2) as ex:
        s, (said,) = stats(some, ex)
        with pytest.raises(BrokenExecutor): ex.submit(int)
    assert len(s) == 692 and '8 image files were left out' in said and '400.png' in said
    assert not multiprocessing.active_children()


def test_bad_use(files):
    with pytest.raises(ValueError, match='`executor` .* received 2'): data_stats(files, executor=2)
    with pytest.raises(ValueError, match='`executor` reads image files'), ThreadPoolExecutor(1) as ex: data_stats(torch.rand(4, 3, 2, 2), executor=ex)
    ex = ThreadPoolExecutor(1)
    ex.shutdown()
    with pytest.raises(RuntimeError, match='after shutdown'): data_stats(files, executor=ex, progress=False)


def test_executor_is_left_open(files):
    with forks(1) as ex:
        for _ in range(2): data_stats(files, executor=ex, tol=.05, progress=False)
        assert ex.submit(int, '3').result() == 3


@pytest.fixture(scope='module')
def cluster():
    "A client of two real workers, each a process"
    distributed = pytest.importorskip('distributed')
    import dask
    quiet = {'distributed.worker.daemon': False, 'distributed.admin.tick.limit': '1h', 'distributed.scheduler.allowed-failures': 0}
    with dask.config.set(quiet), distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as c, \
         distributed.Client(c) as client: yield client


def test_dask(files, cluster, tmp_path):
    alone = stats(files)[0]
    with cluster.get_executor() as ex:
        assert stats(files, ex)[0] == alone
        assert stats(files, ex, tol=.03)[0] == stats(files, tol=.03)[0]
        pids = {o for o in cluster.run(os.getpid).values()}
        assert len(pids) == 2 and os.getpid() not in pids
        cluster.register_plugin(plugin(files[500], tmp_path/'once'))
        s, said = stats(files, ex)
        assert (tmp_path/'once').exists() and said == [] and len(s) == 700 and torch.allclose(s.std, alone.std, rtol=1e-13)


def plugin(deadly, once):
    "For workers of dask: the file `deadly` ends the process that opens it, the first time"
    from distributed.diagnostics.plugin import WorkerPlugin
    class Kill(WorkerPlugin):
        def setup(self, worker):
            import os, fastai_normx.stats as st
            was = st._open
            def _open(f):
                if str(f) == str(deadly) and not once.exists():
                    once.touch()
                    os._exit(1)
                return was(f)
            st._open = _open
    import cloudpickle
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return Kill()
