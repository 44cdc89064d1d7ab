"""Two and three processes of `torch.distributed` (gloo, on the CPU) against one: this file is the test, and run as a script one of the processes.

Processes start once for all cases. The first one's store takes a port that the system gives it, so no two runs want the same.
"""
import json, os, subprocess, sys, time, traceback, warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader as TorchDL, DistributedSampler, TensorDataset

from fastai.callback.core import Callback
import fastai.callback.progress # noqa: F401 (`no_bar`)
from fastai.data.block import DataBlock, CategoryBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Learner
from fastai.vision.data import ImageBlock
from fastai_normx import ranks
from fastai_normx.match import StatsMatch, StatsMatchWarning, stats_match
from fastai_normx.stats import ChannelStats, data_stats

I, H = ((.485, .456, .406), (.229, .224, .225)), ((.5,)*3, (.5,)*3)
n_train, n_valid = 48, 12


def tiles(n=n_train+n_valid, size=32):
    from sklearn.datasets import load_sample_images
    rng, ims = np.random.default_rng(0), load_sample_images().images
    at = [(ims[i % 2], rng.integers(0, 427-size), rng.integers(0, 640-size)) for i in range(n)]
    return [im[y:y+size, x:x+size] for im, y, x in at]


def loaders(rank, n, constants=I, train=None, valid=None, bs=8):
    "`DataLoaders` of this process's share of the tiles"
    ims = tiles()
    tr, va = list(range(n_train))[rank::n][:train], list(range(n_train, n_train+n_valid))[rank::n][:valid]
    norm = [Normalize.from_stats(*constants, cuda=False)] if constants else []
    db = DataBlock((ImageBlock, CategoryBlock(vocab=[0, 1])), get_x=lambda i: ims[i], get_y=lambda i: i % 2,
                   splitter=lambda items: (list(range(len(tr))), list(range(len(tr), len(items)))), batch_tfms=norm)
    return db.dataloaders(tr+va, bs=bs, num_workers=0, device='cpu', drop_last=False)


class Wrap(Callback):
    "What fastai's `DistributedTrainer` does to a model"
    order = 11
    def before_fit(self): self.learn.model = nn.parallel.DistributedDataParallel(self.learn.model)
    def after_fit(self): self.learn.model = self.learn.model.module


def learner(dls, *cbs, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return Learner(dls, model, loss_func=nn.CrossEntropyLoss(), cbs=list(cbs))


@contextmanager
def heard(said):
    "Put the warnings of this package that come up into the list `said`"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        yield
    said += [str(w.message) for w in ws if issubclass(w.category, StatsMatchWarning)]


def fit(learn, n=1):
    "What `StatsMatch` says while `learn` fits, what it finds, and the statistics that it is about"
    said, error = [], None
    with learn.no_bar(), heard(said):
        learn.logger = lambda *a: None
        try: learn.fit(n, 1e-3)
        except RuntimeError as e: error = str(e)
    return told(learn, said) | dict(error=error)


def told(learn, said):
    cb = next((cb for cb in learn.cbs if isinstance(cb, StatsMatch)), None)
    r = cb and cb.report
    return dict(said=said, outcome=r and r.outcome, kind=r and r.kind, n=r and r.n_images, mean=r and r.observed.mean.tolist(),
                sets=r and sorted(r.views), fix=r and [f.code for f in r.findings])


def lock(learn): learn.add_cb(Wrap()); return learn


# What every process does in each case: `(rank, number of processes) -> plain data`

def right(rank, n): return fit(lock(learner(loaders(rank, n), StatsMatch(I))))
def wrong(rank, n): return fit(lock(learner(loaders(rank, n, H), StatsMatch(I))), 2)
def one_wrong(rank, n): return fit(lock(learner(loaders(rank, n, H if rank == 1 else I), StatsMatch(I))), 2)
def first_wrong(rank, n): return fit(lock(learner(loaders(rank, n, None if rank == 0 else I), StatsMatch(I))), 2)
def last_valid_wrong(rank, n):
    dls = loaders(rank, n)
    if rank == n-1: dls.loaders[1] = loaders(rank, n, H).valid
    return fit(lock(learner(dls, StatsMatch(I))), 2)


def uneven(rank, n): return fit(learner(loaders(rank, n, train=None if rank == 0 else 8, valid=4 if rank == 0 else None, bs=4), StatsMatch(I)))


class Blind(Callback):
    "Hands the model something that is no image"
    def before_batch(self): self.learn.xb = (self.xb[0].mean((2, 3)),)


def one_blind(rank, n):
    model = nn.Linear(3, 2) if rank == 1 else None
    return fit(learner(loaders(rank, n, H if rank == 0 else I), StatsMatch(I), *[Blind()]*(rank == 1), model=model))


class Boom(Callback):
    def before_batch(self):
        if self.training and self.iter == 1: raise RuntimeError('boom')


def one_raises(rank, n):
    ranks.patience = .5
    return fit(learner(loaders(rank, n, H), StatsMatch(I), *[Boom()]*(rank == 1)))


def no_callback(rank, n, without=1):
    ranks.patience = 3
    learn = learner(loaders(rank, n, H), *[StatsMatch(I)]*(rank != without))
    torch.distributed.barrier()
    return fit(learn)


def no_callback_first(rank, n):
    res = no_callback(rank, n, 0)
    torch.distributed.barrier()
    return res


def one_unknown(rank, n): return fit(lock(learner(loaders(rank, n), StatsMatch('no_such_backbone' if rank == 1 else I))))


def again(rank, n):
    "Two fits, the second with other constants on the last rank; what is left in the store"
    ranks.patience = 10
    learn = lock(learner(loaders(rank, n), StatsMatch(I)))
    first, store = fit(learn), torch.distributed.distributed_c10d._get_default_store()
    if rank == n-1: learn.dls = loaders(rank, n, H)
    second = fit(learn)
    torch.distributed.barrier()
    before = store.num_keys()
    learn.dls = loaders(rank, n)
    fits = [fit(learn) for _ in range(3)]
    torch.distributed.barrier()
    return dict(first=first, second=second, more=[f['said'] for f in fits], left=store.num_keys()-before)


def late(rank, n):
    "The last rank comes long after the first one has gone, and has seen what nobody else has"
    ranks.patience = .2
    learn = learner(loaders(rank, n, H if rank == n-1 else I), StatsMatch(I))
    class Late(Callback):
        def after_train(self):
            if rank == n-1: time.sleep(2)
        def before_batch(self):
            if rank == n-1 and self.iter == 0: time.sleep(1)
    learn.add_cb(Late())
    return fit(learn)


def asked(rank, n):
    "`stats_match` on all processes"
    said = []
    learn = learner(loaders(rank, n, H))
    with heard(said): kinds = [stats_match(learn, I).kind, learn.stats_match(I).kind, learn.dls.stats_match(I).kind]
    with heard(said): stats_match(learner(loaders(rank, n)), I)
    return dict(said=said, kinds=kinds)


def asked_alone(rank, n):
    said = []
    if rank == n-1:
        with heard(said): stats_match(learner(loaders(rank, n, H)), I)
    return dict(said=said)


def puts_right(rank, n):
    import contextlib, io
    with contextlib.redirect_stdout(io.StringIO()) as out: res = fit(lock(learner(loaders(rank, n, H), StatsMatch(I, fix=True))))
    return res | dict(out=out.getvalue())


def fastais_own(rank, n):
    "fastai's own trainer and loaders; `accelerate` is played where it is not installed"
    import types
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
    try: import accelerate
    except ImportError:
        class Accelerator:
            def __init__(self, **kwargs): pass
            def prepare(self, model): return nn.parallel.DistributedDataParallel(model)
            def backward(self, loss): loss.backward()
        sys.modules['accelerate'] = types.SimpleNamespace(Accelerator=Accelerator)
    try:
        from fastai import distributed as fd
        def broadcast(self, t, rank):
            t = torch.tensor(t)
            torch.distributed.broadcast(t, rank)
            return t.tolist()
        fd.DistributedDL._broadcast = broadcast # fastai's goes through CUDA
        torch.manual_seed(rank)
        learn = learner(loaders(0, 1, H), StatsMatch(I))
        learn.add_cb(fd.DistributedTrainer(sync_bn=False))
        res = fit(learn, 2)
        mended = learner(loaders(0, 1, H), StatsMatch(I, fix=True))
        mended.add_cb(fd.DistributedTrainer(sync_bn=False))
        again = fit(mended)
        whole = data_stats(fd.DistributedDL(loaders(0, 1).train, rank, n), progress=False)
        return res | dict(mended=again, now=mended.dls.train.after_batch.fs[-1].mean.flatten().tolist(), whole=whole.to_dict())
    finally: [os.environ.pop(k) for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')]


def shares(rank, n):
    "`data_stats` of a `DistributedSampler`'s share, merged; 50 images do not divide by 3"
    ds = TensorDataset(torch.arange(50*3*16).view(50, 3, 4, 4)/2400)
    def share(**kw): return data_stats(TorchDL(ds, 4, sampler=DistributedSampler(ds, n, rank, **kw)), progress=False)
    return dict(all=share().all_reduce().to_dict(), ordered=share(shuffle=False).all_reduce().to_dict(),
                dropped=len(share(drop_last=True).all_reduce()))


def sharded(rank, n):
    "FSDP: weights that no process holds as a whole"
    import contextlib, io
    from torch.distributed.fsdp import fully_shard
    class Shard(Callback):
        order = 11
        def before_fit(self): fully_shard(self.learn.model)
    said = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    learn = learner(loaders(rank, n, H if rank == 1 else I), StatsMatch(I), Shard(), model=model)
    with contextlib.redirect_stdout(io.StringIO()) as out: res = fit(learn)
    with heard(said), contextlib.redirect_stdout(io.StringIO()): kind = learn.stats_match(I).kind
    return res | dict(out=out.getvalue(), asked=kind)


def dtensors(rank, n):
    "Inputs that are spread over the processes, by images and by channels"
    import contextlib, io
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
    mesh = init_device_mesh('cpu', (n,))
    class Spread(Callback):
        def __init__(self, how): self.how = how
        def before_batch(self):
            x = torch.Tensor(self.xb[0])
            self.local, self.learn.xb = x, (DTensor.from_local(x, mesh, [self.how]),)
        def after_pred(self): self.learn.pred = self.learn.pred
    class Local(nn.Sequential):
        def forward(self, x): return super().forward(x.to_local()[:, :1])
    res = {}
    for how in (Shard(0), Shard(1)):
        net = Local(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        with contextlib.redirect_stdout(io.StringIO()) as out: r = fit(learner(loaders(rank, n, H), StatsMatch(I), Spread(how), model=net))
        res[f'{type(how).__name__}{how.dim}'] = r | dict(out=out.getvalue())
    return res


two = [right, wrong, one_wrong, first_wrong, last_valid_wrong, uneven, one_blind, one_raises, no_callback, no_callback_first, one_unknown,
       again, late, asked, asked_alone, puts_right, fastais_own, shares, sharded, dtensors]
three = [right, one_wrong, last_valid_wrong, no_callback_first, late, asked, shares]


def main(rank, n, folder):
    "One process: all cases in turn"
    torch.set_num_threads(1)
    rank, n, folder = int(rank), int(n), Path(folder)
    def store(port, first): return torch.distributed.TCPStore('127.0.0.1', port, n, first, timedelta(seconds=60), wait_for_workers=False)
    if rank == 0:
        s = store(0, True)
        (folder/'tmp').write_text(str(s.port))
        (folder/'tmp').rename(folder/'port')
    else:
        while not (folder/'port').exists(): time.sleep(.05)
        s = store(int((folder/'port').read_text()), False)
    torch.distributed.init_process_group('gloo', store=s, rank=rank, world_size=n, timeout=timedelta(seconds=60))
    res = {}
    for f in {2: two, 3: three}[n]:
        torch.distributed.barrier()
        ranks.patience = 10
        try: res[f.__name__] = f(rank, n)
        except Exception: res[f.__name__] = traceback.format_exc()
        (folder/f'{rank}.json').write_text(json.dumps(res))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(n, folder):
    "`{case: [what each process says]}`"
    ps = [subprocess.Popen([sys.executable, __file__, str(r), str(n), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
          for r in range(n)]
    until = time.monotonic()+240
    try: outs = [p.communicate(timeout=max(1, until-time.monotonic()))[0] for p in ps]
    except subprocess.TimeoutExpired:
        for p in ps: p.kill()
        outs = [p.communicate()[0] for p in ps]
    done = [json.loads(f.read_text()) if (f := folder/f'{r}.json').exists() else {} for r in range(n)]
    bad = '\n'.join(o[-3000:] for p, o in zip(ps, outs) if p.returncode)
    return {f.__name__: [d.get(f.__name__, f'did not end: {bad}') for d in done] for f in {2: two, 3: three}[n]}


@pytest.fixture(scope='module')
def of_two(tmp_path_factory): return run(2, tmp_path_factory.mktemp('two'))
@pytest.fixture(scope='module')
def of_three(tmp_path_factory): return run(3, tmp_path_factory.mktemp('three'))
@pytest.fixture(params=[2, 3])
def job(request): return request.getfixturevalue({2: 'of_two', 3: 'of_three'}[request.param])


def said(processes):
    "All warnings of a job, as `(rank, text)`"
    assert not any(isinstance(p, str) for p in processes), processes
    return [(r, w) for r, p in enumerate(processes) for w in p['said']]


def test_right_data(job):
    first, *others = job['right']
    assert said(job['right']) == []
    one = fit(learner(loaders(0, 1), StatsMatch(I)))
    assert first['outcome'] == one['outcome'] == 'ok' and first['n'] == one['n'] == n_train+n_valid and first['sets'] == one['sets']
    assert first['mean'] == pytest.approx(one['mean'], rel=1e-9)
    assert all(p['outcome'] is None for p in others)


def test_wrong_data_everywhere(of_two):
    one = fit(learner(loaders(0, 1, H), StatsMatch(I)), 2)
    (rank, text), = said(of_two['wrong'])
    assert rank == 0 and of_two['wrong'][0]['kind'] == one['kind'] == 'wrong_stats' and of_two['wrong'][0]['fix'] == one['fix']
    assert [text] == one['said']


def test_wrong_data_on_one_rank(job):
    (rank, text), = said(job['one_wrong'])
    assert rank == 0 and job['one_wrong'][0]['kind'] == 'split_mismatch'
    assert 'training set of rank 1 with 0.5/0.5' in text and 'learn.dls.normalize_for' in text


def test_wrong_data_on_the_first_rank(of_two):
    (rank, text), = said(of_two['first_wrong'])
    assert rank == 0 and 'training set of rank 0 not at all' in text


def test_wrong_validation_data_on_the_last_rank(job):
    (rank, text), = said(job['last_valid_wrong'])
    n = len(job['last_valid_wrong'])
    assert rank == 0 and f'validation set of rank {n-1} with 0.5/0.5' in text
    assert job['last_valid_wrong'][0]['sets'][0] == 'training set'


def test_different_numbers_of_batches(of_two):
    assert said(of_two['uneven']) == [] and of_two['uneven'][0]['outcome'] == 'ok'
    assert of_two['uneven'][0]['n'] == 24+8+4+6


def test_one_rank_without_images(of_two):
    texts = [w for r, w in said(of_two['one_blind']) if r == 0]
    assert len(said(of_two['one_blind'])) == len(texts) == 2
    assert any('0.5/0.5' in t for t in texts) and any(t.startswith('Rank 1: ') and 'no batch of images' in t for t in texts)


def test_one_rank_raises(of_two):
    (rank, text), = said(of_two['one_raises'])
    assert rank == 0 and '0.5/0.5' in text and 'boom' in of_two['one_raises'][1]['error'] and of_two['one_raises'][0]['error'] is None


def test_one_rank_without_the_callback(of_two):
    (rank, text), = said(of_two['no_callback'])
    assert rank == 0 and '0.5/0.5' in text


def test_first_rank_without_the_callback(job):
    texts = said(job['no_callback_first'])
    assert len(texts) == 1 and texts[0][0] != 0 and '0.5/0.5' in texts[0][1]


def test_one_rank_that_cannot_check(of_two):
    (rank, text), = said(of_two['one_unknown'])
    assert rank == 0 and text.startswith('Rank 1: StatsMatch could not check') and 'no_such_backbone' in text


def test_fits_do_not_mix_and_nothing_is_left(of_two):
    first, *_ = of_two['again']
    assert first['first']['said'] == [] and len(first['second']['said']) == 1 and 'rank 1' in first['second']['said'][0]
    assert of_two['again'][1]['first']['said'] == of_two['again'][1]['second']['said'] == []
    assert [f['left'] for f in of_two['again']] == [0, 0]


def test_a_rank_that_comes_late_speaks_for_itself(job):
    (rank, text), = said(job['late'])
    assert rank == len(job['late'])-1 and '0.5/0.5' in text


def test_asked_on_all_ranks(job):
    assert all(p['kinds'] == ['wrong_stats']*3 for p in job['asked'])
    assert len(said(job['asked'])) == 3


def test_asked_on_one_rank(of_two): assert len(said(of_two['asked_alone'])) == 1


def test_put_right(of_two):
    assert said(of_two['puts_right']) == [] and of_two['puts_right'][0]['outcome'] == 'ok'
    assert [p['out'].count('StatsMatch put') for p in of_two['puts_right']] == [1, 0]


def test_fastais_trainer(of_two):
    (rank, text), = said(of_two['fastais_own'])
    first = of_two['fastais_own'][0]
    assert rank == 0 and 'wrong_stats' == first['kind'] and 'Fix: `learn.dls.normalize_for' in text
    assert [p['mended']['said'] for p in of_two['fastais_own']] == [[], []] and first['mended']['outcome'] == 'ok'
    for p in of_two['fastais_own']:
        assert p['now'] == pytest.approx(I[0])
        assert ChannelStats.from_dict(p['whole']) == data_stats(loaders(0, 1).train, progress=False)


def test_shares_of_a_sampler(job):
    x = torch.arange(50*3*16).view(50, 3, 4, 4)/2400
    whole, n = ChannelStats.of(x), len(job['shares'])
    for p in job['shares']:
        for k in ('all', 'ordered'):
            s = ChannelStats.from_dict(p[k])
            assert len(s) == 50 and torch.allclose(s.mean, whole.mean) and torch.allclose(s.sem, whole.sem)
        assert p['dropped'] == 50//n*n


def test_sharded_weights(of_two):
    (rank, text), = said(of_two['sharded'])
    assert rank == 0 and 'rank 1' in text
    first, second = of_two['sharded']
    assert first['out'].count('DTensor') == 1 and second['out'] == '' and first['asked'] is None and second['asked'] == 'wrong_stats'


def test_inputs_spread_over_processes(of_two):
    first, second = of_two['dtensors']
    assert len(first['Shard0']['said']) == 1 and '0.5/0.5' in first['Shard0']['said'][0] and second['Shard0']['said'] == []
    assert first['Shard1']['said'] == [] and first['Shard1']['out'].count('channels') == 1 and second['Shard1']['out'] == ''


if __name__ == '__main__': main(*sys.argv[1:])
