"ActivationLogger where a reader would be bored: every way in which monitors break, exits, exactness, bias, memory, sinks."
import contextlib, copy, dataclasses, gc, math, threading, warnings, weakref

from collections import Counter
from functools import reduce

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

warnings.filterwarnings('ignore', category=FutureWarning)
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException, CancelValidException, DataLoaders,
                           Learner)
from fastai.callback.schedule import *
from fastai.torch_core import set_seed
from fastai.data.load import DataLoader
from fastai_normx import activations as A, record as S, recorder as R
from fastai_normx.activations import ActivationLogger, ActivationLoggerWarning, ActivationRecorder, ActivationWarning

pytestmark = pytest.mark.filterwarnings('error::fastai_normx.activations.ActivationLoggerWarning', 'error::fastai_normx.activations.ActivationWarning')
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
stats = ('mean', 'std', 'min', 'max', 'near_zero', 'nonfinite')


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))


def get_learner(model=None, *, cbs=None, n=48, bs=8, size=16, loss=None, x=None, **kw):
    torch.manual_seed(0)
    x = torch.randn(n, 3, size, size) if x is None else x
    y = torch.arange(n) % 2
    ds = list(zip(x, y))
    dls = DataLoaders(DataLoader(ds, bs=bs, shuffle=True), DataLoader(ds[:2*bs], bs=bs))
    learn = Learner(dls, small() if model is None else model, loss_func=loss or nn.CrossEntropyLoss(), cbs=cbs, **kw)
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == 'ProgressCallback'])
    learn.logger = lambda *a: None
    return learn


def n_hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def is_clean(learn):
    al = learn.activation_logger
    assert n_hooks(learn.model) == 0 and '_compiled_call_impl' not in vars(learn.model)
    assert '_with_events' not in vars(learn)
    with contextlib.suppress(ValueError): al.to_df()    # after an exception memory is free when the logger is next asked
    assert not al._rec or not (al._rec._bufs or al._rec._plans)
    return True


def numpy_stats(x):
    x = x.astype(np.float64).ravel()
    ok = x[np.isfinite(x)]
    return dict(mean=ok.mean(), std=ok.std(), min=ok.min(), max=ok.max(), near_zero=(np.abs(ok) <= .05).sum()/len(x), nonfinite=1 - len(ok)/len(x))


def row(rec, i=0): return {k: float(rec.column(k)[i]) for k in (*stats, 'dead', 'bn_dist')}


def counts(rec, i=0): return rec['hist']['counts'][i]


class Out(nn.Module):
    "A module with a parameter that returns whatever `f` makes of its input"
    def __init__(self, f): super().__init__(); self.w, self.f = nn.Parameter(torch.ones(1)), f
    def forward(self, x): return self.f(x*self.w)


def record(model, x, **kw):
    rec = ActivationRecorder(model, **kw)
    with rec: model(x)
    assert not rec.problems, rec.problems
    return rec


# ---- the breakages of other monitors, one test each

@dataclasses.dataclass
class Pair: a: torch.Tensor; b: torch.Tensor


@pytest.mark.parametrize('f', [lambda x: {'out': x, 'aux': [x*2]}, lambda x: [x, (x*2,)], lambda x: Pair(x, x*2), lambda x: (x, {'b': x*2}, None, 3, 'text', torch.arange(3))],
                         ids=['dict', 'list', 'dataclass', 'tuple'])
def test_fastai_dict_and_list_outputs(f):
    x = torch.randn(4, 5)
    rec = record(Out(f), x, sample=None)
    want = numpy_stats(np.concatenate([x.numpy(), 2*x.numpy()]))
    assert {k: row(rec.record)[k] for k in stats} == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_fastai_dict_output_in_training():
    learn = get_learner(nn.Sequential(Out(lambda x: {'x': x}), DictHead()), cbs=ActivationLogger())
    learn.fit(1)
    assert len(learn.activation_logger.stats) == 6 and is_clean(learn)


class DictHead(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(3*16*16, 2)
    def forward(self, d): return self.l(d['x'].flatten(1))


class Odd(nn.Module):
    "An LSTM, a module that never runs, one that runs twice"
    def __init__(self):
        super().__init__()
        self.rnn, self.unused, self.shared, self.head = nn.LSTM(16, 12, batch_first=True), nn.Linear(3, 3), nn.Linear(12, 12), nn.Linear(12, 2)
    def forward(self, x): return self.head(self.shared(self.shared(self.rnn(x[:, 0])[0])).mean(1))


def test_fastai_layer_stats_on_lstm_unused_and_shared():
    learn = get_learner(Odd(), cbs=ActivationLogger())
    learn.fit(2)
    al = learn.activation_logger
    for i in range(4): assert [len(o) for o in al.layer_stats(i)] == [12]*3
    for n in ('rnn', 'shared', 'head'): assert np.isfinite(al.layer_stats(n)[0]).all()
    assert np.isnan(al.layer_stats('unused')[0]).all() and 'unused' not in set(al.to_df().layer)
    assert 'Never called by the model: unused' in str(al.summary())
    assert al.to_df().query('layer=="shared" and split=="train"')['count'].iloc[0] == 2*8*16*12


def test_shared_module_counts_both_calls():
    l = nn.Linear(6, 6)
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.l = l
        def forward(self, x): return self.l(self.l(x))
    x = torch.randn(7, 6)
    rec = record(Twice(), x, sample=None)
    with torch.no_grad(): want = numpy_stats(torch.cat([l(x), l(l(x))]).numpy())
    assert {k: row(rec.record)[k] for k in stats} == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_fastai_nan_is_not_healthy():
    def f(x): x = x.clone(); x[0, 0] = math.nan; x[0, 1] = math.inf; return x
    r = row(record(Out(f), torch.ones(4, 5), sample=None).record)
    assert r['nonfinite'] == pytest.approx(.1) and r['mean'] == 1 and r['near_zero'] == 0


def test_fastai_negative_is_not_near_zero():
    assert row(record(Out(lambda x: x), -torch.ones(4, 5)).record)['near_zero'] == 0


def test_fastai_copies_little_to_the_host(monkeypatch):
    copies, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda t, *a, **k: copies.append(t.numel()) or real(t, *a, **k))
    m = small()
    rec = ActivationRecorder(m)
    with rec: m(torch.randn(8, 3, 32, 32))
    assert len(copies) == 1 and copies[0] < 1000


def test_no_item_per_layer(monkeypatch):
    m = small()
    rec = ActivationRecorder(m)
    def item(t): raise AssertionError('.item() was called')
    monkeypatch.setattr(torch.Tensor, 'item', item)
    rec.start(); m(torch.randn(8, 3, 32, 32)); rec.stop(); rec.collect()
    assert not rec.problems


def test_miniai_ram_and_index_only():
    al = ActivationLogger(keep=8)
    learn = get_learner(cbs=al)
    learn.fit(10)
    assert len(al._hist['train']) <= 8 and sum(m['batches'] for m in al._hist['train'].meta) == 60
    assert al.layer_stats('3') == al.layer_stats(2)


def test_composer_one_row_per_layer_not_per_sample():
    learn = get_learner(cbs=ActivationLogger(valid=False))
    learn.fit(1)
    df = learn.activation_logger.to_df()
    assert len(df) == 6*5 and not df.duplicated(['step', 'layer']).any()


@pytest.mark.parametrize('shape', [(7,), (7, 5), (2, 7, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4), (1, 2, 3, 2, 2, 2), ()])
def test_timm_outputs_of_any_number_of_axes(shape):
    x = torch.randn(shape)
    rec = record(Out(lambda x: x), x, sample=None)
    assert {k: row(rec.record)[k] for k in stats} == pytest.approx(numpy_stats(x.numpy()), rel=1e-5, abs=1e-6)


def test_timm_hooks_can_be_removed():
    m = small()
    rec = ActivationRecorder(m).start()
    assert n_hooks(m) == 5
    rec.stop()
    assert n_hooks(m) == 0


def test_vissl_nested_tuples_end():
    loop = []
    loop.append(loop)
    d = {}
    d['d'] = d
    deep = x = torch.randn(3)
    for _ in range(50): deep = (deep,)
    assert [id(t) for t in R._tensors((loop, d, x, deep, x))[0]] == [id(x)]


def test_torchexplorer_first_batch_nan_and_infinite_shares():
    x = torch.full((10, 10), math.nan)
    r = record(Out(lambda x: x), x)
    assert row(r.record)['nonfinite'] == 1 and math.isnan(row(r.record)['mean']) and counts(r.record).sum() == 0
    x = torch.randn(10, 10); x.view(-1)[:30] = math.inf
    r = record(Out(lambda x: x), x)
    assert row(r.record)['nonfinite'] == pytest.approx(.3) and counts(r.record).sum() == 70
    al = ActivationLogger(alerts=False)
    learn = get_learner(nn.Sequential(Out(lambda x: x*math.nan), nn.Flatten(), nn.Linear(768, 2)), cbs=al)
    learn.fit(1)
    al.plot(); al.plot('nonfinite'); al.plot_layer_stats(0); al.summary()


def test_neptune_keeps_no_activation_alive():
    refs = []
    m = nn.Sequential(Out(lambda x: refs.append(weakref.ref(y := x+1)) or y), Out(lambda x: x))
    rec = ActivationRecorder(m)
    with torch.no_grad(), rec: m(torch.randn(8, 3, 64, 64))
    gc.collect()
    assert refs and all(r() is None for r in refs)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('sample', [None, 4096])
def test_neptune_half_precisions(dtype, sample):
    x = (torch.randn(8, 16, 8, 8)*300).to(dtype)  # the sum and the squares are beyond float16
    rec = record(Out(lambda x: x).to(dtype), x, sample=sample)
    got, want = row(rec.record), numpy_stats(x.double().numpy())
    if sample is None: assert {k: got[k] for k in stats} == pytest.approx(want, rel=1e-5, abs=1e-4)
    else: assert abs(got['mean']-want['mean']) < 5*want['std']/64 and got['std'] == pytest.approx(want['std'], rel=.1)


def test_wandb_watch_sees_activations_and_keeps_nonfinite():
    al = ActivationLogger()
    learn = get_learner(nn.Sequential(Out(lambda x: torch.where(x > 1, math.inf, x)), Out(lambda x: x.nan_to_num(posinf=1)), nn.Flatten(), nn.Linear(768, 2)), cbs=al)
    for i in (0, 1): learn.model[i].w.requires_grad_(False)
    with pytest.warns(ActivationWarning, match='NaN or infinite'): learn.fit(1)
    assert (al.to_df().query('layer=="0"').nonfinite > .1).all()


def test_torchinstruments_never_rewrites_parquet(tmp_path):
    learn = get_learner(cbs=ActivationLogger(to=tmp_path/'a.parquet'))
    learn.fit(1)
    one = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'a.parquet').iterdir()}
    learn.fit(1)
    two = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'a.parquet').iterdir()}
    assert one.items() < two.items()


def test_torchinstruments_channels_and_batchnorm():
    torch.manual_seed(0)
    m = small().eval()
    m[1].running_mean += .5
    m[0].weight.data[2:] = 0  # six channels of eight that never vary
    rec = record(m, torch.randn(16, 3, 32, 32), sample=None)
    assert row(rec.record, 0)['dead'] == .75 and row(rec.record, 1)['bn_dist'] > 0


# ---- exactness

def test_default_layers_and_selection():
    m = small()
    names = lambda layers: list(R._select(m, layers))
    assert names(None) == ['0', '1', '3', '4', '8'] == names(list('01348'))
    assert names(nn.Conv2d) == ['0', '3'] and names((nn.Conv2d, 'x*', nn.ReLU)[::2]) == ['0', '2', '3', '5']
    assert names(m[2]) == ['2'] and names([m[8], '0']) == ['0', '8'] and names(lambda n, l: n.isdigit() and int(n) > 6) == ['7', '8']
    assert names('[0-2]') == ['0', '1', '2'] and len(names('*')) == 10
    assert list(R._select(nn.Linear(2, 2), None)) == ['Linear']
    with pytest.raises(ValueError, match=r"no module of this Sequential matches 'conv\*'.*called 0, 1, 2"): names('conv*')
    with pytest.raises(ValueError, match='no module of this Sequential matches'): names(nn.LSTM)
    with pytest.raises(TypeError, match='received 3'): names(3)
    with pytest.raises(ValueError, match='no module with parameters'): R._select(nn.Sequential(nn.ReLU()), None)


def test_attention_is_one_layer():
    m = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    rec = ActivationRecorder(m)
    assert 'self_attn' in rec.names and not any('out_proj' in n for n in rec.names)
    with rec: m(torch.randn(2, 5, 16))
    assert rec.calls[:len(rec.names)].all()


@pytest.mark.parametrize('kw', [dict(every=0), dict(every=1.5), dict(keep=1), dict(sample=10), dict(to='x.txt'), dict(to=3)])
def test_arguments_are_checked(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` .*received'): ActivationLogger(**kw)


arrays = st.tuples(st.integers(0, 2**31-1), st.sampled_from([(3, 4), (2, 3, 5), (4, 3, 6, 5), (700, 33), (4, 16, 20, 20), (2, 5, 3, 4, 4)]),
                   st.sampled_from([1e-6, .05, 1, 1e4]), st.sampled_from([0, 3, -1000]), st.sampled_from(['plain', 'last', 'T', 'step', 'expand']))


@settings(max_examples=60, deadline=None)
@given(arrays, st.sampled_from([0, .01, .4]))
def test_exact_equals_float64_numpy(a, bad):
    seed, shape, scale, shift, layout = a
    g = np.random.default_rng(seed)
    x = torch.tensor(g.standard_normal(shape)*scale+shift, dtype=torch.float64)
    x[torch.tensor(g.random(shape) < bad)] = math.nan
    if x.isfinite().sum() < 2: return
    if layout == 'last' and x.ndim == 4: x = x.contiguous(memory_format=torch.channels_last)
    elif layout == 'T': x = x.transpose(0, -1)
    elif layout == 'step': x = x[..., ::2]
    elif layout == 'expand': x = x[:1].expand(3, *x.shape[1:])
    if x.isfinite().sum() < 2: return
    rec = ActivationRecorder(m := Out(lambda x: x), sample=None)
    m.f = lambda _: x
    with rec: m(torch.ones(1))
    assert not rec.problems, rec.problems
    got, want = row(rec.record), numpy_stats(x.numpy())
    for k in stats: assert got[k] == pytest.approx(want[k], rel=1e-9, abs=1e-9*(abs(shift)+scale)), k
    ok = x.numpy()[np.isfinite(x.numpy())]
    edges, H = S._edges(rec.record['hist'][0]), counts(rec.record)
    if x.numel() > 4096:  # histograms are of a sample
        assert abs(H.sum()/4096 - len(ok)/x.numel()) < .05 and 20 <= np.ptp(np.flatnonzero(H)) + 45
        return
    assert H.sum() == len(ok)
    far = np.abs(ok-ok.mean()) > 8*ok.std()
    assert np.array_equal(np.histogram(ok[~far], edges)[0][1:-1], H[1:-1]) and 20 <= np.ptp(np.flatnonzero(H)) + 45


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31-1), st.lists(st.tuples(st.sampled_from([1e-3, 1, 50]), st.sampled_from([-7, 0, 2]), st.integers(1, 300)), min_size=2, max_size=6), st.booleans())
def test_merging_equals_all_at_once(seed, parts, nan):
    g = np.random.default_rng(seed)
    xs = [g.standard_normal(n)*s+m for s, m, n in parts]
    if nan: xs[0][0] = math.nan
    recs = []
    for x in xs:
        rec = ActivationRecorder(m := Out(lambda x: x), sample=None)
        m.f = lambda _, x=x: torch.tensor(x)
        with rec: m(torch.ones(1))
        recs.append(rec.record)
    both = S.Record.together(recs)
    pairs = reduce(lambda a, b: S.Record.together([a, b]), recs)
    all_ = np.concatenate(xs)
    if not np.isfinite(all_).any(): return
    want = numpy_stats(all_)
    for got in (row(both), row(pairs)):
        for k in stats: assert got[k] == pytest.approx(want[k], rel=1e-8, abs=1e-8), k
    assert both['hist'] == pairs['hist'] and counts(both).sum() == np.isfinite(all_).sum()
    # the histogram is the histogram of all values on the wider bins
    edges = S._edges(both['hist'][0])
    cum, true = np.cumsum(counts(both)), [(all_ < e).sum() for e in edges[1:]]
    assert np.abs(cum-true)[np.abs(edges[1:]-all_[np.isfinite(all_)].mean()) < 4*np.nanstd(all_)].max(initial=0) <= max(2, .03*len(all_))


def test_histogram_merge_moves_nothing_between_bins():
    hs = np.zeros(2, S._hist.dtype)
    hs['exp'], hs['first'] = [0, 2], [-10, -3]  # widths 1 and 4
    hs['counts'][0, [0, 5, 63]], hs['counts'][1, [1, 60]] = [1, 2, 3], [4, 5]
    h, = S._hist.together(hs, [0])
    w = 2.**h['exp']
    got = {(lo, lo+w): n for lo, n in zip(S._edges(h), h['counts']) if n}
    want = {}
    for lo, n in [(-10, 1), (-5, 2), (53, 3), (-8, 4), (228, 5)]:
        k = math.floor(lo/w)*w
        want[(k, k+w)] = want.get((k, k+w), 0)+n
    assert got == want and w in (4, 8)


# ---- sampling

def patterns():
    g = torch.Generator().manual_seed(1)
    n, c, h, w = 8, 32, 32, 32
    i = torch.arange
    yield 'column', (i(w) % 2).float().expand(n, c, h, w)
    yield 'row', (i(h) % 4 == 0).float()[:, None].expand(n, c, h, w)
    yield 'channel', (i(c)**2).float()[:, None, None].expand(n, c, h, w)
    yield 'sample', (i(n) == 3).float()[:, None, None, None].expand(n, c, h, w)
    yield 'pixel', ((i(h)[:, None]*w+i(w)) % 16 == 0).float().expand(n, c, h, w)
    yield 'corner', ((i(h)[:, None] < 8) & (i(w) < 8)).float().expand(n, c, h, w)
    yield 'diagonal', ((i(h)[:, None]+i(w)+i(c)[:, None, None]) % 32 == 0).float().expand(n, c, h, w)
    yield 'noise', torch.rand(n, c, h, w, generator=g)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'expanded', 'transposed'])
@pytest.mark.parametrize('name,x', list(patterns()), ids=[n for n, _ in patterns()])
def test_sampling_is_unbiased_within_the_stated_bound(name, x, layout):
    x = dict(contiguous=lambda: x.contiguous(), channels_last=lambda: x.contiguous(memory_format=torch.channels_last), expanded=lambda: x,
             transposed=lambda: x.contiguous().transpose(2, 3))[layout]()
    mean, std = x.double().mean().item(), x.double().std(correction=0).item()
    rec = ActivationRecorder(m := Out(lambda _: x), hist=False)
    err = []
    for _ in range(40):
        with rec: m(torch.ones(1))
        rec._plans = {}  # new places
        err.append((row(rec.record)['mean']-mean)/(std/64))
    err = np.array(err)
    assert np.abs(err).max() < 5 and np.sqrt((err**2).mean()) < 1.35  # one standard error at most
    assert abs(err.mean()) < 4/np.sqrt(40)


@pytest.mark.parametrize('shape,stride,axis', [((8, 32, 32, 32), None, 1), ((8, 32, 32, 32), 'last', 1), ((64, 100), None, 1), ((5, 77, 30), None, 2), ((3, 5000), None, 1), ((9001,), None, None)])
def test_every_element_is_as_likely(shape, stride, axis):
    x = torch.arange(math.prod(shape)).view(shape)
    if stride: x = x.contiguous(memory_format=torch.channels_last)
    g = torch.Generator().manual_seed(0)
    flat, n, reps = x.as_strided((x.numel(),), (1,)), x.numel(), 400
    count = torch.zeros(n)
    for _ in range(reps):
        idx, C, K = R._places(x.shape, x.stride(), axis, 1024, g)
        assert len(idx) == 1024
        count.index_add_(0, flat[idx], torch.ones(1024))
        if C: assert (torch.bincount(torch.unravel_index(flat[idx[:C*K]], shape)[axis]) == K).all()
    p = 1024/n
    z = (count-reps*p)/math.sqrt(reps*p)
    assert z.abs().max() < 7 and z.square().mean() < 1.3
    parts = torch.stack([o.sum() for o in count.chunk(16)])  # no region is preferred
    assert (parts/parts.mean()-1).abs().max() < .05


def test_places_change():
    x = torch.randn(8, 16, 32, 32)
    rec = ActivationRecorder(m := Out(lambda _: x), hist=False)
    seen = set()
    for _ in range(24):
        with rec: m(torch.ones(1))
        seen.add(row(rec.record)['mean'])
    assert len(seen) >= 3


def test_global_random_state_is_left_alone():
    m, x = small(), torch.randn(8, 3, 64, 64)
    torch.manual_seed(3); np.random.seed(3)
    with ActivationRecorder(m): m(x)
    a, b = torch.rand(1), np.random.rand()
    torch.manual_seed(3); np.random.seed(3)
    assert torch.rand(1) == a and np.random.rand() == b


def recorded(m, *xs, **kw):
    "The recorder after each of `xs` went through `m` in a record of its own"
    rec = ActivationRecorder(m, **kw)
    for x in xs:
        with rec, torch.no_grad(): m(x)
    return rec


def test_samples_larger_than_the_kept_memory():
    m, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)), torch.randn(16, 1, 128, 128)
    rec = recorded(m, x, sample=300_000)   # the first and the last layer are of one shape, the second between them
    want = [numpy_stats(o.detach().numpy()) for o in (m[0](x), m[1](m[0](x)), m(x))]
    for i, w in enumerate(want): assert {k: row(rec.record, i)[k] for k in ('mean', 'std')} == pytest.approx({k: w[k] for k in ('mean', 'std')}, abs=.01)


@pytest.mark.parametrize('grads', [False, True])
def test_computes_before_the_step_frees_its_memory(monkeypatch, grads):
    seen, real = [], ActivationRecorder.collect
    monkeypatch.setattr(ActivationRecorder, 'collect', lambda self: seen.append('collect') or real(self))
    class Log(Callback):
        def before_backward(self): seen.append('backward')
    learn = get_learner(cbs=[ActivationLogger(grads=grads), Log()])
    learn.fit(1)
    assert seen[:2] == (['backward', 'collect'] if grads else ['collect', 'backward'])
    assert seen.count('collect') == len(learn.dls.train)+len(learn.dls.valid)


streamed = [o for o in S._states_of(S._choose()) if o.streams]


@pytest.mark.parametrize('shape', [(64, 50257), (64, 8, 8193), (16, 512, 7, 7), (16, 40, 32, 32)])
def test_exact_keeps_few_parts(shape):
    x = torch.randn(shape)
    for axis in (1, len(shape)-1):
        found = R._exact(x, axis, streamed)
        assert found.numel() < x.numel()/2
        by_channel = found.transpose(1, 2).flatten(1)
        n = by_channel.shape[1]
        got = S.Parts(S._by_name(streamed, by_channel.numpy()), range(0, n, n//x.shape[axis])).merged()
        y = x.double().movedim(axis, 0).flatten(1).numpy()
        assert np.allclose(got['mean'], y.mean(1), atol=1e-6) and np.allclose(got['var'], y.var(1), rtol=1e-5)


@pytest.mark.parametrize('bn', [False, True])
@pytest.mark.parametrize('case', ['centred', 'offset', 'far', 'channels', 'one far block', 'near .05', 'zeros'])
def test_exact_is_exact_with_and_without_a_mean(case, bn):
    edge = torch.tensor(S._near)
    for shape, axis in [((16, 40, 32, 32), 1), ((6553, 40), 1), ((16, 12, 5, 7), 1), ((300_000,), None), ((8, 197, 192), 2)]:
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(shape, dtype=dtype)
            if case=='offset': x = x*3-4
            if case=='far': x = x+300
            if case=='channels' and axis: x = x*.01+torch.randn(shape[axis]).view([-1]+[1]*(len(shape)-axis-1))
            if case=='one far block': x[-1:] -= 1000
            if case=='near .05': x = torch.stack([edge, edge.nextafter(torch.tensor(1.)), -edge, torch.tensor(.04)])[torch.randint(4, shape)].to(dtype)
            if case=='zeros': x = x*0
            parts = S._by_name(streamed, R._exact(x, axis, streamed, S._Memory(x.device, dtype), bn).flatten(1).numpy())
            got, y = S.Parts(parts, [0]).merged(), x.double().numpy()
            near = (np.abs(x.numpy()) <= x.numpy().dtype.type(S._near)).mean()
            assert got['count'] == y.size and got['min'] == y.min() and got['max'] == y.max()
            assert got['near_zero'] == pytest.approx(near, rel=1e-6) and got['nonfinite'] == 0
            assert got['mean'] == pytest.approx(y.mean(), rel=2e-6, abs=2e-6)
            assert math.sqrt(got['var'][0]) == pytest.approx(y.std(), rel=2e-6)


def test_exact_knows_what_goes_into_a_batchnorm():
    m = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3))
    m[1].running_mean.fill_(.1)
    with torch.no_grad(): m[0].bias[0] = 1000.   # a channel whose mean is far from zero
    rec, x, got = ActivationRecorder(m.eval(), sample=None), torch.randn(32, 3, 16, 16), []
    for _ in range(2):
        with rec, torch.no_grad(): m(x)
        got.append(rec.to_df().drop(columns='layer').to_numpy(float))
    assert rec._feeds == {0}
    np.testing.assert_allclose(*got, rtol=2e-6)
    y = m[0](x).detach().double().transpose(0, 1).flatten(1).numpy()
    bn = m[1]
    mu, var = bn.running_mean.double().numpy(), bn.running_var.double().numpy()
    want = math.sqrt((((y.mean(1)-mu)**2 + (y.std(1)-np.sqrt(var))**2)/(var+bn.eps)).mean())
    assert row(rec.record, 1)['bn_dist'] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize('sample', [None, 4096])
def test_one_item_is_no_evidence_of_death(sample):
    rec = recorded(nn.Linear(8, 8), *torch.randn(257, 1, 8), sample=sample)
    assert np.isnan(rec.to_df().dead).all()


def test_what_failed_leaves_no_numbers_and_no_tensors(monkeypatch):
    m = nn.Linear(4, 4)
    rec = recorded(m, torch.randn(4))
    with monkeypatch.context() as mp:
        mp.setattr(R, '_places', lambda *a: 1/0)
        with rec: m(torch.randn(5, 4)*1000)
    assert rec.problems
    with pytest.raises(ValueError, match='failed with'): rec.to_df()
    monkeypatch.setattr(R._Buffer, 'add', lambda *a: 1/0)
    x = torch.randn(4, 4)
    rec, alive = recorded(m, x), weakref.ref(x)
    del x; gc.collect()
    assert rec.problems and alive() is None


@pytest.mark.parametrize('calls', range(4, 11))
def test_bn_keeps_its_distance_where_the_buffer_is_full(calls):
    lin, bn = nn.Linear(16, 16), nn.BatchNorm1d(16)
    bn.running_mean += 1
    class M(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.bn = lin, nn.Linear(16, 16), bn.eval()
        def forward(self, x):
            for _ in range(calls): self.a(x)
            return self.bn(self.b(x))
    assert recorded(M(), torch.randn(64, 16)).to_df().set_index('layer').bn_dist['bn'] > .5


@pytest.mark.parametrize('sample', [None, 4096])
def test_bn_after_another_axis(sample):
    m, x = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).eval(), torch.randn(64, 64, 64)*torch.linspace(.1, 10, 64)[:, None]
    with torch.no_grad(): y = m[0](x)
    m[1].running_mean[:], m[1].running_var[:] = y.mean((0, 2)), y.var((0, 2))
    for layers in (None, '1'): assert recorded(m, x, sample=sample, layers=layers).to_df().bn_dist.iloc[-1] < .15


def test_inference_mode_is_like_no_grad():
    m, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(8)).eval(), torch.randn(8, 3, 16, 16)
    m[2].running_mean += .1
    rec = ActivationRecorder(m, sample=None)
    with rec, torch.inference_mode(): m(x)
    a = rec.to_df().bn_dist.iloc[-1]
    with rec, torch.no_grad(): m(x)
    assert not rec.problems and a == pytest.approx(rec.to_df().bn_dist.iloc[-1], rel=1e-6)


def test_keyword_input_and_lazy_and_parametrized_modules():
    bn = nn.BatchNorm1d(4)
    bn.running_mean += 1
    rec = ActivationRecorder(bn.eval())
    with rec: bn(input=torch.randn(8, 4))
    assert not rec.problems and len(rec.to_df()) == 1
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    assert len(recorded(lazy, torch.randn(4, 3, 8, 8)).to_df()) == 2
    with torch.device('meta'): ActivationRecorder(nn.BatchNorm2d(3))
    m = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU())
    assert recorded(m, torch.randn(2, 3, 9, 9)).to_df()[['layer', 'count']].values.tolist() == [['0', 2*8*7*7]]


def test_counts_beyond_float32():
    df = recorded(Out(lambda _: torch.ones(2**24+3)), torch.ones(1), sample=None, hist=False).to_df()
    assert df.nonfinite[0] == 0 and df['count'][0] == 2**24+3


def test_places_are_drawn_anew_in_time():

    class M(nn.Module):
        def __init__(self): super().__init__(); self.ls = nn.ModuleList(nn.Linear(8, i) for i in range(1, 38))
        def forward(self, x): return [l(x) for l in self.ls]
    m, rec, age, worst = M(), None, Counter(), 0
    rec = ActivationRecorder(m, hist=False)
    for _ in range(60):
        with rec, torch.no_grad(): m(torch.ones(4, 8))
        ids = {k: id(p) for k, p in rec._plans.items() if p}
        age = Counter({(k, i): age[k, i]+1 for k, i in ids.items()})
        worst = max(worst, *age.values())
    assert worst <= 10


def test_bidirectional_lstm_that_is_dead():
    lstm = nn.LSTM(4, 8, bidirectional=True, batch_first=True)
    for p in lstm.parameters(): p.data.zero_()
    assert recorded(lstm, *torch.randn(6, 32, 20, 4), sample=1024).to_df().dead.iloc[-1] == 1


@pytest.mark.parametrize('sample', [None, 4096])
def test_default_device_does_not_matter(sample):
    m, x = small(), torch.randn(8, 3, 64, 64)
    m(x)  # BatchNorm has running statistics now
    with torch.device('meta'), ActivationRecorder(m, sample=sample) as rec: m(x)
    assert not rec.problems and rec.to_df()['std'].gt(0).all()


@pytest.mark.parametrize('sample', [None, 4096])
def test_logging_does_not_change_training(sample):
    def run(cbs):
        set_seed(1)
        learn = get_learner(cbs=cbs)
        set_seed(1)
        learn.fit(2)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(run(None), run(ActivationLogger(sample=sample, grads=True)))


# ---- BatchNorm's distance, dead channels

def bn_model(shift=0, scale=1, c=64, size=32):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, c, 3), nn.BatchNorm2d(c))
    m[1].running_mean.normal_(); m[1].running_var.uniform_(.5, 2)
    def conv(x):  # a batch whose channels are `shift` off and `scale` as wide
        z = torch.randn(8, c, size, size)
        return z*(m[1].running_var.sqrt()*scale)[:, None, None] + (m[1].running_mean + shift*m[1].running_var.sqrt())[:, None, None]
    m[0].forward = conv
    return m.eval()


@pytest.mark.parametrize('shift,scale', [(0, 1), (.5, 1), (0, 2), (-1, .5), (3, 1)])
@pytest.mark.parametrize('sample', [None, 4096])
@pytest.mark.parametrize('c', [64, 512, 1024])
def test_bn_distance_is_the_stated_formula(shift, scale, sample, c):
    m = bn_model(shift, scale, c, 16)
    ds = []
    for _ in range(3):
        rec = record(m, torch.zeros(1), sample=sample)
        ds.append(row(rec.record, 1)['bn_dist'])
    want = math.hypot(shift, scale-1)
    assert np.mean(ds) == pytest.approx(want, abs=.05 if sample is None or want else .17, rel=.06)
    assert math.isnan(row(rec.record, 0)['bn_dist'])


def test_bn_distance_against_numpy():
    m = bn_model(.3, 1.5)
    m[1].running_var[:5] = 1e-12  # tiny running variances do not blow up
    seen = []
    m[0].register_forward_hook(lambda m, i, o: seen.append(o))
    rec = record(m, torch.zeros(1), sample=None)
    x = seen[-1].double().numpy()
    mu, var = m[1].running_mean.double().numpy(), m[1].running_var.double().numpy()
    s2 = np.maximum(var, .01*var.mean()) + m[1].eps
    want = np.sqrt((((x.mean((0, 2, 3))-mu)**2 + (x.std((0, 2, 3))-np.sqrt(var))**2)/s2).mean())
    assert row(rec.record, 1)['bn_dist'] == pytest.approx(want, rel=1e-5) and want < 5


def test_bn_distance_needs_trained_statistics_and_other_orders():
    r = record(small(), torch.randn(8, 3, 16, 16)).record
    assert np.isnan(r['bn_dist']).all()
    m = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4*30*30)).train()
    for b in (m[0], m[3], m[5]): b.running_mean += .1
    for sample in (None, 4096): assert np.isfinite(record(m, torch.randn(8, 3, 32, 32), sample=sample).record['bn_dist']).tolist() == [True, False, True, True]


def test_bn_reference_is_from_the_start_of_fit():
    m = small()
    m[1].running_mean += 2
    learn = get_learner(m, cbs=ActivationLogger())
    learn.fit(12)
    d = learn.activation_logger.to_df().query('layer=="1" and split=="train"').bn_dist
    assert d.iloc[0] > 1 and d.iloc[-1] > 1 and abs(m[1].running_mean).max() < 1  # BatchNorm has moved on, the reference has not


def test_dead_channels():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU())
    m[0].bias.data[:8] = -1e3
    for sample, first in ((None, .25), (4096, math.nan)):
        rec = ActivationRecorder(m, layers='*[01]', sample=sample)
        ds = []
        for _ in range(3):
            with rec: m(torch.randn(16, 3, 32, 32))
            ds.append(row(rec.record, 1)['dead'])
        assert ds[0] == pytest.approx(first, nan_ok=True) and ds[-1] == .25 and row(rec.record, 0)['dead'] == 0
    m[0].bias.data[:8] = 0
    with rec: m(torch.randn(16, 3, 32, 32))
    assert row(rec.record, 1)['dead'] == 0  # alive again at once


def test_sparse_is_not_dead():
    m = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    def f(x): return torch.where(torch.rand(64, 512, 8, 8) < .05, 1., 0.)
    m[1].forward = f
    rec = ActivationRecorder(m, layers='1')
    for _ in range(40):
        with rec: m(torch.zeros(1, 4))
    assert row(rec.record)['dead'] == 0


# ---- modules and structures

def test_inplace_after_a_layer():
    m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)).eval()
    m[2].running_mean += 1
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(): want, relu = numpy_stats(m[0](x).numpy()), m[1](m[0](x)).double().numpy()
    for sample in (None, 64):
        rec = record(m, x, sample=sample)
        assert row(rec.record)['min'] < -.1
    rec = record(m, x, sample=None)
    assert {k: row(rec.record)[k] for k in stats} == pytest.approx(want, rel=1e-5)
    d = np.sqrt((((relu.mean((0, 2, 3))-1)**2 + (relu.std((0, 2, 3))-1)**2)/(1+m[2].eps)).mean())
    assert row(rec.record, 1)['bn_dist'] == pytest.approx(d, rel=1e-4)  # of the input after ReLU, not of the convolution's output


def test_empty_batches_and_integer_outputs():
    assert record(Out(lambda x: x[:0]), torch.randn(3, 2)).record is None
    assert record(Out(lambda x: x.long()), torch.randn(3, 2)).record is None
    rec = record(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), torch.zeros(4, 7, dtype=torch.long))
    assert (rec.record['count'] == [84, 56]).all()


def test_thousands_of_calls_stay_in_one_buffer():
    cell = nn.Linear(80, 80)
    class RNN(nn.Module):
        def __init__(self): super().__init__(); self.cell = cell
        def forward(self, x):
            for _ in range(300): x = self.cell(x)
            return x
    rec = ActivationRecorder(m := RNN(), sample=4096)
    x = torch.randn(64, 80)
    with torch.no_grad(), rec.start():
        m(x)
        assert sum(b.x.numel() for b in rec._bufs.values()) <= 8*4096
    assert rec.record['count'][0] == 300*64*80


def test_a_hook_that_fails_is_a_warning():
    al = ActivationLogger()
    learn = get_learner(cbs=al)
    real = R._Rule.axis
    def boom(self, shape, stride):
        if len(shape) == 2: raise RuntimeError('boom')
        return real(self, shape, stride)
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(R._Rule, 'axis', boom)
        with pytest.warns(ActivationLoggerWarning, match='Layer 8 is not recorded: RuntimeError: boom') as ws: learn.fit(1)
    assert len(ws) == 1 and set(al.to_df().layer) == set('0134')


def test_grads_equal_autograd():
    m = small()
    x = torch.randn(4, 3, 16, 16)
    rec = ActivationRecorder(m, sample=None, grads=True).start()
    want = []
    h = m[3].register_forward_hook(lambda m, i, o: o.register_hook(want.append) and None)
    m(x).square().sum().backward()
    h.remove(); rec.stop()
    r = rec.collect()
    got = row(r, len(rec.names)+2)
    assert {k: got[k] for k in stats} == pytest.approx(numpy_stats(want[0].numpy()), rel=1e-5, abs=1e-9)
    m(x).sum().backward()  # nothing is on any more
    assert rec.record is r


def test_grads_in_training():
    learn = get_learner(cbs=ActivationLogger(grads=True))
    learn.fit(1)
    df = learn.activation_logger.to_df()
    assert (df.query('split=="train"').grad_std > 0).all() and df.query('split=="valid"').grad_std.isna().all()
    learn.activation_logger.plot('grad_std')
    with pytest.raises(ValueError, match='grads=True'): get_and_fit().plot('grad_std')


def get_and_fit(**kw):
    learn = get_learner(cbs=ActivationLogger(**kw))
    learn.fit(1)
    return learn.activation_logger


# ---- fastai: fits, events, exits

def test_every_valid_and_steps():
    learn = get_learner(cbs=ActivationLogger(every=4))
    learn.fit(2)
    df = learn.activation_logger.to_df().query('layer=="0"')
    assert df.query('split=="train"').step.tolist() == [0, 4, 8] and df.query('split=="train"').epoch.tolist() == [0, 0, 1]
    assert df.query('split=="valid"').step.tolist() == [6, 12] and df.query('split=="valid"').batch.tolist() == [0, 0]
    assert set(get_and_fit(valid=False).to_df().split) == {'train'}


def test_only_logged_batches_have_hooks_and_only_within_the_call():
    model, seen = small(), []
    model[2].forward = lambda x, f=model[2].forward: seen.append((model.training, n_hooks(model))) or f(x)
    class Spy(Callback):
        def before_batch(self): assert n_hooks(self.model) == 0
        def after_pred(self): assert n_hooks(self.model) == 0
    get_learner(model, cbs=[ActivationLogger(every=3, valid=False), Spy()]).fit(1)
    assert [n for t, n in seen if t] == [5, 0, 0, 5, 0, 0] and not any(n for t, n in seen if not t)


def test_fit_again_continues_and_reset_starts_anew():
    learn = get_learner(cbs=ActivationLogger())
    learn.fit(1); learn.fit(2); learn.fine_tune(1)
    al = learn.activation_logger
    df = al.to_df().query('layer=="0" and split=="train"')
    assert df.fit.tolist() == [0]*6 + [1]*12 + [2]*6 + [3]*6 and df.step.tolist() == list(range(30))
    al.reset()
    with pytest.raises(ValueError, match='Nothing is recorded yet'): al.to_df()
    learn.fit(1)
    assert al.to_df().step.max() == 6


def test_another_model_starts_anew():
    learn = get_learner(cbs=ActivationLogger())
    learn.fit(1)
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    learn.create_opt()
    learn.fit(1)
    assert set(learn.activation_logger.to_df().layer) == {'1'} and is_clean(learn)
    learn.model[1] = nn.Linear(768, 2)
    learn.create_opt(); learn.fit(1)
    assert learn.activation_logger.to_df().step.max() == 6


def test_silent_in_lr_find_and_get_preds(tmp_path):
    learn = get_learner(cbs=ActivationLogger(), path=tmp_path)
    learn.lr_find(show_plot=False)
    learn.get_preds()
    with pytest.raises(ValueError, match='Nothing is recorded'): learn.activation_logger.summary()
    learn.fit(1)
    n = len(learn.activation_logger.to_df())
    learn.lr_find(show_plot=False); learn.get_preds(ds_idx=0)
    assert len(learn.activation_logger.to_df()) == n and is_clean(learn)
    learn.validate()  # is a look at the validation set
    df = learn.activation_logger.to_df()
    assert len(df) == n+10 and df.query('fit==1').split.unique() == ['valid'] and (df.query('fit==1').step == 6).all() and is_clean(learn)


def test_silent_in_predictions_fetched_while_training():
    from fastai.callback.core import FetchPredsCallback
    learn = get_learner(cbs=[ActivationLogger(), FetchPredsCallback()])
    learn.fit(1)
    assert len(learn.activation_logger._hist['valid']) == 2


class Boom(Callback):
    "Raise `exc` in the third training batch, or the second validation batch"
    order = 80
    def __init__(self, event, exc, training=True, once=True): self.exc, self.n, self.train_too, self.ev = exc, 0, training, event
    def __call__(self, name):
        if name == self.ev and (self.learn.training == self.train_too or 'epoch' in name):
            self.n += 1
            if self.n == 3 - (not self.train_too): raise self.exc


class BoomModel(nn.Module):
    def __init__(self, exc): super().__init__(); self.m, self.exc, self.n = small(), exc, 0
    def forward(self, x):
        self.n += 1
        x = self.m[:4](x)
        if self.n == 3: raise self.exc
        return self.m[4:](x)


errors = [RuntimeError('x'), KeyboardInterrupt(), SystemExit(1)]
events = ['before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch', 'after_train', 'after_epoch']


@pytest.mark.parametrize('exc', errors, ids=lambda e: type(e).__name__)
def test_exit_by_exception_in_the_model(exc):
    learn = get_learner(BoomModel(exc), cbs=ActivationLogger(grads=True))
    with pytest.raises(type(exc)): learn.fit(3)
    assert is_clean(learn)
    df = learn.activation_logger.to_df()
    assert df.step.max() == 2 and len(df.query('step==2')) == 3  # what was seen before it failed is there
    learn.fit(1)
    assert learn.activation_logger.to_df().fit.max() == 1 and is_clean(learn)


@pytest.mark.parametrize('exc', errors, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('event', events)
def test_exit_by_exception_in_a_callback(event, exc):
    learn = get_learner(cbs=[ActivationLogger(), Boom(event, exc)])
    with pytest.raises(type(exc)): learn.fit(3)
    assert is_clean(learn)


def test_exit_by_exception_in_loss_and_loader():
    def loss(p, y): raise ValueError('loss')
    learn = get_learner(cbs=ActivationLogger(), loss=loss)
    with pytest.raises(ValueError, match='loss'): learn.fit(1)
    assert is_clean(learn) and len(learn.activation_logger.to_df()) == 5
    learn = get_learner(cbs=ActivationLogger())
    class Bad(list):
        def __getitem__(self, i):
            if i == 40: raise OSError('disk')
            return super().__getitem__(i)
    learn.dls.train.dataset = Bad(learn.dls.train.dataset)
    with pytest.raises(OSError): learn.fit(1)
    assert is_clean(learn)


@pytest.mark.parametrize('exc', [CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException, CancelValidException], ids=lambda e: e.__name__)
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss'])
def test_exit_by_cancel(event, exc):
    learn = get_learner(cbs=[ActivationLogger(), Boom(event, exc(), training=exc is not CancelValidException)])
    learn.fit(2)
    assert is_clean(learn)
    d = learn.activation_logger.to_df().query('layer=="0"')
    n = {CancelBatchException: 12, CancelTrainException: 9, CancelEpochException: 9, CancelFitException: 3, CancelValidException: 12}[exc] - (exc in (CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException) and event == 'before_batch')
    assert (d.split == 'train').sum() == n


def test_two_loggers_and_passed_to_fit():
    learn = get_learner()
    class Second(ActivationLogger): pass
    a, b = ActivationLogger(layers='0'), Second(layers='8', every=2)
    learn.fit(1, cbs=[a, b])
    assert len(a.to_df().query('split=="train"')) == 6 and len(b.to_df().query('split=="train"')) == 3
    assert '_with_events' not in vars(learn) and n_hooks(learn.model) == 0
    with pytest.raises(RuntimeError): learn.fit(1, cbs=[a, b, Boom('after_loss', RuntimeError('x'))])
    assert '_with_events' not in vars(learn) and n_hooks(learn.model) == 0


def test_nothing_shadows_the_learner_or_the_model():
    m = small()
    for n in ('layers', 'stats', 'hist', 'alerts', 'sample', 'every'): m.register_buffer(n, torch.zeros(1))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='You are shadowing')
        learn = get_learner(m, cbs=ActivationLogger(grads=True))
        learn.fit(2)
        learn.activation_logger.reset()
        learn.fit(1)


class Items(list):
    def new_empty(self): return Items()


def test_export_and_copy(tmp_path):
    from fastai.learner import load_learner
    learn = get_learner(cbs=ActivationLogger(to=[lambda df: None], layers='[01]'), path=tmp_path)
    learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for dl in learn.dls.loaders: dl.dataset = Items(dl.dataset)
        learn.logger = None  # a lambda of these tests, which cannot be pickled
        learn.export('a.pkl')
        again = load_learner(tmp_path/'a.pkl')
    al, x = again.activation_logger, torch.randn(2, 3, 16, 16)
    assert al.layers == '[01]' and al.to is None and n_hooks(again.model) == 0
    assert torch.equal(again.model.eval()(x), learn.model.eval()(x))
    assert len(again.get_preds(dl=get_learner().dls.valid)[0]) == 16  # the callback is there, and silent
    with pytest.raises(ValueError, match='Nothing is recorded'): al.to_df()
    again.dls, again.logger = get_learner().dls, lambda *a: None
    again.fit(1)
    assert len(al.stats) == 6
    copy.deepcopy(learn.activation_logger).reset()
    assert n_hooks(learn.model) == 0 and len(learn.activation_logger.stats) == 6


def test_mixed_precision_and_accumulation():
    from fastai.callback.training import GradientAccumulation
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = get_learner(cbs=[ActivationLogger(), GradientAccumulation(16)])
        learn.fit(1)
    assert len(learn.activation_logger._hist['train']) == 6
    learn = get_learner(cbs=ActivationLogger(grads=True))
    class Autocast(Callback):
        order = 10
        def before_batch(self): self.c = torch.autocast('cpu', torch.bfloat16); self.c.__enter__()
        def after_loss(self): self.c.__exit__(None, None, None)
    learn.fit(1, cbs=Autocast())
    assert np.isfinite(learn.activation_logger.to_df().query('split=="train"')[['mean', 'std', 'grad_std']]).all().all()


def test_freeze_and_unfreeze():
    learn = get_learner(cbs=ActivationLogger(grads=True), splitter=lambda m: [list(m[:5].parameters()), list(m[5:].parameters())])
    learn.freeze(); learn.fit(1); learn.unfreeze(); learn.fit(1)
    df = learn.activation_logger.to_df()
    assert df.query('fit==0 and split=="train" and layer=="8"').grad_std.notna().all() and df.query('fit==1 and split=="train" and layer=="0"').grad_std.notna().all()


# ---- real learners

def test_vision_unet_layernorm_learners(photo_dls):
    import torchvision
    from fastai.vision.all import resnet18, unet_learner, vision_learner, xresnet18
    for arch, kw in ((resnet18, {}), (torchvision.models.convnext_tiny, {}), ('vit_tiny_patch16_224', dict(img_size=64))):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            learn = vision_learner(photo_dls(bs=8), arch, pretrained=False, cbs=ActivationLogger(every=2), normalize=False, **kw)
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(1) if arch is resnet18 else learn.fit(1)
        df = learn.activation_logger.to_df()
        assert np.isfinite(df[['mean', 'std']]).all().all() and df.layer.nunique() > 20 and is_clean(learn)
        assert 'No alerts' in learn.activation_logger.summary()


def test_unet():
    from fastai.vision.all import DynamicUnet, create_body, xresnet18
    m = DynamicUnet(create_body(xresnet18(pretrained=False)), 2, (32, 32))
    learn = get_learner(m, cbs=ActivationLogger(), size=32, n=8, bs=4, loss=lambda p, y: p.mean())
    own = n_hooks(m)  # of fastai, for the skip connections
    learn.fit(1)
    assert learn.activation_logger.to_df().layer.nunique() > 40 and n_hooks(m) == own


def test_text_classifier():
    from fastai.text.models import AWD_LSTM, awd_lstm_clas_config, get_text_classifier
    conf = dict(awd_lstm_clas_config, emb_sz=24, n_hid=32, n_layers=2)
    m = get_text_classifier(AWD_LSTM, 50, 2, config=conf)
    learn = get_learner(m, cbs=ActivationLogger(), x=torch.randint(2, 50, (48, 20)), loss=lambda p, y: nn.functional.cross_entropy(p[0], y))
    learn.fit(1)
    df = learn.activation_logger.to_df()
    assert df.layer.str.contains('rnns').any() and np.isfinite(df['mean']).all() and is_clean(learn)


def test_tabular():
    from fastai.tabular.all import TabularModel
    m = TabularModel([(5, 3), (4, 2)], 2, 2, [50, 20])
    g = torch.Generator().manual_seed(0)
    ds = [(torch.randint(0, 4, (2,), generator=g), torch.randn(2, generator=g), i % 2) for i in range(64)]
    dls = DataLoaders(DataLoader(ds, bs=16), DataLoader(ds, bs=16))
    dls.n_inp = 2
    learn = Learner(dls, m, loss_func=nn.CrossEntropyLoss(), cbs=ActivationLogger())
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert set(learn.activation_logger.to_df().layer) >= {'embeds.0', 'bn_cont'} and is_clean(learn)


# ---- compiled and parallel models

def test_compiled_models():
    if not hasattr(torch.compiler, 'set_stance'): pytest.skip('this torch cannot run a compiled model as written')
    for whole in (True, False):
        ran, inner = [], small()
        def backend(gm, ex): ran.append(1); return gm.forward
        m = torch.compile(inner, backend=backend) if whole else nn.Sequential(torch.compile(inner[:4], backend=backend), inner[4:])
        learn = get_learner(m, cbs=ActivationLogger(every=3))
        learn.fit(1)
        df = learn.activation_logger.to_df()
        assert df.query('split=="train"').step.unique().tolist() == [0, 3] and df.layer.nunique() == 5 and not df.layer.str.contains('_orig_mod').any()
        assert ran, 'batches that are not logged run compiled'
        n = len(ran)
        with torch.no_grad(): m(torch.randn(8, 3, 16, 16))
        assert is_clean(learn)
    learn = get_learner(torch.compile(BoomModel(RuntimeError('x')), backend='eager'), cbs=ActivationLogger())
    with pytest.raises(RuntimeError): learn.fit(1)
    assert torch._dynamo.eval_frame._stance.stance == 'default'


def test_what_cannot_be_seen_is_said():
    x = torch.randn(8, 3, 16, 16)
    learn = get_learner(torch.jit.trace(small(), x, check_trace=False), cbs=ActivationLogger(layers='0'))
    with pytest.warns(ActivationLoggerWarning, match='None of the 1 layers was seen to run.*traced') as ws: learn.fit(2)
    assert len(ws) == 1


def test_replicas_in_threads():
    "What DataParallel does: shallow copies of all modules, each run in a thread"
    m, x = small().eval(), torch.randn(32, 3, 24, 24)
    def replicate(m):
        r = m._replicate_for_data_parallel()
        for k, c in m._modules.items(): r._modules[k] = replicate(c); setattr(r, k, r._modules[k])
        for k, p in m._parameters.items(): r._parameters[k] = p
        for k, b in m._buffers.items(): r._buffers[k] = b
        return r
    rec = ActivationRecorder(m, sample=None)
    for _ in range(5):
        rec.start()
        ts = [threading.Thread(target=replicate(m), args=(p,)) for p in x.chunk(4)]
        for t in ts: t.start()
        for t in ts: t.join()
        rec.stop(); rec.collect()
        assert not rec.problems
        whole = record(m, x, sample=None).record
        for k in stats: assert np.allclose(rec.record.column(k), whole.column(k), rtol=1e-5, atol=1e-6), k
    assert list(ActivationRecorder(nn.DataParallel(m)).names) == rec.names


def _ranked(work, rank, port, q):
    import datetime, os
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30))
    try:
        torch.manual_seed(0)
        q.put((rank, work(rank)))
    finally: torch.distributed.destroy_process_group()


def in_two_processes(work):
    "What `work(rank)` returns in each of two processes of a distributed run"
    import socket
    import torch.multiprocessing as mp
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    ctx = mp.get_context('spawn')
    q = ctx.Queue()
    ps = [ctx.Process(target=_ranked, args=(work, r, port, q)) for r in range(2)]
    for p in ps: p.start()
    res = dict(q.get(timeout=120) for _ in ps)
    for p in ps: p.join(60); assert p.exitcode == 0
    return [res[0], res[1]]


def _even(rank):
    m = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(16, 3, 4, 4)
    ds = list(zip(x[rank::2], torch.arange(8) % 2))
    dls = DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8))
    learn = Learner(dls, nn.parallel.DistributedDataParallel(m), loss_func=nn.CrossEntropyLoss(), cbs=ActivationLogger(sample=None))
    learn.logger = lambda *a: None
    with torch.no_grad(): want = numpy_stats(m(x).numpy())
    with learn.no_bar(): learn.fit(1)
    r = learn.activation_logger.to_df().iloc[0]
    return r['layer'], int(r['count']), {k: float(r[k]) for k in stats}, want


def test_distributed_merges_over_ranks():
    for layer, n, got, want in in_two_processes(_even):
        assert layer == '1' and n == 32 and got == pytest.approx(want, rel=1e-5)


def _uneven(rank):
    "Validation batches that differ between processes, a rank that validates alone, and batches that a callback cuts short"
    m = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    ds = list(zip(torch.randn(16, 3, 4, 4), torch.arange(16) % 2))
    dls = DataLoaders(DataLoader(ds[rank::2], bs=4), DataLoader(ds[:16] if rank == 0 else ds[:8], bs=8))
    class Short(Callback):
        def after_pred(self):
            if self.training and self.iter == 1: raise CancelTrainException()
    class Alone(Callback):
        done = False
        def after_epoch(self):
            if rank == 0 and not self.done: self.done = True; self.learn.validate()
    learn = Learner(dls, m, loss_func=nn.CrossEntropyLoss(), cbs=[ActivationLogger(sample=None), Short(), Alone()])
    learn.logger = lambda *a: None
    with learn.no_bar(): learn.fit(2)
    df = learn.activation_logger.to_df()
    if rank == 0:
        with learn.no_bar(): learn.validate()
    return [df[df.split == o]['count'].tolist() for o in ('train', 'valid')]


def test_uneven_processes_do_not_wait_for_each_other():
    (train0, valid0), (train1, valid1) = in_two_processes(_uneven)
    assert train0 == train1 == [16]*4                             # both processes, the batch that was cut short too
    assert valid0.count(48) == 2 and valid1 == [48]*2             # 16 + 8 images, once an epoch; alone, rank 0's own


# ---- memory

def test_memory_is_bounded_and_nothing_that_happened_is_lost():
    h = A._History(8)
    recs, every = [], []
    for t in range(1000):
        rec = S.Record.empty(3, S._states_of(S._choose(), hist=True))
        numbers = dict(count=100, mean=t, var=1, min=t-3., max=t+3., near_zero=.1, nonfinite=.01*(t == 77), bn_dist=t % 5)
        for k, v in numbers.items(): rec[k][:] = v
        rec['hist']['counts'][:, 10], rec['hist']['exp'] = 100, t % 7
        every.append(rec)
        h.add(dict(step=t, batches=1), rec)
        assert len(h) <= 8
    assert sum(m['batches'] for m in h.meta) == 1000 and h.meta[0]['step'] == 0
    sizes = [m['batches'] for m in h.meta]
    assert max(sizes[:-1]) <= 2*min(sizes[:-1])
    a, b = S.Record.together(h.recs), S.Record.together(every)
    for k in numbers: assert np.allclose(a[k], b[k]), k
    assert a['hist']['counts'].sum() == b['hist']['counts'].sum() == 300000
    assert a['max'][0] == 1002 and a['nonfinite'][0] == pytest.approx(1e-5)


@pytest.mark.parametrize('hist,size', [(True, 336), (False, 72)])
def test_bytes_per_layer_and_record(hist, size):
    al = get_and_fit(hist=hist)
    rec = al._hist['train'].recs[0]
    assert rec.v.nbytes/len(al._rec.names) == size
    assert rec.v.base is None or rec.v.base.nbytes <= 2*rec.v.nbytes  # nothing larger is kept alive


# ---- sinks

def test_csv(tmp_path):
    learn = get_learner(cbs=ActivationLogger(to=tmp_path/'sub/a.csv', keep=2))
    (tmp_path/'sub').mkdir(); (tmp_path/'sub/a.csv').write_text('old')
    sizes = []
    class Spy(Callback):
        order = 99
        def before_batch(self): sizes.append(len(pd.read_csv(tmp_path/'sub/a.csv'))) if self.training and self.train_iter else None
    learn.fit(1, cbs=Spy()); learn.fit(1)
    df = pd.read_csv(tmp_path/'sub/a.csv', dtype=dict(layer=str))
    assert len(df) == 5*(12+4) and df.step.max() == 12 and sizes[:5] == [5, 10, 15, 20, 25]  # complete after every batch, not thinned
    assert np.isfinite(df['std']).all()


def test_parquet_survives_a_killed_process(tmp_path):
    import subprocess, sys, textwrap
    code = f'''
        import warnings; warnings.simplefilter('ignore')
        import os, sys; sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
        from test_activations import *
        class Kill(Callback):
            def after_batch(self):
                if self.training and self.learn.epoch == 1 and self.iter == 4: os._exit(9)
        get_learner(cbs=[ActivationLogger(to=[{str(tmp_path/"a.parquet")!r}, {str(tmp_path/"a.csv")!r}]), Kill()]).fit(2)'''
    assert subprocess.run([sys.executable, '-c', textwrap.dedent(code)]).returncode == 9
    csv, pq = pd.read_csv(tmp_path/'a.csv'), pd.read_parquet(tmp_path/'a.parquet')
    assert len(csv) == 5*(6+2+5) and len(pq) == 5*(6+2)  # Parquet is flushed when an epoch ends
    assert pq['mean'].to_numpy() == pytest.approx(csv['mean'][:len(pq)].to_numpy())


def test_parquet(tmp_path):
    al = get_and_fit(to=str(tmp_path/'a.parquet'))
    a, b = pd.read_parquet(tmp_path/'a.parquet').sort_values(['split', 'step', 'batch'], kind='stable'), al.to_df()
    assert len(a) == len(b) and np.allclose(a['std'], b['std'])


def test_tensorboard_read_back(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(tmp_path) as w: al = get_and_fit(to=w)
    ea = EventAccumulator(str(tmp_path), size_guidance=dict(scalars=0, histograms=0))
    ea.Reload()
    got = ea.Scalars('train_std/0')
    assert [e.step for e in got] == list(range(6)) and [e.value for e in got] == pytest.approx(al.layer_stats(0)[1])
    hs = ea.Histograms('train/0')
    assert len(hs) == 6 and sum(hs[0].histogram_value.bucket) == 4096 and hs[0].histogram_value.min == pytest.approx(al.stats[0][0]['min'])


def test_fastai_tensorboard_callback_is_picked_up(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = get_learner(cbs=[ActivationLogger(), TensorBoardCallback(tmp_path, trace_model=False, log_preds=False)])
    learn.fit(1)
    ea = EventAccumulator(str(tmp_path)); ea.Reload()
    assert len(ea.Scalars('valid_mean/8')) == 1 and len(ea.Scalars('train_std/8')) == 1 and len(ea.Scalars('train_loss')) == 8


def test_picked_up_logs_get_ten_batches_together_and_all_of_a_validation(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    class Mine(TensorBoardCallback): pass
    learn = get_learner(cbs=[ActivationLogger(sample=None), Mine(tmp_path, trace_model=False, log_preds=False)], n=200)
    learn.fit(2)
    ea = EventAccumulator(str(tmp_path)); ea.Reload()
    a, h = ea.Scalars('train_mean/8'), learn.activation_logger._hist
    assert [o.step for o in a] == [0, 10, 20, 25, 35, 45] and [o.step for o in ea.Scalars('valid_mean/8')] == [25, 50]
    want = [np.average([r['mean'][4] for r in h['train'].recs[i:j]], weights=[r['count'][4] for r in h['train'].recs[i:j]]) for i, j in ((0, 10), (10, 20), (20, 25))]
    assert np.allclose([o.value for o in a[:3]], want, rtol=1e-5)


def test_logs_of_other_callbacks_can_be_declined(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = get_learner(cbs=[ActivationLogger(to=False), TensorBoardCallback(tmp_path, trace_model=False, log_preds=False)])
    learn.fit(1)
    ea = EventAccumulator(str(tmp_path)); ea.Reload()
    assert 'train_loss' in ea.Tags()['scalars'] and not any('/' in o for o in ea.Tags()['scalars'])


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline'); monkeypatch.setenv('WANDB_SILENT', 'true')
    run = wandb.init(dir=tmp_path, project='x')
    try:
        logged, real = [], type(run).log
        monkeypatch.setattr(type(run), 'log', lambda self, d, *a, **k: logged.append(d) or real(self, d, *a, **k))
        al = get_and_fit(to=run)
        assert len(logged) == 8 and logged[3]['train_std/0'] == pytest.approx(al.layer_stats(0)[1][3])
        assert isinstance(logged[0]['train/0'], wandb.Histogram) and sum(logged[0]['train/0'].histogram) == 4096
        run.finish()
        run = wandb.init(dir=tmp_path, project='x')
        logged.clear()
        import fastai.callback.wandb as fw
        monkeypatch.setattr(fw, '_format_config', lambda c: c.clear())  # fails on plain numbers under fastcore 2.2.39, whatever else is on the learner
        learn = get_learner(cbs=[ActivationLogger(), fw.WandbCallback(log_preds=False)])
        learn.fit(1)
        assert [k for d in logged for k in d if k in ('train_std/0', 'valid_std/0')] == ['train_std/0', 'valid_std/0']
        run.finish()

        run = wandb.init(dir=tmp_path, project='x')     # the same run as `to`: the callback's own log must not lose anything
        steps, was = [], type(run).log
        monkeypatch.setattr(type(run), 'log', lambda self, d, *a, **k: steps.append((k.get('step'), sorted(set(d) & {'train_loss', 'train_std/0'}))) or was(self, d, *a, **k))
        get_learner(cbs=[ActivationLogger(to=run), fw.WandbCallback(log_preds=False)]).fit(1)
        assert all(s is not None for s, _ in steps) and sum('train_std/0' in k for _, k in steps) == 1
        assert [s for s, _ in steps] == sorted(s for s, _ in steps)
    finally: run.finish()


def test_a_function_and_a_list():
    a, b = [], []
    get_and_fit(to=[a.append, [b.append]])
    assert len(a) == len(b) == 8 and list(a[0].layer) == list('01348')


def test_a_sink_that_fails_is_given_up_with_one_warning(tmp_path):
    n, good = [], []
    def full(df): n.append(1); raise OSError(28, 'No space left on device')
    learn = get_learner(cbs=ActivationLogger(to=[full, good.append]))
    with pytest.warns(ActivationLoggerWarning, match='No space left') as ws: learn.fit(2)
    assert len(ws) == 1 and len(n) == 1 and len(good) == 16 and len(learn.activation_logger.to_df()) == 80
    (tmp_path/'file').write_text('')
    for ext in ('csv', 'parquet'):
        learn = get_learner(cbs=ActivationLogger(to=tmp_path/f'file/a.{ext}'))
        with pytest.warns(ActivationLoggerWarning, match='Writing to (CSV|Parquet) failed and is given up'): learn.fit(1)


# ---- alerts

def alerts_of(model, n=1, **kw):
    learn = get_learner(model, cbs=ActivationLogger(**kw))
    for p in model.parameters(): p.requires_grad_(False)
    learn.model.extra = nn.Parameter(torch.zeros(1))
    learn.opt_func = lambda ps, lr: __import__('fastai.optimizer').optimizer.SGD([learn.model.extra], lr)
    learn._do_grad_opt = lambda: None
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        learn.fit(n)
    return [str(w.message) for w in ws if w.category is ActivationWarning], learn.activation_logger


head = lambda: (nn.Flatten(), nn.Linear(768, 2))


def test_alert_nonfinite():
    def f(x): x = x.clone(); x[:, 0, 0] = math.nan; return x
    said, al = alerts_of(nn.Sequential(Out(f), Out(lambda x: x), *head()), n=3)
    assert len(said) == 1
    assert said[0].startswith('Nonfinite activations in 0 (Out): 2.') and '(train, epoch 0, batch 0)' in said[0] and 'So for 2 more: 1 (Out), 3 (Linear).' in said[0]
    assert {(a['cause'], a['layer']) for a in al.found} == {('nonfinite', n) for n in '013'}
    assert 'nonfinite: 0, 1, 3, first at train epoch 0 batch 0' in al.summary()
    assert alerts_of(nn.Sequential(Out(f), *head()), alerts=False)[0] == []


def test_alert_dead_only_when_it_lasts():
    said, _ = alerts_of(nn.Sequential(Out(lambda x: x*0+3), *head()), n=1)
    assert len(said) == 1 and said[0].startswith('Dead activations in 0 (Out): 100% of its channels give the same value everywhere (train, epoch 0, batch 4)')
    c = [0]
    def zero_init(x): c[0] += 1; return x*0 if c[0] < 4 else x
    assert alerts_of(nn.Sequential(Out(zero_init), *head()))[0] == []


def test_alert_exploding_and_vanishing():
    c = [0]
    def grow(x): c[0] += 1; return x*20.**c[0]
    said, al = alerts_of(nn.Sequential(Out(grow), Out(lambda x: x/x.std()), *head()))
    assert len(said) == 1 and said[0].startswith('Exploding activations in 0 (Out): its values have grown to ') and 'batch 2' in said[0]
    c = [0]
    def shrink(x): c[0] += 1; return x*10.**-c[0]
    said, _ = alerts_of(nn.Sequential(Out(shrink), Out(lambda x: x/x.std()), *head()), n=3)
    assert len(said) == 1 and said[0].startswith('Vanishing activations in 0 (Out): its values have shrunk to')


def test_alerts_can_be_errors_and_leave_nothing():
    learn = get_learner(nn.Sequential(Out(lambda x: x*math.nan), *head()), cbs=ActivationLogger())
    with pytest.raises(ActivationWarning): learn.fit(1)
    assert is_clean(learn)


def test_healthy_training_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('error', ActivationWarning)
        get_learner(cbs=ActivationLogger()).fit(5)


def test_warnings_point_at_the_users_line():
    learn = get_learner(nn.Sequential(Out(lambda x: x*math.nan), *head()), cbs=ActivationLogger())
    with pytest.warns(ActivationWarning) as ws: learn.fit(1)
    assert ws[0].filename == __file__


# ---- reading

def test_fastai_habits():
    learn = get_learner(cbs=ActivationLogger(with_hist=True, modules=None, every=None))
    learn.fit(2)
    al = learn.activation_logger
    assert len(al.stats) == 12 and len(al.stats[0]) == 5 and {'mean', 'std', 'near_zero'} <= al.stats[0][0].keys()
    m, s, z = al.layer_stats(-1)
    assert len(m) == 12 and m == al.stats.itemgot(-1).itemgot('mean')
    assert al.hist(0).shape == (64, 12) and al.hist_data(0)[0].sum(0).tolist() == [4096]*12
    assert not ActivationLogger(with_hist=False).hists
    with pytest.raises(KeyError, match="no layer 'x'; recorded are 0, 1"): al.hist('x')
    with pytest.raises(IndexError, match='no layer 5: 5 are recorded'): al.layer_stats(5)
    with pytest.raises(ValueError, match='hist=True'): get_and_fit(hist=False).color_dim(0)
    with pytest.raises(ValueError, match='`stat` is one of mean, std'): al.plot('x')


def test_color_dim_has_a_numeric_axis():
    import matplotlib.pyplot as plt
    al = get_and_fit()
    ax = al.color_dim(0)
    lo, hi = ax.get_ylim()
    df = al.to_df().query('layer=="0" and split=="train"')
    w = np.diff(al.hist_data(0)[1])[0]
    assert lo == pytest.approx(df['min'].min(), abs=w) and hi == pytest.approx(df['max'].max(), abs=w) and ax.get_ylabel() == 'activation'
    plt.close('all')


def test_hist_data_equals_merged_bins():
    al = get_and_fit()
    C, e = al.hist_data(0)
    assert C.shape == (64, 6) and len(e) == 65 and (np.diff(e) > 0).all()
    total = sum(counts(r).sum() for r in al._hist['train'].recs)
    assert C.sum() == total


def test_summary_rows():
    al = get_and_fit()
    assert 'No alerts' in al.summary() and 'BatchNorm2d' in al.summary()
    assert '2 more layers' in al.summary(n=3)
    assert al.plot(relative=True).get_title().endswith('relative to the first record (train)')


# ---- GPU

@pytest.mark.parametrize('sample', [64, None])
def test_what_other_devices_do_agrees_with_the_cpu(monkeypatch, sample):
    m = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(600, 5))
    for bn in (m[1], m[3]): bn.running_mean.fill_(.1)
    x = torch.randn(16, 3, 14, 14)
    def both(f):
        with monkeypatch.context() as p:
            for module in (R, S): p.setattr(module, '_is_cpu', lambda dev: False)
            other = f()
        return f(), other
    for bad in (None, math.nan, math.inf):
        if bad is not None: x[0, 0, 0, 0] = bad
        a, b = (r.record for r in both(lambda: recorded(m.eval(), x, sample=sample)))
        for k in (*stats, 'dead', 'bn_dist'): np.testing.assert_allclose(a.column(k), b.column(k), rtol=1e-5, atol=1e-6)
        for k in ('exp', 'first', 'counts'): np.testing.assert_array_equal(a['hist'][k], b['hist'][k])
    def fit():
        set_seed(0)
        learn = get_learner(cbs=ActivationLogger(sample=sample, grads=True))
        learn.fit(1)
        return learn.activation_logger.to_df().drop(columns=['layer', 'split']).astype(float)
    np.testing.assert_allclose(*both(fit), rtol=1e-4, atol=1e-6)


@cuda
def test_cuda_agrees_with_cpu():
    m, x = small().eval(), torch.randn(16, 3, 64, 64)
    m[1].running_mean += .5
    cpu = record(m, x, sample=None).record
    gpu = record(m.cuda(), x.cuda(), sample=None).record
    for k in (*stats, 'dead', 'bn_dist'): assert np.allclose(cpu.column(k), gpu.column(k), rtol=1e-3, atol=1e-3, equal_nan=True), k
    assert counts(record(m, x.cuda()).record).sum() > 0


@cuda
def test_cuda_memory_is_freed():
    learn = get_learner(small().cuda(), cbs=ActivationLogger())
    learn.dls.cuda()
    learn.fit(1)
    assert is_clean(learn)


@cuda
def test_cuda_data_parallel():
    m = nn.DataParallel(small().cuda())
    rec = record(m, torch.randn(16, 3, 32, 32).cuda())
    assert rec.record['count'][0] == 16*8*30*30


# ---- what a second hostile review found in the callback

class At(Callback):
    "Call `f` at an event, once"
    order = 70
    def __init__(self, event, f): self.f, self.n = f, 0; setattr(self, event, self.go)
    def go(self):
        self.n += 1
        if self.n == 1: self.f(self.learn)


def fail(learn): raise RuntimeError('x')


@pytest.mark.parametrize('event,f', [('before_fit', fail), ('after_epoch', lambda l: l.remove_cb(ActivationLogger)), ('after_batch', lambda l: l.remove_cb(ActivationLogger)),
    ('after_epoch', lambda l: l.activation_logger.reset()), ('before_batch', lambda l: l.activation_logger.reset()), ('after_fit', fail)])
def test_the_learner_survives(event, f):
    learn = get_learner()
    al = ActivationLogger()
    try: learn.fit(2, cbs=[al, At(event, f)])
    except RuntimeError as e: assert str(e).endswith('x')
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ActivationLogger)])
    learn.fit(1)
    assert n_hooks(learn.model) == 0 and '_with_events' not in vars(learn)
    learn.add_cb(al).fit(1)
    assert len(al._hist['train']) >= 6 and is_clean(learn)


def test_a_with_events_of_ones_own_stays():
    learn, calls = get_learner(cbs=ActivationLogger()), []
    real = learn._with_events
    def mine(f, event_type, ex, final=lambda: None): calls.append(event_type); return real(f, event_type, ex, final)
    learn._with_events = mine
    learn.fit(1)
    assert vars(learn)['_with_events'] is mine and calls.count('batch') == 8


@pytest.mark.parametrize('f', [lambda l: l.validate(), lambda l: l.get_preds()])
@pytest.mark.parametrize('event', ['after_epoch', 'after_train'])
def test_validating_inside_a_fit_does_not_end_the_record(f, event):
    learn = get_learner(cbs=ActivationLogger())
    with learn.no_bar(): learn.fit(3, cbs=At(event, f))
    df = learn.activation_logger.to_df()
    assert (df[df.split == 'train'].groupby('epoch').size() == 6*5).all() and set(df[df.split == 'train'].epoch) == {0, 1, 2}
    assert is_clean(learn)


def test_copies_do_not_write_where_the_original_does(tmp_path):
    from fastai.learner import load_learner
    for to in (tmp_path/'a.csv', tmp_path/'a.parquet', [tmp_path/'b.csv']):
        learn = get_learner(cbs=ActivationLogger(to=to), path=tmp_path)
        learn.fit(1)
        f = to[0] if isinstance(to, list) else to
        was = len(pd.read_csv(f) if f.suffix == '.csv' else pd.read_parquet(f))
        copy.deepcopy(learn).fit(2)
        assert was == 40 and len(pd.read_csv(f) if f.suffix == '.csv' else pd.read_parquet(f)) == was


def test_a_folder_with_other_files_is_refused(tmp_path):
    pytest.importorskip('pyarrow')
    f = tmp_path/'log.parquet'
    f.mkdir()
    pd.DataFrame(dict(a=[1])).to_parquet(f/'part-mine.parquet')
    with pytest.raises(ValueError, match='holds other files .part-mine.parquet.'): ActivationLogger(to=f)
    assert (f/'part-mine.parquet').exists()


def test_files_that_came_later_stay(tmp_path):
    pytest.importorskip('pyarrow')
    learn, f = get_learner(cbs=ActivationLogger(to=tmp_path/'log.parquet')), tmp_path/'log.parquet/mine.txt'
    f.parent.mkdir(); f.write_text('mine')
    with pytest.warns(ActivationLoggerWarning, match='holds other files .mine.txt.'): learn.fit(1)
    assert f.read_text() == 'mine' and len(learn.activation_logger.to_df())


def test_sync_batchnorm_is_the_same_layer():
    class Sync(Callback):
        order = 11
        def before_fit(self): self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
    learn = get_learner(cbs=[ActivationLogger(), Sync()])
    for m in learn.model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean += .1; m.forward = lambda x, m=m: nn.functional.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, m.training)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    class Plain(nn.BatchNorm2d): pass
    def swap(model):    # what the conversion does, to a class that runs on a CPU
        for n, c in model.named_children():
            if isinstance(c, nn.BatchNorm2d):
                o = Plain(c.num_features); o.weight, o.bias, o.running_mean, o.running_var = c.weight, c.bias, c.running_mean, c.running_var
                setattr(model, n, o)
        return model
    try:
        nn.SyncBatchNorm.convert_sync_batchnorm = swap
        learn.fit(1); learn.fit(1)
    finally: nn.SyncBatchNorm.convert_sync_batchnorm = convert
    al = learn.activation_logger
    assert len(al._hist['train']) == 12 and all(m is dict(learn.model.named_modules())[n] for n, m in al._rec.layers.items())
    assert al.to_df().query("layer=='1'").bn_dist.notna().all()


def test_steps_count_on_where_a_log_goes_on(tmp_path):
    learn = get_learner(cbs=ActivationLogger(to=tmp_path/'a.csv'))
    learn.fit(1)
    learn.activation_logger.reset()
    learn.fit(1)
    df = pd.read_csv(tmp_path/'a.csv', dtype={'layer': str})
    assert len(df) == 80 and not df.duplicated(['split', 'fit', 'step', 'batch', 'layer']).any()
    learn = get_learner(cbs=ActivationLogger())
    learn.fit(1)
    learn.activation_logger.reset()
    learn.fit(1)
    assert learn.activation_logger.to_df().step.min() == 0


def test_layer_names_survive_a_csv(tmp_path):
    get_learner(nn.Sequential(nn.Flatten(), *[nn.Linear(48, 48) for _ in range(10)], nn.Linear(48, 2)), size=4, cbs=ActivationLogger(to=tmp_path/'a.csv')).fit(1)
    assert pd.read_csv(tmp_path/'a.csv', dtype={'layer': str}).layer.nunique() == 11


def test_distances_follow_weights_that_are_loaded():
    learn = get_learner(cbs=ActivationLogger(sample=None))
    with torch.no_grad():
        for _ in range(50): learn.model.train()(torch.randn(48, 3, 16, 16))
    good = copy.deepcopy(learn.model.state_dict())
    bad = {k: v + 5 if 'running_mean' in k else v for k, v in good.items()}
    def dist():
        with learn.no_bar(): learn.validate()
        return learn.activation_logger.to_df().query("layer=='1'").bn_dist.iloc[-1]
    a = dist()
    learn.model.load_state_dict(bad); b = dist()
    learn.model.load_state_dict(good); c = dist()
    assert b > 5 > 1 > c and c == pytest.approx(a, abs=.05)
    learn.fit(1)                        # what training itself changes is measured from where it began
    refs = learn.activation_logger._rec.refs[1]
    learn.fit(1)
    assert learn.activation_logger._rec.refs[1] is refs


def test_gradients_without_the_loss_scale():
    class Scaled(Callback):
        def __init__(self): self.scaler = type('Scaler', (), dict(get_scale=lambda self: 1024.))()
        def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*1024
    class Unscale(Callback):
        def before_step(self):
            for p in self.model.parameters(): p.grad /= 1024
    cols = ['grad_mean', 'grad_std', 'grad_min', 'grad_max']
    dfs = []
    for cbs in ([], [Scaled(), Unscale()]):
        set_seed(1)
        learn = get_learner(cbs=[ActivationLogger(grads=True, sample=None), *cbs])
        learn.fit(1)
        dfs.append(learn.activation_logger.to_df())
    assert np.allclose(dfs[0][cols], dfs[1][cols], rtol=1e-3, atol=1e-9, equal_nan=True) and dfs[0].grad_std.max() > 0


class Two(nn.Module):
    def __init__(self): super().__init__(); self.main, self.aux, self.pool = nn.Conv2d(3, 2, 3), nn.Linear(2, 2), nn.AdaptiveAvgPool2d(1)
    def forward(self, x):
        x = self.pool(self.main(x)).flatten(1)
        return self.aux(x) if not self.training else x


def test_layers_that_run_in_one_mode_only():
    learn = get_learner(Two(), cbs=ActivationLogger(layers='aux'))
    learn.fit(2)        # warnings are errors here
    assert set(learn.activation_logger.to_df().split) == {'valid'}
    learn = get_learner(Two(), cbs=ActivationLogger(layers='aux', valid=False))
    with pytest.warns(ActivationLoggerWarning, match='None of the 1 layers was seen to run') as ws: learn.fit(2)
    assert len(ws) == 1


def test_layers_that_never_ran_have_no_plot():
    learn = get_learner(Two(), cbs=ActivationLogger(valid=False))
    learn.fit(1)
    for f in (lambda al: al.color_dim('aux'), lambda al: al.hist('aux')):
        with pytest.raises(ValueError, match='aux .Linear. has no finite values .train., since the model never called it'): f(learn.activation_logger)
    assert 'Never called by the model: aux' in learn.activation_logger.summary()


def test_no_batch_waits_for_all_records_to_be_merged():
    h = A._History(64)
    joins = []
    real = h._join
    h._join = lambda i: joins.append(len(h.meta)) or real(i)
    for t in range(2000):
        joins.clear()
        h.add(dict(step=t, batches=1), S.Record.empty(2, S._states_of(S._choose(), hist=True)))
        assert len(joins) <= 2 and len(h) <= 64
    assert sum(m['batches'] for m in h.meta) == 2000 and [m['step'] for m in h.meta] == sorted(m['step'] for m in h.meta)


@pytest.mark.parametrize('kw', [dict(keep='all'), dict(keep=2.5), dict(keep=1), dict(every=2.5), dict(every='x')])
def test_numbers_that_are_none(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` is a number of'): ActivationLogger(**kw)


def test_numbers_of_numpy():
    learn = get_learner(cbs=ActivationLogger(every=np.int64(3), sample=np.int64(256), keep=np.int64(4)))
    learn.fit(1)
    assert len(learn.activation_logger.to_df().query("split=='train'").step.unique()) == 2


@pytest.mark.parametrize('f', ['plot', 'layer_stats', 'hist', 'hist_data', 'color_dim'])
def test_unknown_split(f):
    learn = get_learner(cbs=ActivationLogger())
    learn.fit(1)
    with pytest.raises(ValueError, match="`split` is 'train' or 'valid'; received 'test'"): getattr(learn.activation_logger, f)(*(() if f == 'plot' else (0,)), split='test')


def test_columns_of_a_plot_are_named_by_their_batch():
    learn = get_learner(cbs=ActivationLogger())
    with learn.no_bar(): learn.fit(2); [learn.validate() for _ in range(4)]; learn.fit(3)
    ax = learn.activation_logger.plot(split='valid')
    x = learn.activation_logger._values('valid')[2]
    assert [int(o.get_text()) for o in ax.get_xticklabels()] == [x[int(i)] for i in ax.get_xticks()]
    import matplotlib.pyplot as plt
    plt.close('all')


def test_a_plot_of_the_layers_that_moved_most():
    import matplotlib.pyplot as plt
    al = get_learner(cbs=ActivationLogger())
    al.fit(3)
    al = al.activation_logger
    std = al.to_df().query('split=="train"').pivot(index='layer', columns='step', values='std')
    moved = np.log(std.div(std[0], axis=0)).abs().max(axis=1)
    names = [o.get_text() for o in al.plot(relative=True, most=2).get_yticklabels()]
    assert set(names) == set(moved.nlargest(2).index) and names == [n for n in al._names() if n in names]
    assert len(al.plot(most=99).get_yticklabels()) == len(al._names())
    plt.close('all')


def test_batchnorms_are_numbered_and_told_apart():
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    m = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    m(torch.randn(64, 3, 16, 16))
    learn = get_learner(m, cbs=ActivationLogger())
    learn.fit(2)
    ax = learn.activation_logger.plot_bn_dist()
    assert 'from 1 (0) to 2 (2)' in ax.get_xlabel()
    assert all(list(o.get_xdata()) == [1, 2] for o in ax.lines)
    assert {o.get_label(): to_rgb(o.get_markerfacecolor()) == (1, 1, 1) for o in ax.lines} == {
        'train, last record': False, 'train, first record': True, 'valid, last record': False, 'valid, first record': True}
    for n in range(2): learn.activation_logger.plot_bn_dist(ax=ax, label=f'run {n}')
    solid = [o.get_color() for o in ax.lines if o.get_linestyle() == '-']
    assert len(set(solid)) == len(solid) == 6
    plt.close('all')


def test_very_long_names_leave_room_for_the_plot():
    long = 'x'*200
    model = nn.Sequential()
    model.add_module(long, nn.Conv2d(3, 2, 3)); model.add_module('p', nn.AdaptiveAvgPool2d(1)); model.add_module('f', nn.Flatten())
    learn = get_learner(model, cbs=ActivationLogger())
    learn.fit(1)
    ax = learn.activation_logger.plot()
    ax.figure.canvas.draw()
    assert ax.get_position().width > .4 and all(len(o.get_text()) <= 40 for o in ax.get_yticklabels())
    import matplotlib.pyplot as plt
    plt.close('all')


def test_a_function_cannot_change_what_others_write():
    b = []
    def spoil(df): df['mean'] = 0.
    get_and_fit(to=[spoil, b.append])
    assert (b[0]['mean'] != 0).any()


def test_layers_chosen_in_the_wrong_way():
    with pytest.raises(ValueError, match='To choose by type: `nn.Conv2d`, without quotes'): ActivationRecorder(small(), 'Conv2d')
    with pytest.raises(TypeError, match='called with the name of each module and the module'): ActivationRecorder(small(), lambda n: True)
